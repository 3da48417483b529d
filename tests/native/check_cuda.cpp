// Checks the CUDA kernels against the contract of recurrence.h, without PyTorch: random problems
// under random plans, arrays of exactly the promised size, a naive judge.
//
//   check_cuda [--problems N] [--seed S] [--first N] [--small]
//              [--residency one_sm|cluster|grid|streamed]
//              [--dtype float32|float64|bfloat16|float16]
//
// prints "ok: N problems" and exits 0, or says what differs, in which problem, and exits 1. One
// source for a card, compiled by nvcc, and for the emulator, compiled as C++ with
// RNN_CUDA_EMULATED. There, each problem also draws a schedule and a size of the device, unless the
// environment variables RNN_CUDA_EMULATOR_SCHEDULE and RNN_CUDA_EMULATOR_DEVICE name them.
//
// To be linked with csrc/cuda/*.cu and csrc/plan/{geometry,override}.cpp.
#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>

#include "cuda/device.h"
#include "cuda/walk.h"
#include "plan/planner.h"
#include "problem.h"

namespace check {

using rnn_cuda::cuda::Arithmetic;
using rnn_cuda::cuda::DeviceFigures;
using rnn_cuda::cuda::Engine;
using rnn_cuda::cuda::Geometry;
using rnn_cuda::cuda::kMaxWarps;
using rnn_cuda::cuda::Plan;
using rnn_cuda::cuda::Residency;
using rnn_cuda::cuda::Step;
using rnn_cuda::cuda::Walk;
using Layer = rnn_cuda::cuda::Problem;  // what the planner is asked

struct Options {
  int64_t problems = 100, seed = 0, first = 0;
  bool small = false;
  std::optional<Residency> residency;
  std::optional<ScalarType> dtype;
};

// ---- drawing what to check ----------------------------------------------------------------------

Residency draw_residency(const Options& options, const DeviceFigures& device) {
  if (options.residency) return *options.residency;
  if (options.dtype == ScalarType::Float64) return Residency::Streamed;
  for (;;) {
    const auto residency = static_cast<Residency>(uniform(0, 3));
    if (residency == Residency::Cluster && device.max_cluster_size < 2) continue;
    // Its kernel is simple; few problems will do.
    if (residency == Residency::Streamed && !one_in(4)) continue;
    return residency;
  }
}

ScalarType draw_dtype(const Options& options, Residency residency) {
  if (options.dtype) return *options.dtype;
  for (;;) {
    const auto dtype = static_cast<ScalarType>(uniform(0, 3));
    if (dtype != ScalarType::Float64 || residency == Residency::Streamed) return dtype;
  }
}

Shape draw_shape(const Options& options, Residency residency) {
  Shape shape;
  shape.T = uniform(1, options.small ? 4 : 7);
  shape.B = uniform(1, 11);
  if (one_in(3)) shape.B = uniform(12, options.small ? 17 : 40);
  const bool shared = residency == Residency::Cluster || residency == Residency::Grid;
  shape.H = shared ? uniform(17, options.small ? 80 : 160) : uniform(1, options.small ? 40 : 100);
  if (residency != Residency::Streamed && one_in(2)) shape.I = uniform(1, one_in(3) ? 70 : 20);
  if (!options.small && one_in(8)) shape.T = uniform(20, 40), shape.H = uniform(1, 40);
  if (!options.small && one_in(20)) shape.T = 2, shape.H = uniform(250, 330);
  shape.draw_rows(one_in(2));
  return shape;
}

// Any that the kernels have to be able to run, whether the planner would choose it or not. None, if
// the problem does not seem to fit.
std::optional<Plan> draw_plan(const Options& options, const Layer& layer, Residency residency,
                              const DeviceFigures& device) {
  const int most_warps = options.small ? 4 : kMaxWarps;
  for (int attempt = 0; attempt < 20; ++attempt) {
    Plan plan;
    plan.residency = residency;
    if (layer.dtype != ScalarType::Float32)
      plan.arithmetic = Arithmetic::TensorCore;
    else
      plan.arithmetic = layer.allow_tf32 ? Arithmetic::TensorCoreTF32 : Arithmetic::FMA;
    const bool fma = plan.arithmetic == Arithmetic::FMA;
    plan.engine_columns = one_in(2) ? (fma ? 1 : 8) : (fma ? 4 : 32);
    plan.columns = plan.engine_columns * static_cast<int>(uniform(1, 3));
    plan.fuse_input = layer.input_size > 0;
    const Engine engine =
        rnn_cuda::cuda::engine_of(layer.dtype, plan.arithmetic, plan.engine_columns);
    const int64_t row_tiles = (layer.hidden_size + engine.rows - 1) / engine.rows;
    int64_t most_blocks = 1;
    if (residency == Residency::Cluster) most_blocks = device.max_cluster_size;
    if (residency == Residency::Grid) most_blocks = device.multiprocessors / layer.directions;
    // Often as many as can be: the more blocks, the more ways to share what there is to do.
    most_blocks = std::min(most_blocks, row_tiles);
    plan.blocks = static_cast<int>(one_in(2) ? most_blocks : uniform(1, most_blocks));
    plan.row_warps = static_cast<int>(uniform(1, one_in(2) ? 2 : most_warps));
    plan.depth_split = static_cast<int>(uniform(1, most_warps / plan.row_warps));
    plan.blocks = static_cast<int>(Geometry::of(layer, plan).blocks);
    if (residency == Residency::Cluster && plan.blocks < 2 && row_tiles > 1) continue;
    plan.shared_bytes = shared_bytes_of(layer, plan);
    if (plan.shared_bytes <= device.shared_bytes_per_block) return plan;
  }
  return std::nullopt;
}

// ---- running a problem --------------------------------------------------------------------------

template <class S>
using Directions = std::vector<std::unique_ptr<Problem<S>>>;

void check_launched(int error) {
  if (error == 0) error = synchronize();
  if (error != 0)
    throw std::runtime_error(std::string("launch failed: ") + rnn_cuda::cuda::error_string(error));
}

DeviceFigures current_figures() {
  DeviceFigures figures;
  check_launched(rnn_cuda::cuda::figures_of_current_device(&figures));
  return figures;
}

template <class S>
void run_persistent(Directions<S>& directions, const Layer& layer, const Plan& plan,
                    const DeviceFigures& device) {
  const Shape& shape = directions[0]->shape;
  Walk walk;
  walk.directions = layer.directions;
  walk.total_rows = shape.rows();
  Array<int64_t> sizes(shape.packed() ? shape.T : 0), starts(sizes.count());
  if (shape.packed()) {
    sizes.host = shape.batch_sizes;
    starts.host.assign(shape.first_row.begin(), shape.first_row.end() - 1);
    walk.batch_sizes = sizes.device();
    walk.row_starts = starts.device();
  }
  bool norms = false;
  for (size_t i = 0; i < directions.size(); ++i) {
    walk.direction[i] = directions[i]->r;
    if (directions[i]->wants_norms) walk.norms[i] = directions[i]->norms.device(), norms = true;
  }
  // PyTorch's allocator aligns what it gives to more than a double.
  const int64_t bytes = workspace_of(layer, plan, shape.rows(), norms);
  Array<double> workspace((bytes + 7) / 8, 0);
  walk.workspace = workspace.device();
  check_launched(launch(walk, layer, plan, device, nullptr));

  // Once more, on what the first launch left in the workspace.
  std::vector<std::vector<S>> results;
  for (auto& direction : directions) {
    direction->output.fetch();
    results.push_back(direction->output.host);
    direction->poison();
  }
  check_launched(launch(walk, layer, plan, device, nullptr));
  for (size_t i = 0; i < directions.size(); ++i) {
    directions[i]->output.fetch();
    if (std::memcmp(results[i].data(), directions[i]->output.host.data(),
                    results[i].size() * sizeof(S)) != 0)
      throw std::runtime_error("output differs when the recurrence runs again");
  }
}

// The binding's loop, with products in double for the card's.
template <class S>
void run_streamed(Problem<S>& p) {
  const Shape& shape = p.shape;
  const int64_t H = shape.H;
  std::vector<double> states(static_cast<size_t>(shape.B * H), 0.0);
  for (int64_t i = 0; p.r.initial != nullptr && i < shape.B * H; ++i)
    states[static_cast<size_t>(i)] = p.initial[i];
  rnn_cuda::Recurrence r = p.r;
  // Only whether there are any matters.
  if (shape.packed()) r.batch_sizes = shape.batch_sizes.data();
  for (int64_t visited = 0; visited < shape.T; ++visited) {
    Step step;
    step.t = r.reverse ? shape.T - 1 - visited : visited;
    step.row = shape.row(step.t, 0);
    step.rows = shape.samples(step.t);
    const int64_t later = shape.samples(step.t + 1);
    step.begun = r.reverse ? later : visited == 0 ? 0 : step.rows;
    step.continued = r.reverse ? (step.t == 0 ? 0 : step.rows) : later;
    Array<Compute<S>> z(step.rows * H);
    const bool skips_zero = r.initial == nullptr && !r.multiplies_zero_initial;
    for (int64_t b = 0; b < step.rows; ++b)
      for (int64_t n = 0; n < H; ++n) {
        long double sum = 0;
        for (int64_t k = 0; k < H && (b < step.begun || !skips_zero); ++k)
          sum += p.weight_hidden.at(n, k) * states[static_cast<size_t>(b * H + k)];
        z.host[static_cast<size_t>(b * H + n)] = static_cast<Compute<S>>(sum);
      }
    const bool is_zero = step.begun == 0 && skips_zero && one_in(2);
    check_launched(launch_epilogue(r, step, is_zero ? nullptr : z.device(),
                                   p.wants_norms ? p.norms.device() : nullptr, nullptr));
    p.output.fetch();
    for (int64_t i = 0; i < step.rows * H; ++i)
      states[static_cast<size_t>(i)] = p.output[step.row * H + i];
  }
}

template <class S>
std::string describe(const Directions<S>& directions, const Layer& layer, const Plan& plan) {
  std::ostringstream text;
  text << directions[0]->shape.name() << " directions=" << layer.directions
       << " plan=" << rnn_cuda::cuda::describe(plan);
  for (const auto& direction : directions) text << "\n  " << direction->name();
  return text.str();
}

template <class S>
void check_problem(const Options& options, Residency residency, const DeviceFigures& device) {
  const Shape shape = draw_shape(options, residency);
  Layer layer;
  layer.dtype = kScalarType<S>;
  layer.time_steps = shape.T, layer.batch = shape.B;
  layer.input_size = shape.I, layer.hidden_size = shape.H;
  layer.directions = residency == Residency::Streamed ? 1 : static_cast<int>(uniform(1, 2));
  layer.allow_tf32 = std::is_same_v<S, float> && one_in(2);
  Plan plan;
  if (residency != Residency::Streamed) {
    const std::optional<Plan> drawn = draw_plan(options, layer, residency, device);
    if (!drawn) return check_problem<S>(options, residency, device);
    plan = *drawn;
  }
  const auto kernels =
      plan.arithmetic == Arithmetic::TensorCoreTF32 ? Kernels::CudaTF32 : Kernels::Cuda;
  Directions<S> directions;
  for (int i = 0; i < layer.directions; ++i)
    directions.push_back(std::make_unique<Problem<S>>(shape, any_of(kElmanEpilogues), kernels));
  try {
    if (residency == Residency::Streamed)
      run_streamed(*directions[0]);
    else
      run_persistent(directions, layer, plan, device);
    for (auto& direction : directions) direction->judge();
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string(error.what()) + "\nin the problem " +
                             describe(directions, layer, plan));
  }
}

