// The face of csrc/cuda/device.h that runs on a CPU, on the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator.h"
#include "numbers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::rnn_cuda::emulator::current_place->thread)
#define blockIdx (::rnn_cuda::emulator::current_place->block)
#define blockDim (::rnn_cuda::emulator::block_size)
#define gridDim (::rnn_cuda::emulator::grid_size)

using std::max;
using std::min;

#define RNN_CUDA_SPIN_UNTIL(condition)            \
  while (!(condition))                            \
  ::rnn_cuda::emulator::spin(                     \
      ::rnn_cuda::emulator::here("RNN_CUDA_SPIN_" \
                                 "UNTIL"))

namespace rnn_cuda::device {

using emulator::here;
using emulator::Site;

// ---- blocks and warps ---------------------------------------------------------------------------

inline char* shared_memory() { return emulator::shared_memory(); }

inline void sync_block(Site site = here("sync_block")) { emulator::sync_block(site); }
inline bool any_in_block(bool mine, Site site = here("any_in_block")) {
  return emulator::any_in_block(mine, site);
}
inline void sync_warp(Site site = here("sync_warp")) { emulator::sync_warp(site); }
inline bool any_in_warp(bool mine, Site site = here("any_in_warp")) {
  return emulator::any_in_warp(mine, site);
}

inline int opaque(int value) { return value; }

template <class T>
T shuffle_xor(T value, int mask, Site site = here("shuffle_xor")) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static_assert(sizeof(T) == sizeof(Bits) && std::is_arithmetic_v<T>);
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = emulator::shuffle_xor(bits, mask, site);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// ---- tensor cores -------------------------------------------------------------------------------

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     Site site = here("mma_bf16")) {
  emulator::multiply_add(emulator::Fragments::BFloat16, d, a, b, site);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    Site site = here("mma_f16")) {
  emulator::multiply_add(emulator::Fragments::Float16, d, a, b, site);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     Site site = here("mma_tf32")) {
  emulator::multiply_add(emulator::Fragments::TF32, d, a, b, site);
}

// ---- clusters -----------------------------------------------------------------------------------

inline int cluster_rank() { return emulator::cluster_rank(); }
inline int cluster_size() { return emulator::cluster_size(); }
inline void cluster_sync(Site site = here("cluster_sync")) { emulator::cluster_sync(site); }

inline void barrier_init(Mbarrier* barrier, int arrivals, Site site = here("barrier_init")) {
  emulator::barrier_init(barrier, arrivals, site);
}
inline void barrier_expect(Mbarrier* barrier, uint32_t bytes, Site site = here("barrier_expect")) {
  emulator::barrier_expect(barrier, bytes, site);
}
inline void barrier_wait(Mbarrier* barrier, uint32_t parity, Site site = here("barrier_wait")) {
  emulator::barrier_wait(barrier, parity, site);
}
inline void store_async(uint32_t* word, uint32_t value, Mbarrier* barrier, int rank,
                        Site site = here("store_async")) {
  emulator::store_async(word, &value, 1, barrier, rank, site);
}
inline void store_async(Word16* words, Word16 value, Mbarrier* barrier, int rank,
                        Site site = here("store_async")) {
  emulator::store_async(words->word, value.word, 4, barrier, rank, site);
}

// ---- exchange through global memory -------------------------------------------------------------
// Real atomics, so that ThreadSanitizer knows what they order; there is one OS thread only.

inline uint32_t load_acquire(const uint32_t* from) {
  return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}

inline void add_release(uint32_t* to, uint32_t value) {
  __atomic_fetch_add(to, value, __ATOMIC_RELEASE);
  emulator::announce();
}

template <class T>
void require_aligned(const T* p, const Site& site) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0)
    emulator::fail("an access that is not aligned to its size", site);
}

template <class T>
T load_shared_by_gpu(const T* from, Site site = here("load_shared_by_gpu")) {
  require_aligned(from, site);
  return *from;
}

template <class T>
void store_shared_by_gpu(T* to, const std::common_type_t<T>& value,
                         Site site = here("store_shared_by_gpu")) {
  require_aligned(to, site);
  *to = value;
  emulator::announce();
}

// ---- numbers ------------------------------------------------------------------------------------

using emulator::bits_of;
using emulator::float_of;

inline uint32_t round_to_tf32(float value) { return emulator::tf32_of(value); }

inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }
inline float to_float(bfloat16 value) { return emulator::float_of_bfloat16(value.bits); }
inline float to_float(float16 value) { return emulator::float_of_float16(value.bits); }

template <class T>
T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return {emulator::bfloat16_of(value)};
  } else {
    static_assert(std::is_same_v<T, float16>);
    return {emulator::float16_of(value)};
  }
}

template <class T>
T from_float(double value) {
  static_assert(std::is_same_v<T, double>);
  return value;
}

template <class T>
uint32_t pack(T low, T high) {
  static_assert(sizeof(T) == 2);
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}

inline float tanh_of(float x) { return std::tanh(x); }
inline double tanh_of(double x) { return std::tanh(x); }
inline float sigmoid_of(float x) { return 1.0f / (1.0f + std::exp(-x)); }
inline double sigmoid_of(double x) { return 1.0 / (1.0 + std::exp(-x)); }
template <class T>
T softplus_of(T x) {
  return (x < 0 ? 0 : x) + std::log1p(std::exp(-std::abs(x)));
}
template <class T>
T expm1_of(T x) {
  return std::expm1(x);
}

// ---- the host's side ----------------------------------------------------------------------------

inline const char* error_string(int code) { return emulator::error_string(code); }

// Each thread gets its own copy of the parameters, as on a card.
template <class Parameters>
int launch(const LaunchConfig& config, Stream, void (*kernel)(Parameters),
           const Parameters& parameters) {
  return emulator::launch(config, reinterpret_cast<const void*>(kernel),
                          [&] { kernel(parameters); });
}

template <class Parameters>
int count_clusters(const LaunchConfig& config, void (*)(Parameters), int* count) {
  return emulator::count_clusters(config.cluster, count);
}

template <class Parameters>
int compiled_capability(void (*)(Parameters), int* capability) {
  cuda::DeviceFigures figures;
  const int error = emulator::get_figures(&figures);
  *capability = 10 * figures.kernels_major + figures.kernels_minor;
  return error;
}

inline int clear_async(void* memory, size_t bytes, Stream) {
  std::memset(memory, 0, bytes);
  return 0;
}

inline int figures_of_current_device(cuda::DeviceFigures* figures) {
  return emulator::get_figures(figures);
}

}  // namespace rnn_cuda::device
