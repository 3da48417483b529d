// The floor under a persistent kernel: the same blocks exchange as many words in every time step,
// through the same shared memory, barriers and L2, and compute nothing.
//
//   floor < problems
//
// A line of standard input is a problem and the plan of one pass,
//
//   T B I H directions dtype residency arithmetic fuse_input blocks columns engine_columns
//   row_warps depth_split
//
// with dtype, residency and arithmetic as numbers of their enumerations. For each, a line of output
// is the seconds of one pass, the median of several, or "error: " and why there is none.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/engine_table.h"
#include "cuda/exchanges.cuh"
#include "cuda/parameters.cuh"

namespace rnn_cuda {
namespace cuda {
namespace {

constexpr int kRounds = 7;

struct FloorParameters {
  Layout layout;
  int steps, columns, blocks, batch_tiles, first_tile;
  int row_tiles, block_row_tiles, words_per_row_tile, state_words;
  uint32_t* counters;  // as in Workspace
  uint32_t* states;
  uint32_t* wrong;  // words of the last state that are not those published
};

// What a word of a state is, so that the last one can be checked.
__device__ __forceinline__ uint32_t word_of(int step, int column, int word) {
  return static_cast<uint32_t>(step) * 40503u + static_cast<uint32_t>(column) * 4099u +
         static_cast<uint32_t>(word);
}

template <class Exchange>
__device__ __forceinline__ void exchange_words(const FloorParameters& p) {
  const int tile = p.first_tile + static_cast<int>(blockIdx.x) / p.blocks;
  const int rank = static_cast<int>(blockIdx.x) % p.blocks;
  const ExchangeSetup setup =
      exchange_setup(p, p.words_per_row_tile, tile, rank, p.steps, BlockMemory(p.layout));

  Exchange exchange(setup);
  for (int i = threadIdx.x; i < p.columns * setup.shared_pitch; i += blockDim.x)
    exchange.states(0)[i] = 0;
  exchange.begin();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const uint32_t* state = nullptr;
#pragma unroll 1
  for (int step = 0; step < p.steps; ++step) {
    state = exchange.wait(step);
    if (step + 1 < p.steps) {
      for (int column = warp; column < p.columns; column += warps)
        for (int word = setup.first_word + lane; word < setup.first_word + setup.own_words;
             word += 32)
          exchange.publish(column, word, word_of(step + 1, column, word));
    }
    exchange.published();
  }
  uint32_t wrong = 0;
  for (int column = warp; p.steps > 1 && column < p.columns; column += warps)
    for (int word = lane; word < setup.words; word += 32)
      wrong += state[column * setup.shared_pitch + word] != word_of(p.steps - 1, column, word);
  if (wrong != 0) device::add_release(p.wrong, wrong);
  exchange.end();
}

template <class Exchange>
__global__ void __launch_bounds__(kMaxThreads, 1)
    floor_kernel(__grid_constant__ const FloorParameters p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (!Exchange::kCluster)
#endif
  {
    exchange_words<Exchange>(p);
  }
}

// ---- the host's side ----------------------------------------------------------------------------

void require(int error) {
  if (error != 0) throw std::runtime_error(device::error_string(error));
}

#ifdef RNN_CUDA_EMULATED
void* allocate(size_t bytes) { return ::operator new(bytes); }
void release(void* memory) { ::operator delete(memory); }
uint32_t fetch(const uint32_t* word) { return *word; }

// The work is done when launch() returns.
class Stopwatch {
 public:
  void begin() { begun_ = std::chrono::steady_clock::now(); }
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun_).count();
  }

 private:
  std::chrono::steady_clock::time_point begun_;
};
#else
void* allocate(size_t bytes) {
  void* memory = nullptr;
  require(device::checked(cudaMalloc(&memory, bytes)));
  return memory;
}
void release(void* memory) { cudaFree(memory); }
uint32_t fetch(const uint32_t* word) {
  uint32_t value = 0;
  require(device::checked(cudaMemcpy(&value, word, sizeof value, cudaMemcpyDeviceToHost)));
  return value;
}

class Stopwatch {
 public:
  Stopwatch() {
    require(device::checked(cudaEventCreate(&begin_)));
    require(device::checked(cudaEventCreate(&end_)));
  }
  ~Stopwatch() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  void begin() { require(device::checked(cudaEventRecord(begin_))); }
  double seconds() {
    float milliseconds = 0;
    require(device::checked(cudaEventRecord(end_)));
    require(device::checked(cudaEventSynchronize(end_)));
    require(device::checked(cudaEventElapsedTime(&milliseconds, begin_, end_)));
    return 1e-3 * milliseconds;
  }