// ---- the device ---------------------------------------------------------------------------------

#ifdef RNN_CUDA_EMULATED
std::string schedule;

// A small device and, mostly, a schedule drawn for each problem, unless the environment names them.
DeviceFigures draw_device(const Options& options) {
  rnn_cuda::emulator::set_figures(nullptr);
  DeviceFigures figures = current_figures();
  if (std::getenv("RNN_CUDA_EMULATOR_DEVICE") == nullptr) {
    figures.multiprocessors = static_cast<int>(uniform(4, options.small ? 6 : 12));
    figures.max_cluster_size = options.small ? 3 : one_in(2) ? 8 : 4;
    figures.multiprocessors = std::max(figures.multiprocessors, figures.max_cluster_size);
    rnn_cuda::emulator::set_figures(&figures);
  }
  if (std::getenv("RNN_CUDA_EMULATOR_SCHEDULE") != nullptr) return figures;
  const int64_t kind = uniform(0, 3), seed = uniform(0, 999);
  schedule = kind == 0   ? "ascending"
             : kind == 1 ? "descending"
                         : (kind == 2 ? "random:" : "starving:") + std::to_string(seed);
  rnn_cuda::emulator::set_schedule(schedule);
  return figures;
}
#else
const std::string schedule;
DeviceFigures draw_device(const Options&) { return current_figures(); }
#endif

