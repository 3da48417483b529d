// The only header that kernels include: every primitive of the device that they may use.
//
// It has two faces. nvcc sees device_cuda.h; a C++ compiler with RNN_CUDA_EMULATED sees the
// emulator's device_emulated.h, which runs the same kernels on a CPU, one fiber for each CUDA
// thread. The emulator is a part of the tests: the include path says where it lies. So that both
// can read a kernel, whatever is PTX, a raw __shared__ variable, launch syntax or a CUDA header
// stands in a face, never in a kernel. Kernels may further use __global__, __device__, __host__,
// __forceinline__, __launch_bounds__, __grid_constant__, __restrict__, threadIdx.x, blockIdx.x,
// blockIdx.y, blockDim.x, gridDim.x, gridDim.y, min and max.
//
// All translation units of one library define RNN_CUDA_EMULATED, or none does.
//
// Both faces define, in namespace rnn_cuda::device:
//
//   char* shared_memory()          dynamic shared memory; Carver cuts it into arrays
//   void sync_block()              barrier of the block; orders memory
//   bool any_in_block(bool)        the same, and whether any thread said true
//   void sync_warp()               barrier of the warp; orders memory. The next two do not.
//   T shuffle_xor(T value, int m)  the value of lane (lane ^ m); T is float, double or uint32_t
//   bool any_in_warp(bool)
//   int opaque(int)                the same number, unknown to the optimiser
//
//   void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])   16 x 8 x 16
//   void mma_f16(...)                                                              16 x 8 x 16
//   void mma_tf32(...)                                                             16 x 8 x 8
//                                  d += a b, fragments as PTX lays them out for mma.sync
//   uint32_t round_to_tf32(float)  to nearest, ties away from zero; mma_tf32 itself truncates
//
//   int cluster_rank(), int cluster_size()
//   void cluster_sync()            barrier of the cluster; orders memory, shared memory included
//   void barrier_init(Mbarrier*, int arrivals)      then sync_block() or cluster_sync()
//   void barrier_expect(Mbarrier*, uint32_t bytes)  one arrival, and so many bytes to wait for
//   void barrier_wait(Mbarrier*, uint32_t parity)   until the phase of that parity is complete
//   void store_async(T* word, T value, Mbarrier* barrier, int rank)
//                                  writes to the place of `word` in the shared memory of block
//                                  `rank`, and counts its bytes at the place of `barrier` there;
//                                  T is uint32_t or Word16
//
//   uint32_t load_acquire(const uint32_t*)          of global memory, in the scope of the GPU
//   void add_release(uint32_t*, uint32_t)
//   RNN_CUDA_SPIN_UNTIL(condition)                  the only loop that waits for other threads
//   T load_shared_by_gpu(const T*)                  through L2; T is uint32_t or Word16
//   void store_shared_by_gpu(T*, T)
//
//   float to_float(T); T from_float<T>(float)       T is float, bfloat16, float16; rounds to even.
//                                                   double stays double in both
//   uint32_t pack(T low, T high)                    of bfloat16 or float16
//   uint32_t bits_of(T); float float_of(uint32_t); float widen<T>(uint32_t bits)
//   tanh_of(x), sigmoid_of(x), softplus_of(x), expm1_of(x)
//                                                   of float and double, to their own accuracy
//
// and for the host, where 0 is success and any other int is for error_string():
//
//   int launch(const LaunchConfig&, Stream, void (*kernel)(Parameters), const Parameters&)
//   int count_clusters(const LaunchConfig&, void (*kernel)(Parameters), int* count)
//                                  how many clusters of this launch the device runs at once
//   int compiled_capability(void (*kernel)(Parameters), int* capability)
//                                  compute capability, times ten, that the code which the current
//                                  device has loaded of this kernel was compiled for
//   int clear_async(void*, size_t bytes, Stream)
//   int figures_of_current_device(cuda::DeviceFigures*)     asks the driver each time
//   const char* error_string(int)
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan.h"

namespace rnn_cuda::device {

struct alignas(16) Word16 {
  uint32_t word[4];
};

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// A memory barrier that counts arrivals and bytes. Lives in shared memory.
struct alignas(8) Mbarrier {
  uint64_t state;
};

struct LaunchConfig {
  int grid_x = 1, grid_y = 1;
  int block = 32;   // threads
  int cluster = 1;  // blocks, along x
  size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks run at the same time
};

using Stream = void*;  // a cudaStream_t

}  // namespace rnn_cuda::device

#ifdef RNN_CUDA_EMULATED
#include "emulator/device_emulated.h"
#else
#include "device_cuda.h"
#endif

#include "carver.h"

#if defined(__CUDACC__) || defined(RNN_CUDA_EMULATED)
namespace rnn_cuda::device {

__device__ __forceinline__ uint32_t bits_of(bfloat16 value) { return value.bits; }
__device__ __forceinline__ uint32_t bits_of(float16 value) { return value.bits; }

// The number that bits_of() took apart.
template <class T>
__device__ __forceinline__ float widen(uint32_t bits) {
  if constexpr (sizeof(T) == 2)
    return to_float(T{static_cast<uint16_t>(bits)});
  else
    return float_of(bits);
}

}  // namespace rnn_cuda::device
#endif