 private:
  cudaEvent_t begin_, end_;
};
#endif

class Memory {
 public:
  explicit Memory(size_t bytes) : data_(allocate(std::max<size_t>(bytes, 16))) {}
  ~Memory() { release(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  uint32_t* words() const { return static_cast<uint32_t*>(data_); }

 private:
  void* data_;
};

int launch_floor(const device::LaunchConfig& config, Residency residency,
                 const FloorParameters& parameters) {
  switch (residency) {
    case Residency::OneSM:
      return device::launch(config, nullptr, floor_kernel<InBlock>, parameters);
    case Residency::Cluster:
      return device::launch(config, nullptr, floor_kernel<InCluster>, parameters);
    default: return device::launch(config, nullptr, floor_kernel<InGrid>, parameters);
  }
}

double seconds_of(const Problem& problem, const Plan& plan) {
  const Engine engine = engine_of(problem.dtype, plan.arithmetic, plan.engine_columns);
  if (plan.residency == Residency::Streamed || engine.rows == 0)
    throw std::invalid_argument("no persistent kernel");
  const Geometry g = Geometry::of(problem, plan);
  const Workspace workspace = Workspace::of(problem, plan, 0, false);
  FloorParameters p = {};
  p.layout = Layout::of(engine, g, BlockShape::of(plan));
  p.steps = static_cast<int>(problem.time_steps);
  p.columns = plan.columns;
  p.blocks = static_cast<int>(g.blocks);
  p.batch_tiles = static_cast<int>(g.batch_tiles);
  p.row_tiles = static_cast<int>(g.row_tiles);
  p.block_row_tiles = static_cast<int>(g.block_row_tiles);
  p.words_per_row_tile = engine.words_per_row_tile;
  p.state_words = static_cast<int>(g.state_words);
  const Memory memory(static_cast<size_t>(workspace.bytes)), wrong(sizeof(uint32_t));
  p.counters = memory.words() + workspace.counters / 4;
  p.states = memory.words() + workspace.states / 4;
  p.wrong = wrong.words();
  require(device::clear_async(p.wrong, sizeof(uint32_t), nullptr));

  DeviceFigures figures;
  require(device::figures_of_current_device(&figures));
  device::LaunchConfig config;
  config.block = plan.threads();
  config.grid_y = problem.directions;
  config.shared_bytes = p.layout.bytes;
  config.cluster = plan.residency == Residency::Cluster ? p.blocks : 1;
  config.cooperative = plan.residency == Residency::Grid;
  // As many teams of a cooperative launch as run at the same time.
  const int64_t teams = std::max<int64_t>(1, figures.multiprocessors / (g.blocks * config.grid_y));
  const int64_t at_once = config.cooperative ? teams : g.batch_tiles;

  Stopwatch watch;
  std::vector<double> seconds;
  for (int round = 0; round <= kRounds; ++round) {
    const auto counter_bytes =
        static_cast<size_t>(config.grid_y * g.batch_tiles * Workspace::kCounterBytes);
    if (config.cooperative) require(device::clear_async(p.counters, counter_bytes, nullptr));
    watch.begin();
    for (int64_t tile = 0; tile < g.batch_tiles; tile += at_once) {
      p.first_tile = static_cast<int>(tile);
      config.grid_x = static_cast<int>(std::min(at_once, g.batch_tiles - tile) * g.blocks);
      require(launch_floor(config, plan.residency, p));
    }
    const double taken = watch.seconds();
    if (round > 0) seconds.push_back(taken);  // the first one loads the kernel
  }
  if (const uint32_t count = fetch(p.wrong); count != 0)
    throw std::runtime_error(std::to_string(count) + " words were exchanged wrongly");
  std::nth_element(seconds.begin(), seconds.begin() + kRounds / 2, seconds.end());
  return seconds[kRounds / 2];
}

double seconds_of(const std::string& line) {
  std::istringstream words(line);
  Problem problem;
  Plan plan;
  int dtype = 0, residency = 0, arithmetic = 0;
  words >> problem.time_steps >> problem.batch >> problem.input_size >> problem.hidden_size >>
      problem.directions >> dtype >> residency >> arithmetic >> plan.fuse_input >> plan.blocks >>
      plan.columns >> plan.engine_columns >> plan.row_warps >> plan.depth_split;
  if (!words) throw std::invalid_argument("expected 14 numbers");
  problem.dtype = static_cast<ScalarType>(dtype);
  plan.residency = static_cast<Residency>(residency);
  plan.arithmetic = static_cast<Arithmetic>(arithmetic);
  return seconds_of(problem, plan);
}

}  // namespace
}  // namespace cuda
}  // namespace rnn_cuda

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    try {
      std::printf("%.9g\n", rnn_cuda::cuda::seconds_of(line));
    } catch (const std::exception& error) {
      std::printf("error: %s\n", error.what());
    }
    std::fflush(stdout);
  }
}
