// The CUDA face of device.h. Host compilers see its host side only.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#define RNN_CUDA_DEVICE __device__ __forceinline__

#ifdef __CUDACC__

// Waits by polling, as long as it takes: a card that is shared, or that a debugger holds, may stand
// still for longer than any bound. The programs of benchmarks/gpu set one: there a wait of some ten
// seconds is taken for a hang, the kernel traps, and the launch fails, where the card would
// otherwise be lost to everyone.
#ifndef RNN_CUDA_BOUNDED_SPINS
#define RNN_CUDA_SPIN_UNTIL(condition) \
  while (!(condition)) {               \
  }
#else
#define RNN_CUDA_SPIN_UNTIL(condition)                        \
  for (const long long spin_began = clock64(); !(condition);) \
    if (clock64() - spin_began > ::rnn_cuda::device::kLongestSpin) __trap()
#endif

namespace rnn_cuda::device {

constexpr long long kLongestSpin = 1LL << 34;  // clock cycles
constexpr unsigned kFullWarp = 0xffffffffu;

// ---- blocks and warps ---------------------------------------------------------------------------

RNN_CUDA_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char rnn_cuda_shared_memory[];
  return rnn_cuda_shared_memory;
}

RNN_CUDA_DEVICE void sync_block() { __syncthreads(); }
RNN_CUDA_DEVICE bool any_in_block(bool mine) { return __syncthreads_or(mine); }
RNN_CUDA_DEVICE void sync_warp() { __syncwarp(); }
RNN_CUDA_DEVICE bool any_in_warp(bool mine) { return __any_sync(kFullWarp, mine); }

// The same number, of which the compiler knows nothing: what is computed from it in a loop stays in
// the loop, instead of in registers.
RNN_CUDA_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

template <class T>
RNN_CUDA_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kFullWarp, value, mask);
}

// ---- tensor cores -------------------------------------------------------------------------------

#define RNN_CUDA_MMA(name, shape_and_types)                                                  \
  RNN_CUDA_DEVICE void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm("mma.sync.aligned." shape_and_types                                                  \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                   \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                 \
  }
RNN_CUDA_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
RNN_CUDA_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
RNN_CUDA_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef RNN_CUDA_MMA

RNN_CUDA_DEVICE uint32_t round_to_tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}

// ---- clusters -----------------------------------------------------------------------------------
// On targets without them the host never launches a kernel that gets here.

RNN_CUDA_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

#if __CUDA_ARCH__ >= 900

RNN_CUDA_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

RNN_CUDA_DEVICE int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// Not .aligned: after a branch that one thread took, the threads may not be one warp again yet.
RNN_CUDA_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

RNN_CUDA_DEVICE void barrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

RNN_CUDA_DEVICE void barrier_expect(Mbarrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

RNN_CUDA_DEVICE bool barrier_is_past(Mbarrier* barrier, uint32_t parity) {
  uint32_t past;
  asm volatile(
      "{\n"
      ".reg .pred past;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 past, [%1], %2;\n"
      "selp.u32 %0, 1, 0, past;\n"
      "}"
      : "=r"(past)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return past != 0;
}

RNN_CUDA_DEVICE void barrier_wait(Mbarrier* barrier, uint32_t parity) {
  RNN_CUDA_SPIN_UNTIL(barrier_is_past(barrier, parity));
}

RNN_CUDA_DEVICE uint32_t address_in_block(uint32_t address, int rank) {
  uint32_t there;  // not volatile: may be computed once, before a loop
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

RNN_CUDA_DEVICE void store_async(Word16* words, Word16 value, Mbarrier* barrier, int rank) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address_in_block(shared_address(words), rank)),
      "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3]),
      "r"(address_in_block(shared_address(barrier), rank))
      : "memory");
}

RNN_CUDA_DEVICE void store_async(uint32_t* word, uint32_t value, Mbarrier* barrier, int rank) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   address_in_block(shared_address(word), rank)),
               "r"(value), "r"(address_in_block(shared_address(barrier), rank))
               : "memory");
}

#else

