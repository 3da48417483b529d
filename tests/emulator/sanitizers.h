// What the emulator tells AddressSanitizer and ThreadSanitizer, where the program is linked to one.
// The emulator's own sources are compiled without them: one object file serves every build.
#pragma once

#include <cstddef>

extern "C" {
#define RNN_CUDA_WEAK __attribute__((weak))
RNN_CUDA_WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom,
                                                  size_t size);
RNN_CUDA_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom,
                                                   size_t* size);
RNN_CUDA_WEAK void __asan_poison_memory_region(const volatile void* memory, size_t size);
RNN_CUDA_WEAK void __asan_unpoison_memory_region(const volatile void* memory, size_t size);
RNN_CUDA_WEAK void* __tsan_get_current_fiber();
RNN_CUDA_WEAK void* __tsan_create_fiber(unsigned flags);
RNN_CUDA_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
RNN_CUDA_WEAK void __tsan_acquire(void* tag);
RNN_CUDA_WEAK void __tsan_release(void* tag);
RNN_CUDA_WEAK void __tsan_read_range(void* memory, size_t size);
RNN_CUDA_WEAK void __tsan_write_range(void* memory, size_t size);
RNN_CUDA_WEAK void AnnotateIgnoreReadsBegin(const char* file, int line);
RNN_CUDA_WEAK void AnnotateIgnoreReadsEnd(const char* file, int line);
RNN_CUDA_WEAK void AnnotateIgnoreWritesBegin(const char* file, int line);
RNN_CUDA_WEAK void AnnotateIgnoreWritesEnd(const char* file, int line);
#undef RNN_CUDA_WEAK
}

namespace rnn_cuda::emulator {

inline bool under_thread_sanitizer() { return __tsan_create_fiber != nullptr; }

inline void forbid(const void* memory, size_t bytes) {
  if (__asan_poison_memory_region != nullptr) __asan_poison_memory_region(memory, bytes);
}

inline void allow(const void* memory, size_t bytes) {
  if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(memory, bytes);
}

// What happened before released(tag) in any thread has happened for who calls acquired(tag) later.
inline void released(void* tag) {
  if (__tsan_release != nullptr) __tsan_release(tag);
}

inline void acquired(void* tag) {
  if (__tsan_acquire != nullptr) __tsan_acquire(tag);
}

inline void has_read(void* memory, size_t bytes) {
  if (__tsan_read_range != nullptr) __tsan_read_range(memory, bytes);
}

inline void has_written(void* memory, size_t bytes) {
  if (__tsan_write_range != nullptr) __tsan_write_range(memory, bytes);
}

// While one lives, ThreadSanitizer overlooks what libraries do on the emulator's behalf, in this
// fiber. One that is given up must have none, or is reported.
class Unobserved {
 public:
  Unobserved() {
    if (AnnotateIgnoreReadsBegin == nullptr) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unobserved() {
    if (AnnotateIgnoreReadsBegin == nullptr) return;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unobserved(const Unobserved&) = delete;
  Unobserved& operator=(const Unobserved&) = delete;
};

}  // namespace rnn_cuda::emulator
