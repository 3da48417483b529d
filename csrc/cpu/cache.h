// What caches should hold: lines to come, and results that would only be in the way.
#pragma once

#include <cstdint>

#include "vector.h"

namespace rnn_cuda::cpu {

constexpr int64_t kCacheLineBytes = 64;

// Asks for the cache line of an address that will be read, in the second-level cache (the first is
// too small for what the next step reads beside what this one does); or written. In assembler where
// that is known: GCC takes a function that does nothing but __builtin_prefetch for one without
// effect, and drops the calls.
inline void prefetch_to_read(const void* address) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(address)));
#else
  __builtin_prefetch(address, 0, 2);
#endif
}

inline void prefetch_to_write(const void* address) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(address)));
#else
  __builtin_prefetch(address, 1);
#endif
}

// Writes a whole cache line past the caches, to an address of whole lines; to be followed by
// `finish_streaming` before another thread may read. Narrower vectors go the usual way: with halves
// of a line, nothing was won.
#if defined(__AVX512F__)
constexpr bool kCanStream = true;
template <class T>
inline void store_streaming(T* to, Vec<T> v) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bit_cast<__m512i>(v));
}
inline void finish_streaming() { _mm_sfence(); }
#else
constexpr bool kCanStream = false;
template <class T>
inline void store_streaming(T* to, Vec<T> v) {
  store<T>(to, v);
}
inline void finish_streaming() {}
#endif

// Results of so many bytes are not in the near caches any more when they are read again.
constexpr int64_t kStreamedBytes = 4 << 20;

// Whether contiguous rows should be written past the caches, which are full of better things; that
// takes rows of whole cache lines.
template <class Storage>
bool is_better_streamed(const Storage* data, int64_t rows, int64_t columns) {
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(Storage));
  return kCanStream && rows * row_bytes >= kStreamedBytes && row_bytes % kCacheLineBytes == 0 &&
         reinterpret_cast<uintptr_t>(data) % kCacheLineBytes == 0;
}

}  // namespace rnn_cuda::cpu
