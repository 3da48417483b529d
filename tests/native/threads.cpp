// A stand-in for GNU's OpenMP runtime: what g++ calls for `#pragma omp parallel`, on std::thread.
//
// ThreadSanitizer does not see how libgomp's threads wait for each other and reports races that
// are none; std::thread it understands. And this runtime can be short of threads.
#include "threads.h"

#include <algorithm>
#include <thread>
#include <vector>

namespace check {

int available_threads = 1;

namespace {
thread_local int thread_number = 0;
thread_local int team_size = 1;
}  // namespace

extern "C" {

int omp_get_thread_num() { return thread_number; }
int omp_get_num_threads() { return team_size; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned wanted, unsigned /*flags*/) {
  const int size = std::min(static_cast<int>(wanted), available_threads);
  const auto run = [=](int number) {
    thread_number = number;
    team_size = size;
    body(data);
    thread_number = 0;
    team_size = 1;
  };
  std::vector<std::thread> others;
  for (int number = 1; number < size; ++number) others.emplace_back(run, number);
  run(0);
  for (std::thread& other : others) other.join();
}

}  // extern "C"

}  // namespace check
