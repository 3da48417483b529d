// Runs CUDA kernels on a CPU: every thread of a block is a fiber, and one schedule, which can be
// chosen, decides which of them runs next. It is there to find defects without a card, not for
// speed. device_emulated.h turns the primitives of csrc/cuda/device.h into calls of these.
//
// What it models: dynamic shared memory, block and warp barriers, shuffles, votes, clusters with
// memory barriers and asynchronous stores, tensor core fragments, cooperative grids. What it does
// not: weak memory (all threads see all writes at once), bank conflicts, registers, time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "cuda/plan.h"

namespace rnn_cuda {

namespace device {
struct LaunchConfig;
struct Mbarrier;
}  // namespace device

namespace emulator {

// Where a kernel calls a primitive.
struct Site {
  const char* primitive;
  const char* file;
  int line;
};

// As a default argument: the site of the call that it completes.
inline Site here(const char* primitive, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  return {primitive, file, line};
}

// ---- for kernels: of the thread that runs -------------------------------------------------------

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

struct Place {
  Index3 thread, block;
};

extern const Place* current_place;
extern Index3 block_size, grid_size;

char* shared_memory();

void sync_block(const Site& site);
bool any_in_block(bool mine, const Site& site);
void sync_warp(const Site& site);
bool any_in_warp(bool mine, const Site& site);
uint32_t shuffle_xor(uint32_t value, int mask, const Site& site);
uint64_t shuffle_xor(uint64_t value, int mask, const Site& site);

enum class Fragments { BFloat16, Float16, TF32 };
void multiply_add(Fragments type, float* d, const uint32_t* a, const uint32_t* b, const Site& site);

int cluster_rank();
int cluster_size();
void cluster_sync(const Site& site);

void barrier_init(device::Mbarrier* barrier, int arrivals, const Site& site);
void barrier_expect(device::Mbarrier* barrier, uint32_t bytes, const Site& site);
void barrier_wait(device::Mbarrier* barrier, uint32_t parity, const Site& site);
// One word, or four at a place aligned to 16 bytes; each of them lands for itself.
void store_async(uint32_t* to, const uint32_t* words, int count, device::Mbarrier* barrier,
                 int rank, const Site& site);

// Lets others run until one of them has changed what a spin may wait for; told by announce().
void spin(const Site& site);
void announce();

// Ends the launch with an error.
[[noreturn]] void fail(const std::string& what, const Site& site);

// ---- for the host -------------------------------------------------------------------------------

// 0, or a code for error_string(). `body` calls the kernel, once in each thread.
int launch(const device::LaunchConfig& config, const void* kernel,
           const std::function<void()>& body);
const char* error_string(int code);
int64_t launch_count();  // so far, those that failed included

// "ascending", "descending", "random:SEED" or "starving:SEED"; "" for what the environment variable
// RNN_CUDA_EMULATOR_SCHEDULE says, or ascending. Throws std::invalid_argument.
void set_schedule(const std::string& schedule);

// The card that is made up; null for what the environment variable RNN_CUDA_EMULATOR_DEVICE says,
// for instance "multiprocessors=8,capability=9.0", an H100 where it says nothing.
void set_figures(const cuda::DeviceFigures* figures);
int get_figures(cuda::DeviceFigures* figures);  // 0 or an error code

// How many clusters of that size fit its multiprocessors at once; 0 or an error code.
int count_clusters(int size, int* count);

}  // namespace emulator
}  // namespace rnn_cuda