RNN_CUDA_DEVICE int cluster_rank() { return 0; }
RNN_CUDA_DEVICE int cluster_size() { return 1; }
RNN_CUDA_DEVICE void cluster_sync() { __trap(); }
RNN_CUDA_DEVICE void barrier_init(Mbarrier*, int) { __trap(); }
RNN_CUDA_DEVICE void barrier_expect(Mbarrier*, uint32_t) { __trap(); }
RNN_CUDA_DEVICE void barrier_wait(Mbarrier*, uint32_t) { __trap(); }
RNN_CUDA_DEVICE void store_async(uint32_t*, uint32_t, Mbarrier*, int) { __trap(); }
RNN_CUDA_DEVICE void store_async(Word16*, Word16, Mbarrier*, int) { __trap(); }

#endif

// ---- exchange through global memory -------------------------------------------------------------
//
// Volatile, so that none of these moves across another; "memory", so that none moves across a
// barrier, in the name of which others wait.

RNN_CUDA_DEVICE uint32_t load_acquire(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

RNN_CUDA_DEVICE void add_release(uint32_t* to, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

RNN_CUDA_DEVICE uint32_t load_shared_by_gpu(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

RNN_CUDA_DEVICE Word16 load_shared_by_gpu(const Word16* from) {
  Word16 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "l"(from)
               : "memory");
  return value;
}

RNN_CUDA_DEVICE void store_shared_by_gpu(uint32_t* to, uint32_t value) {
  asm volatile("st.global.cg.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

RNN_CUDA_DEVICE void store_shared_by_gpu(Word16* to, Word16 value) {
  asm volatile("st.global.cg.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.word[0]),
               "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
               : "memory");
}

// ---- numbers ------------------------------------------------------------------------------------

RNN_CUDA_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
RNN_CUDA_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

RNN_CUDA_DEVICE float to_float(float value) { return value; }
RNN_CUDA_DEVICE double to_float(double value) { return value; }
RNN_CUDA_DEVICE float to_float(bfloat16 value) { return float_of(uint32_t(value.bits) << 16); }
RNN_CUDA_DEVICE float to_float(float16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

template <class T>
RNN_CUDA_DEVICE T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    T narrow;
    if constexpr (std::is_same_v<T, bfloat16>) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    } else {
      static_assert(std::is_same_v<T, float16>);
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    }
    return narrow;
  }
}

template <class T>
RNN_CUDA_DEVICE T from_float(double value) {
  static_assert(std::is_same_v<T, double>);
  return value;
}

template <class T>
RNN_CUDA_DEVICE uint32_t pack(T low, T high) {
  static_assert(sizeof(T) == 2);
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}

RNN_CUDA_DEVICE float tanh_of(float x) { return tanhf(x); }
RNN_CUDA_DEVICE double tanh_of(double x) { return tanh(x); }
RNN_CUDA_DEVICE float sigmoid_of(float x) { return 1.0f / (1.0f + expf(-x)); }
RNN_CUDA_DEVICE double sigmoid_of(double x) { return 1.0 / (1.0 + exp(-x)); }
// Not fmaxf(x, 0): a NaN stays one.
RNN_CUDA_DEVICE float softplus_of(float x) { return (x < 0 ? 0 : x) + log1pf(expf(-fabsf(x))); }
RNN_CUDA_DEVICE double softplus_of(double x) { return (x < 0 ? 0 : x) + log1p(exp(-fabs(x))); }
RNN_CUDA_DEVICE float expm1_of(float x) { return expm1f(x); }
RNN_CUDA_DEVICE double expm1_of(double x) { return expm1(x); }

}  // namespace rnn_cuda::device

#endif  // __CUDACC__

#undef RNN_CUDA_DEVICE

// ---- the host's side ----------------------------------------------------------------------------

namespace rnn_cuda::device {

inline const char* error_string(int code) {
  if (code == cudaErrorNoKernelImageForDevice)
    return "the kernels were not compiled for this device; TORCH_CUDA_ARCH_LIST names the compute "
           "capabilities to compile for (python -m rnn_cuda.build --info shows those in use)";
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

// Clears the error that it returns, so that it is not taken for a later call's.
inline int checked(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

// What one kernel has to be allowed beyond what any kernel may. Always the most that there is: two
// threads of the host that launch it by different plans would take it from each other.
inline cudaError_t allow(const void* function, const LaunchConfig& config) {
  constexpr size_t kSharedBytesOfAnyKernel = 48 * 1024;
  constexpr int kClusterOfAnyKernel = 8;
  cudaError_t error = cudaSuccess;
  if (config.shared_bytes > kSharedBytesOfAnyKernel) {
    int device = 0, most = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (error == cudaSuccess && config.cluster > kClusterOfAnyKernel)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error;
}

// A LaunchConfig as the runtime takes it, with what that points to.
class RuntimeConfig {
 public:
  RuntimeConfig(const LaunchConfig& config, Stream stream) {
    if (config.cluster > 1) {
      cudaLaunchAttribute& cluster = add(cudaLaunchAttributeClusterDimension);
      cluster.val.clusterDim.x = static_cast<unsigned>(config.cluster);
      cluster.val.clusterDim.y = 1;
      cluster.val.clusterDim.z = 1;
    }
    if (config.cooperative) add(cudaLaunchAttributeCooperative).val.cooperative = 1;
    config_.gridDim =
        dim3(static_cast<unsigned>(config.grid_x), static_cast<unsigned>(config.grid_y));
    config_.blockDim = dim3(static_cast<unsigned>(config.block));
    config_.dynamicSmemBytes = config.shared_bytes;
    config_.stream = static_cast<cudaStream_t>(stream);
    config_.attrs = attributes_;
  }
  RuntimeConfig(const RuntimeConfig&) = delete;
  RuntimeConfig& operator=(const RuntimeConfig&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchAttribute& add(cudaLaunchAttributeID id) {
    cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
    attribute.id = id;
    return attribute;
  }

  cudaLaunchConfig_t config_ = {};
  cudaLaunchAttribute attributes_[2] = {};
};

template <class Parameters>
int launch(const LaunchConfig& config, Stream stream, void (*kernel)(Parameters),
           const Parameters& parameters) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t error = allow(function, config); error != cudaSuccess)
    return checked(error);
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  return checked(cudaLaunchKernelExC(RuntimeConfig(config, stream).get(), function, arguments));
}

template <class Parameters>
int count_clusters(const LaunchConfig& config, void (*kernel)(Parameters), int* count) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t error = allow(function, config); error != cudaSuccess)
    return checked(error);
  return checked(
      cudaOccupancyMaxActiveClusters(count, function, RuntimeConfig(config, nullptr).get()));
}

// Of the code that the current device has loaded: its own machine code, or PTX of an older device.
template <class Parameters>
int compiled_capability(void (*kernel)(Parameters), int* capability) {
  cudaFuncAttributes attributes = {};
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  *capability = attributes.ptxVersion;
  return checked(error);
}

inline int clear_async(void* memory, size_t bytes, Stream stream) {
  return checked(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)));
}

inline int figures_of_current_device(cuda::DeviceFigures* figures) {
  int device = 0;
  if (const int error = checked(cudaGetDevice(&device)); error != 0) return error;
  cudaError_t failure = cudaSuccess;
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
    if (error != cudaSuccess) failure = error;
    return value;
  };
  cuda::DeviceFigures f;
  f.capability_major = ask(cudaDevAttrComputeCapabilityMajor);
  f.capability_minor = ask(cudaDevAttrComputeCapabilityMinor);
  f.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  f.shared_bytes_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  f.l2_bytes = ask(cudaDevAttrL2CacheSize);
  // Clusters of 8 are portable; data centre cards of 9.0 and 10.x take 16.
  const bool sixteen = f.capability_major == 9 || f.capability_major == 10;
  f.max_cluster_size = ask(cudaDevAttrClusterLaunch) == 0 ? 0 : sixteen ? 16 : 8;
  if (failure == cudaSuccess) *figures = f;
  return checked(failure);
}

}  // namespace rnn_cuda::device
