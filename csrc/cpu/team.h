// A team of threads that walk the same loop, and the barrier they meet at once per time step.
#pragma once

#include <atomic>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace rnn_cuda::cpu {

// Spins: a time step is shorter than putting a thread to sleep. Where there are fewer cores than
// threads, the one waited for needs ours, so give it up after a while.
class SpinBarrier {
 public:
  // Returns once `size` threads have called it.
  void wait(int size) {
    if (size == 1) return;
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    int spins = 0;
    while (phase_.load(std::memory_order_acquire) == phase) {
      if (spins < kSpinsBeforeYield)
        ++spins;
      else
        std::this_thread::yield();
    }
  }

 private:
  static constexpr int kSpinsBeforeYield = 1 << 14;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
};

// Calls body(thread) on each of `wanted` threads. Where the system gives fewer, nothing is called.
// Returns how many there were.
template <class Body>
int run_team(int wanted, const Body& body) {
#ifdef _OPENMP
  if (wanted > 1) {
    int came = 0;
#pragma omp parallel num_threads(wanted)
    {
      if (omp_get_thread_num() == 0) came = omp_get_num_threads();
      if (omp_get_num_threads() == wanted) body(omp_get_thread_num());
    }
    return came;
  }
#endif
  if (wanted == 1) body(0);
  return 1;
}

}  // namespace rnn_cuda::cpu
