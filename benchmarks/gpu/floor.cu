// The floor under a persistent kernel: the same blocks exchange as many words in every time step,
// through the same shared memory, barriers and L2, and compute nothing.
//
//   floor < problems
//
// A line of standard input is a problem and the plan of one pass, such as
//
//   512 32 512 512 1 bfloat16 0 residency=cluster,blocks=8
//
// T B I H directions dtype allow_tf32, and what is decided of the plan; the planner decides the
// rest. For each, a line of output is the seconds of one pass, the median of several, or "error: "
// and why there is none.
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
#include "native/arrays.h"
#include "plan/planner.h"

namespace rnn_cuda {
namespace cuda {
namespace {

// Passes of a round follow one another, so that the card does not wait for the host.
#ifdef RNN_CUDA_EMULATED
constexpr int kRounds = 1, kPasses = 2;
#else
constexpr int kRounds = 7, kPasses = 10;
#endif

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

double seconds_of(const Problem& problem, const Plan& plan, const DeviceFigures& figures) {
  if (plan.residency == Residency::Streamed) throw std::invalid_argument("no persistent kernel");
  const Engine engine = engine_of(problem.dtype, plan.arithmetic, plan.engine_columns);
  const Geometry g = Geometry::of(problem, plan);
  const Workspace workspace = Workspace::of(problem, plan, 0, false);
  check::Array<double> memory(workspace.bytes / 8 + 1, 0);
  check::Array<int64_t> wrong(1, 0);
  wrong.host[0] = 0;
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
  p.counters = reinterpret_cast<uint32_t*>(memory.device()) + workspace.counters / 4;
  p.states = reinterpret_cast<uint32_t*>(memory.device()) + workspace.states / 4;
  p.wrong = reinterpret_cast<uint32_t*>(wrong.device());

  device::LaunchConfig config;
  config.block = plan.threads();
  config.grid_y = problem.directions;
  config.shared_bytes = p.layout.bytes;
  config.cluster = plan.residency == Residency::Cluster ? p.blocks : 1;
  config.cooperative = plan.residency == Residency::Grid;
  // As many teams of a cooperative launch as run at the same time.
  const int64_t teams = std::max<int64_t>(1, figures.multiprocessors / (g.blocks * config.grid_y));
  const int64_t at_once = config.cooperative ? teams : g.batch_tiles;
  const auto counter_bytes =
      static_cast<size_t>(config.grid_y * g.batch_tiles * Workspace::kCounterBytes);
  const auto pass = [&] {
    if (config.cooperative) require(device::clear_async(p.counters, counter_bytes, nullptr));
    for (int64_t tile = 0; tile < g.batch_tiles; tile += at_once) {
      p.first_tile = static_cast<int>(tile);
      config.grid_x = static_cast<int>(std::min(at_once, g.batch_tiles - tile) * g.blocks);
      require(launch_floor(config, plan.residency, p));
    }
  };
  pass();  // loads the kernel
  std::vector<double> seconds;
  for (int round = 0; round < kRounds; ++round) {
    require(check::synchronize());
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kPasses; ++i) pass();
    require(check::synchronize());
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
    seconds.push_back(taken.count() / kPasses);
  }
  wrong.fetch();
  if (wrong.host[0] != 0)
    throw std::runtime_error(std::to_string(wrong.host[0]) + " words were exchanged wrongly");
  std::nth_element(seconds.begin(), seconds.begin() + kRounds / 2, seconds.end());
  return seconds[kRounds / 2];
}

double seconds_of(const std::string& line) {
  std::istringstream words(line);
  Problem problem;
  std::string dtype, decided;
  words >> problem.time_steps >> problem.batch >> problem.input_size >> problem.hidden_size >>
      problem.directions >> dtype >> problem.allow_tf32;
  if (!words) throw std::invalid_argument("expected seven words and a plan");
  words >> decided;
  for (ScalarType known : {ScalarType::Float64, ScalarType::BFloat16, ScalarType::Float16})
    if (dtype == name_of(known)) problem.dtype = known;
  DeviceFigures figures;
  require(device::figures_of_current_device(&figures));
  int capability = 0;
  require(device::compiled_capability(floor_kernel<InCluster>, &capability));
  figures.kernels_major = capability / 10;
  return seconds_of(problem, plan(problem, figures, Override::parse(decided)), figures);
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
