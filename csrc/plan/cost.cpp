#include "cost.h"

#include <algorithm>

#include "cuda/engine_table.h"
#include "cuda/layout.h"

namespace rnn_cuda {
namespace cuda {
namespace {

// Published for H100-class cards (sources: docs/cuda.md), not measured here.
constexpr double kCyclesPerUs = 1700;
constexpr double kSharedBytesPerCycle = 128;  // of one multiprocessor
constexpr double kSharedLatency = 29;         // cycles, as all latencies here
constexpr double kTensorLatency = 24;         // of an m16n8k16 product
constexpr double kTensorIssue = 8;            // between two of them on one scheduler
constexpr double kSchedulers = 4;             // of a multiprocessor
constexpr double kClusterExchangeUs = 0.3;    // between 0.2 and 0.6: sources conflict
constexpr double kClusterBytesPerUs = 29000;  // that a multiprocessor sends
constexpr double kGridExchangeUs = 1.2;       // barrier through L2
constexpr double kL2LatencyUs = 260 / kCyclesPerUs;

// Assumptions, of the right order.
constexpr double kL2BytesPerUs = 40000;  // that one multiprocessor reads
constexpr double kAllL2BytesPerUs = 5e6, kMemoryBytesPerUs = 2.5e6;
constexpr double kBlockBarrier = 40;
constexpr double kShuffle = 25;
constexpr double kEpilogue = 100, kEpilogueIssuePerValue = 20;
constexpr double kLaunchUs = 3;
constexpr double kStreamedLaunchesUs = 8;         // of a step: two, and the operators around them
constexpr double kFlopPerUs[] = {4e7, 4e8, 2e8};  // large products; by Arithmetic
constexpr double kFloat64FlopPerUs = 2e7;
constexpr int kThreadsPerMultiprocessor = kMaxThreads;  // at the registers that a kernel may take

int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float64: return 8;
    case ScalarType::Float32: return 4;
    default: return 2;
  }
}

double flop_per_us(const Problem& problem, const Plan& plan) {
  if (problem.dtype == ScalarType::Float64) return kFloat64FlopPerUs;
  return kFlopPerUs[static_cast<int>(plan.arithmetic)];
}

// W x_t for all t by one product, and its way through memory. No such pass where it is fused.
double input_product_us(const Problem& problem, const Plan& plan) {
  if (plan.fuse_input || problem.input_size == 0) return 0;
  const double rows = double(problem.time_steps) * problem.batch * problem.directions;
  const double flop = 2 * rows * problem.hidden_size * problem.input_size;
  const double bytes =
      2 * rows * problem.hidden_size * std::max<int64_t>(bytes_of(problem.dtype), 4);
  return kLaunchUs + std::max(flop / flop_per_us(problem, plan), bytes / kMemoryBytesPerUs);
}

// Cycles in which one warp, or all warps of a block, multiply so many tiles each a step.
struct Work {
  double issue = 0;    // of one scheduler
  double shared = 0;   // of shared memory, which all warps read
  double latency = 0;  // of one warp, product after product

  double cycles() const { return std::max({issue, shared, latency}); }
};

Work work_of(const Engine& engine, const Plan& plan, double tiles, double shared_tiles) {
  const double columns = plan.engine_columns;
  const double warps = plan.row_warps * plan.depth_split;
  Work work;
  double issue = 0;
  if (plan.arithmetic == Arithmetic::FMA) {
    issue = columns * (engine.rows + 1);
    work.latency = tiles * issue;
  } else {
    const double depth_bytes = engine.words_per_depth_tile * 4;  // k16 of halves, k8 of TF32
    const double products = engine.rows / 16.0 * (columns / 8) * (depth_bytes / 32);
    issue = products * (kTensorIssue + 2);
    work.latency = tiles * std::max(kTensorLatency, issue);
  }
  // A scheduler's warps in turn: the most loaded one counts.
  const double warps_per_scheduler = (warps + kSchedulers - 1) / kSchedulers;
  work.issue = std::max(1.0, double(int64_t(warps_per_scheduler))) *
               (tiles * issue + shared_tiles * (engine.weight_bytes / 512.0));
  work.shared =
      warps *
      (tiles * engine.words_per_depth_tile * 4 * columns + shared_tiles * engine.weight_bytes) /
      kSharedBytesPerCycle;
  return work;
}

Estimate streamed(const Problem& problem, const DeviceFigures& device, const Plan& plan) {
  const double matrix = double(problem.hidden_size) * problem.hidden_size * bytes_of(problem.dtype);
  const double rate = matrix < 0.8 * device.l2_bytes ? kAllL2BytesPerUs : kMemoryBytesPerUs;
  const double flop = 2.0 * problem.batch * problem.hidden_size * problem.hidden_size;
  const double product = std::max(matrix / rate, flop / flop_per_us(problem, plan));
  Estimate e;
  e.passes = 1;
  e.step_us = problem.directions * std::max(kStreamedLaunchesUs, product + kLaunchUs);
  e.total_us = input_product_us(problem, plan) + problem.time_steps * e.step_us;
  return e;
}

}  // namespace