void check_any_problem(const Options& options) {
  const DeviceFigures device = draw_device(options);
  const Residency residency = draw_residency(options, device);
  switch (draw_dtype(options, residency)) {
    case ScalarType::Float32: return check_problem<float>(options, residency, device);
    case ScalarType::Float64: return check_problem<double>(options, residency, device);
    case ScalarType::BFloat16: return check_problem<BFloat16>(options, residency, device);
    case ScalarType::Float16: return check_problem<Float16>(options, residency, device);
  }
}

// ---- the command line ---------------------------------------------------------------------------

template <class E, size_t n>
E named(const std::string& text, const E (&values)[n]) {
  for (const E value : values)
    if (text == rnn_cuda::cuda::name_of(value)) return value;
  throw std::invalid_argument("no such choice: " + text);
}

Options parse(int argc, char** argv) {
  constexpr Residency kResidencies[] = {Residency::OneSM, Residency::Cluster, Residency::Grid,
                                        Residency::Streamed};
  constexpr ScalarType kTypes[] = {ScalarType::Float32, ScalarType::Float64, ScalarType::BFloat16,
                                   ScalarType::Float16};
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--small") {
      options.small = true;
      continue;
    }
    if (i + 1 == argc) throw std::invalid_argument(name + " needs a value");
    const std::string value = argv[++i];
    if (name == "--problems")
      options.problems = std::stoll(value);
    else if (name == "--seed")
      options.seed = std::stoll(value);
    else if (name == "--first")
      options.first = std::stoll(value);
    else if (name == "--residency")
      options.residency = named(value, kResidencies);
    else if (name == "--dtype")
      options.dtype = named(value, kTypes);
    else
      throw std::invalid_argument("no such option: " + name);
  }
  if (options.dtype == ScalarType::Float64 &&
      options.residency.value_or(Residency::Streamed) != Residency::Streamed)
    throw std::invalid_argument("float64 has no persistent kernel");
  return options;
}

}  // namespace check

int main(int argc, char** argv) try {
  using namespace check;
  const Options options = parse(argc, argv);
  const DeviceFigures device = draw_device(options);
  if (options.residency == Residency::Cluster && device.max_cluster_size < 2) {
    std::printf("skipped: this device runs no clusters\n");
    return 0;
  }
  for (int64_t i = options.first; i < options.first + options.problems; ++i) {
    generator.seed(static_cast<uint64_t>(options.seed * 1'000'003 + i));
    try {
      check_any_problem(options);
    } catch (const std::exception& error) {
      std::printf("%s\nnumber %lld of seed %lld %s\n", error.what(), static_cast<long long>(i),
                  static_cast<long long>(options.seed), schedule.c_str());
      return 1;
    }
  }
  std::printf("ok: %lld problems\n", static_cast<long long>(options.problems));
  return 0;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