Estimate estimate(const Problem& problem, const DeviceFigures& device, const Plan& plan) {
  if (plan.residency == Residency::Streamed) return streamed(problem, device, plan);
  const Engine engine = engine_of(problem.dtype, plan.arithmetic, plan.engine_columns);
  const Geometry g = Geometry::of(problem, plan);
  const Layout layout = Layout::of(engine, g, BlockShape::of(plan));

  // Blocks that run at once. Those of a cooperative launch have a multiprocessor each.
  const int64_t per_multiprocessor =
      plan.residency == Residency::Grid
          ? 1
          : std::max<int64_t>(
                1, std::min(kThreadsPerMultiprocessor / plan.threads(),
                            int((device.shared_bytes_per_block + 1024) / (layout.bytes + 1024))));
  const int64_t teams = g.batch_tiles * problem.directions;
  const int64_t at_once =
      std::max<int64_t>(1, int64_t(device.multiprocessors) * per_multiprocessor / g.blocks);
  const double sharing = double(std::min(teams, at_once)) * g.blocks / device.multiprocessors;

  const double groups = double(plan.columns) / plan.engine_columns;
  const double rounds = double(g.row_rounds) * groups;
  const double held = std::min<double>(engine.held_tiles, g.state_slice);
  const double state_tiles = rounds * g.state_slice;
  const Work state =
      work_of(engine, plan, state_tiles, groups * (g.row_rounds * g.state_slice - held));
  const double input_tiles = rounds * g.input_slice;
  const Work input = work_of(engine, plan, input_tiles, input_tiles);

  // From the last product to the state's publication.
  double after = kSharedLatency + kBlockBarrier;
  const double lane_sums = plan.arithmetic == Arithmetic::FMA ? 5 : 0;  // a tree over 32 lanes
  after += rounds * (lane_sums * (kShuffle + plan.engine_columns) + kEpilogue +
                     layout.sums_per_lane * kEpilogueIssuePerValue);
  if (plan.depth_split > 1)
    after += rounds * (2 * kBlockBarrier + kSharedLatency +
                       (plan.depth_split - 1) * layout.sums_per_lane * 2.0);

  // What a block sends, and what it waits for; the input's product needs no state and fills the
  // wait.
  double exchange = 0;
  const double words = double(plan.columns) * g.state_words;
  if (plan.residency == Residency::Cluster)
    exchange = kClusterExchangeUs + words * 4 * (g.blocks - 1) / g.blocks / kClusterBytesPerUs;
  if (plan.residency == Residency::Grid)
    exchange = kGridExchangeUs + kL2LatencyUs + words * 4 / kL2BytesPerUs;
  const double hidden_behind_exchange = std::min(exchange, input.cycles() / kCyclesPerUs);
  const double alone =
      exchange + (state.cycles() + input.cycles() + after) / kCyclesPerUs - hidden_behind_exchange;
  // Blocks that share a multiprocessor share its arithmetic and its shared memory.
  const double shared_out =
      std::max(1.0, sharing) *
      (std::max(state.issue, state.shared) + std::max(input.issue, input.shared)) / kCyclesPerUs;

  Estimate e;
  e.passes = (teams + at_once - 1) / at_once;
  e.step_us = std::max(alone, shared_out);
  const double matrix = double(problem.hidden_size) *
                        (problem.hidden_size + (plan.fuse_input ? problem.input_size : 0)) *
                        bytes_of(problem.dtype);
  const double load = kL2LatencyUs + matrix / g.blocks / kL2BytesPerUs;
  const double launches = plan.residency == Residency::Grid ? double(e.passes) : 1;
  e.total_us = input_product_us(problem, plan) + launches * kLaunchUs +
               e.passes * (load + problem.time_steps * e.step_us);
  return e;
}

}  // namespace cuda
}  // namespace rnn_cuda
