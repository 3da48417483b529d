#include "planner.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "cuda/walk.h"

namespace rnn_cuda {
namespace cuda {
namespace {

using Numbers = std::vector<int>;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The decided value alone, else those to try.
template <class T>
std::vector<T> either(const std::optional<T>& decided, std::vector<T> options) {
  return decided ? std::vector<T>{*decided} : std::move(options);
}

std::vector<Arithmetic> arithmetics(const Problem& problem) {
  switch (problem.dtype) {
    case ScalarType::BFloat16:
    case ScalarType::Float16: return {Arithmetic::TensorCore};
    case ScalarType::Float32:
      if (problem.allow_tf32) return {Arithmetic::FMA, Arithmetic::TensorCoreTF32};
      return {Arithmetic::FMA};
    default: return {Arithmetic::FMA};
  }
}

Numbers engine_columns(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::FMA ? Numbers{1, 4} : Numbers{8, 32};
}

// Tiles of samples, none with an engine's worth of columns beyond the batch.
Numbers columns(int engine_columns, int64_t batch) {
  Numbers options;
  for (int n = engine_columns; n <= 8 * engine_columns; n *= 2)
    if (options.empty() || n - engine_columns < batch) options.push_back(n);
  return options;
}

// Numbers of blocks that share a batch tile: only those that leave no block without rows.
Numbers blocks(Residency residency, const DeviceFigures& device, int directions,
               int64_t row_tiles) {
  if (residency == Residency::OneSM) return {1};
  Numbers options;
  const auto is_even = [&](int64_t n) {
    return n >= 2 && ceil_div(row_tiles, ceil_div(row_tiles, n)) == n;
  };
  if (residency == Residency::Cluster) {
    // Powers of two: what a cluster of another size costs is not published.
    for (int n = 2; n <= device.max_cluster_size; n *= 2)
      if (is_even(n)) options.push_back(n);
    return options;
  }
  const int64_t most = device.multiprocessors / directions;
  for (int64_t tiles = std::max<int64_t>(1, ceil_div(row_tiles, std::max<int64_t>(most, 1)));
       tiles <= row_tiles && options.size() < 8; ++tiles)
    if (const int64_t n = ceil_div(row_tiles, tiles);
        is_even(n) && (options.empty() || options.back() != n))
      options.push_back(static_cast<int>(n));
  return options;
}

Numbers row_warps(int64_t block_row_tiles) {
  Numbers options;
  for (int64_t n : {int64_t{1}, int64_t{2}, int64_t{4}, int64_t{8}, block_row_tiles,
                    ceil_div(block_row_tiles, 2)})
    if (n <= std::min<int64_t>(block_row_tiles, kMaxWarps) &&
        std::find(options.begin(), options.end(), n) == options.end())
      options.push_back(static_cast<int>(n));
  return options;
}

// Cuts of the sum over k in which every warp has a part.
Numbers depth_splits(int64_t depth, int warps) {
  Numbers options = {1};
  for (int n = 2; n <= warps; n *= 2)
    if ((n - 1) * ceil_div(depth, n) < depth) options.push_back(n);
  return options;
}

int64_t row_tiles(const Problem& problem, const Plan& plan) {
  return ceil_div(problem.hidden_size,
                  engine_of(problem.dtype, plan.arithmetic, plan.engine_columns).rows);
}

// Whether the kernels could run the plan if a block had shared memory without limit.
bool is_consistent(const Problem& problem, const DeviceFigures& device, const Plan& plan) {
  if (plan.columns % plan.engine_columns != 0 || plan.row_warps * plan.depth_split > kMaxWarps ||
      Geometry::of(problem, plan).blocks != plan.blocks)
    return false;
  switch (plan.residency) {
    case Residency::OneSM: return plan.blocks == 1;
    case Residency::Cluster: return plan.blocks <= device.max_cluster_size;
    case Residency::Grid: return plan.blocks * problem.directions <= device.multiprocessors;
    default: return true;
  }
}

// Each plan with each value of one field: the decided one, else those of options(plan).
template <class T, class Options>
void expand(std::vector<Plan>& plans, T Plan::* field, const std::optional<T>& decided,
            const Options& options) {
  std::vector<Plan> expanded;
  for (const Plan& plan : plans)
    for (T value : decided ? std::vector<T>{*decided} : options(plan)) {
      expanded.push_back(plan);
      expanded.back().*field = value;
    }
  plans = std::move(expanded);
}

// Every plan of a residency that keeps to the override, whether it fits or not.
std::vector<Plan> enumerate(const Problem& problem, const DeviceFigures& device,
                            Residency residency, const Override& fixed) {
  std::vector<Plan> plans(1);
  plans[0].residency = residency;
  expand(plans, &Plan::arithmetic, fixed.arithmetic,
         [&](const Plan&) { return arithmetics(problem); });
  if (residency == Residency::Streamed) return plans;
  expand(plans, &Plan::engine_columns, fixed.engine_columns,
         [](const Plan& p) { return engine_columns(p.arithmetic); });
  plans.erase(
      std::remove_if(plans.begin(), plans.end(),
                     [&](const Plan& p) {
                       return engine_of(problem.dtype, p.arithmetic, p.engine_columns).rows == 0;
                     }),
      plans.end());
  expand(plans, &Plan::columns, fixed.columns,
         [&](const Plan& p) { return columns(p.engine_columns, problem.batch); });
  expand(plans, &Plan::blocks, fixed.blocks, [&](const Plan& p) {
    return blocks(residency, device, problem.directions, row_tiles(problem, p));
  });
  expand(plans, &Plan::row_warps, fixed.row_warps,
         [&](const Plan& p) { return row_warps(ceil_div(row_tiles(problem, p), p.blocks)); });
  expand(plans, &Plan::depth_split, fixed.depth_split, [&](const Plan& p) {
    const Engine engine = engine_of(problem.dtype, p.arithmetic, p.engine_columns);
    return depth_splits(ceil_div(problem.hidden_size, engine.depth), kMaxWarps / p.row_warps);
  });
  expand(plans, &Plan::fuse_input, fixed.fuse_input, [&](const Plan&) {
    return problem.input_size > 0 ? std::vector<bool>{false, true} : std::vector<bool>{false};
  });
  plans.erase(std::remove_if(plans.begin(), plans.end(),
                             [&](const Plan& p) { return !is_consistent(problem, device, p); }),
              plans.end());
  return plans;
}

std::string capability(int major, int minor) {
  return std::to_string(major) + "." + std::to_string(minor);
}

std::string kibibytes(int64_t bytes) { return std::to_string(ceil_div(bytes, 1024)) + " KiB"; }

// What rules out a residency before any plan is made; empty if nothing does.
std::string obstacle(const Problem& problem, const DeviceFigures& device, Residency residency) {
  if (residency == Residency::Streamed) return "";
  if (problem.dtype == ScalarType::Float64) return "float64 has no persistent kernel";
  if (residency == Residency::Cluster) {
    if (device.capability_major < kFirstMajorWithClusters)
      return "clusters need compute capability 9.0, the device has " +
             capability(device.capability_major, device.capability_minor);
    if (device.kernels_major < kFirstMajorWithClusters)
      return "clusters need kernels compiled for 9.0 or newer, those that this device runs are "
             "for " +
             capability(device.kernels_major, device.kernels_minor);
    if (device.max_cluster_size < 2) return "the device runs no clusters";
  }
  if (residency == Residency::Grid && device.multiprocessors < 2 * problem.directions)
    return "the device has too few multiprocessors";
  return "";
}

Candidate best(const Problem& problem, const DeviceFigures& device, Residency residency,
               const Override& fixed) {
  Candidate result;
  result.residency = residency;
  result.why_not = obstacle(problem, device, residency);
  if (!result.why_not.empty()) return result;
  int64_t smallest = -1;
  for (Plan& p : enumerate(problem, device, residency, fixed)) {
    p.shared_bytes = shared_bytes_of(problem, p);
    if (smallest < 0 || p.shared_bytes < smallest) smallest = p.shared_bytes;
    if (p.shared_bytes > device.shared_bytes_per_block) continue;
    const Estimate e = estimate(problem, device, p);
    if (result.plan && e.total_us >= result.estimate.total_us) continue;
    result.plan = std::move(p);
    result.estimate = e;
  }
  if (!result.plan)
    result.why_not = smallest < 0 ? "there are too few rows to share"
                                  : "a block would need " + kibibytes(smallest) +
                                        " of shared memory and has " +
                                        kibibytes(device.shared_bytes_per_block);
  return result;
}

constexpr Residency kAll[] = {Residency::OneSM, Residency::Cluster, Residency::Grid,
                              Residency::Streamed};

// ---- what an override cannot have
// ----------------------------------------------------------------

[[noreturn]] void refuse(const char* field, const std::string& value, const std::string& why) {
  throw std::invalid_argument(std::string("plan override: ") + field + "=" + value + ": " + why);
}

// The first field that only a persistent kernel has; null if there is none.
const char* kernel_field(const Override& fixed) {
  if (fixed.blocks) return "blocks";
  if (fixed.columns) return "columns";
  if (fixed.engine_columns) return "engine_columns";
  if (fixed.row_warps) return "row_warps";
  if (fixed.depth_split) return "depth_split";
  return fixed.fuse_input && *fixed.fuse_input ? "fuse_input" : nullptr;
}

void check_alone(const Problem& problem, const DeviceFigures& device, const Override& fixed) {
  if (fixed.residency) {
    const std::string why = obstacle(problem, device, *fixed.residency);
    if (!why.empty()) refuse("residency", name_of(*fixed.residency), why);
  }
  if (const char* field = kernel_field(fixed)) {
    if (problem.dtype == ScalarType::Float64)
      throw std::invalid_argument(std::string("plan override: ") + field +
                                  ": float64 has no persistent kernel");
    if (fixed.residency == Residency::Streamed)
      throw std::invalid_argument(std::string("plan override: ") + field +
                                  ": residency=streamed has no persistent kernel");
  }
  const std::vector<Arithmetic> possible = arithmetics(problem);
  if (fixed.arithmetic &&
      std::find(possible.begin(), possible.end(), *fixed.arithmetic) == possible.end())
    refuse("arithmetic", name_of(*fixed.arithmetic),
           *fixed.arithmetic == Arithmetic::TensorCoreTF32 && problem.dtype == ScalarType::Float32
               ? "torch's settings do not allow TF32"
               : std::string("not for ") + name_of(problem.dtype));
  if (fixed.engine_columns) {
    const auto fits = [&](Arithmetic a) {
      const Numbers known = engine_columns(a);
      return std::find(known.begin(), known.end(), *fixed.engine_columns) != known.end();
    };
    const std::vector<Arithmetic> used = either(fixed.arithmetic, possible);
    if (std::none_of(used.begin(), used.end(), fits)) {
      const bool fma = used.front() == Arithmetic::FMA;
      refuse("engine_columns", std::to_string(*fixed.engine_columns),
             fma ? "FMA has 1 or 4" : "tensor cores have 8 or 32");
    }
  }
  if (fixed.columns) {
    const bool fma = possible.front() == Arithmetic::FMA;
    const int group = fixed.engine_columns.value_or(fma ? 1 : 8);
    if (*fixed.columns % group != 0)
      refuse("columns", std::to_string(*fixed.columns),
             "expected a multiple of " + std::to_string(group));
  }
  const int warps = fixed.row_warps.value_or(1) * fixed.depth_split.value_or(1);
  if (fixed.row_warps.value_or(1) > kMaxWarps || (warps > kMaxWarps && !fixed.depth_split))
    refuse("row_warps", std::to_string(*fixed.row_warps),
           "a block has at most " + std::to_string(kMaxWarps) + " warps");
  if (warps > kMaxWarps)
    refuse("depth_split", std::to_string(*fixed.depth_split),
           "row_warps times depth_split is at most " + std::to_string(kMaxWarps) + ", here " +
               std::to_string(warps));
  if (fixed.blocks && fixed.residency) {
    const std::string value = std::to_string(*fixed.blocks);
    if (*fixed.residency == Residency::OneSM && *fixed.blocks != 1)
      refuse("blocks", value, "one_sm has 1");
    if (*fixed.residency == Residency::Cluster && *fixed.blocks > device.max_cluster_size)
      refuse("blocks", value,
             "a cluster of this device has at most " + std::to_string(device.max_cluster_size));
    const int most = device.multiprocessors / problem.directions;
    if (*fixed.residency == Residency::Grid && *fixed.blocks > most)
      refuse("blocks", value,
             "at most " + std::to_string(most) + " run at once for each direction");
  }
}

// Whether some residency has a plan with these blocks; why not, if none has.
void check_blocks(const Problem& problem, const Override& fixed) {
  if (!fixed.blocks || problem.dtype == ScalarType::Float64) return;
  std::string counts;
  for (Arithmetic arithmetic : either(fixed.arithmetic, arithmetics(problem)))
    for (int group : either(fixed.engine_columns, engine_columns(arithmetic))) {
      const Engine engine = engine_of(problem.dtype, arithmetic, group);
      if (engine.rows == 0) continue;
      const int64_t row_tiles = ceil_div(problem.hidden_size, engine.rows);
      const int64_t used = ceil_div(row_tiles, ceil_div(row_tiles, *fixed.blocks));
      if (used == *fixed.blocks) return;
      counts = std::to_string(row_tiles) + " row tiles (of " + std::to_string(engine.rows) +
               " hidden units) can be cut into at most " + std::to_string(used) +
               " equal parts of this size";
    }
  refuse("blocks", std::to_string(*fixed.blocks), counts);
}

// The fields of an override that stand in the way: without one of them there would be a plan.
std::string fields_in_the_way(const Problem& problem, const DeviceFigures& device,
                              const Override& fixed) {
  std::string names;
  const auto without = [&](const char* name, auto field) {
    if (!(fixed.*field)) return;
    Override rest = fixed;
    (rest.*field).reset();
    for (Residency residency :
         either(rest.residency, {Residency::OneSM, Residency::Cluster, Residency::Grid}))
      if (best(problem, device, residency, rest).plan) {
        names += std::string(names.empty() ? "" : " or ") + name;
        return;
      }
  };
  without("residency", &Override::residency);
  without("arithmetic", &Override::arithmetic);
  without("fuse_input", &Override::fuse_input);
  without("blocks", &Override::blocks);
  without("columns", &Override::columns);
  without("engine_columns", &Override::engine_columns);
  without("row_warps", &Override::row_warps);
  without("depth_split", &Override::depth_split);
  return names;
}

}  // namespace

std::vector<Candidate> candidates(const Problem& problem, const DeviceFigures& device,
                                  const Override& decided) {
  Override override = decided;
  // The recurrences of a backward pass have no input, whatever is said of the forward pass.
  if (problem.input_size == 0) override.fuse_input.reset();
  check_alone(problem, device, override);
  check_blocks(problem, override);
  std::vector<Candidate> all;
  for (Residency residency : kAll) {
    Candidate candidate;
    candidate.residency = residency;
    if (override.residency && *override.residency != residency)
      candidate.why_not = "the override says otherwise";
    else if (residency == Residency::Streamed && kernel_field(override) != nullptr)
      candidate.why_not = "the override describes a persistent kernel";
    else
      candidate = best(problem, device, residency, override);
    all.push_back(std::move(candidate));
  }
  const bool none = std::none_of(all.begin(), all.end(), [](const auto& c) { return c.plan; });
  if (none) {
    std::string reasons;
    for (const Candidate& c : all)
      if (!override.residency || *override.residency == c.residency)
        reasons +=
            std::string(reasons.empty() ? "" : "; ") + name_of(c.residency) + ": " + c.why_not;
    const std::string names = fields_in_the_way(problem, device, override);
    throw std::invalid_argument("plan override: '" + override.text + "' is not possible here (" +
                                reasons + ")" +
                                (names.empty() ? "" : "; it would be without " + names));
  }
  return all;
}

Plan plan(const Problem& problem, const DeviceFigures& device, const Override& override) {
  const std::vector<Candidate> all = candidates(problem, device, override);
  const Candidate* chosen = nullptr;
  for (const Candidate& c : all)
    if (c.plan && (chosen == nullptr || c.estimate.total_us < chosen->estimate.total_us))
      chosen = &c;
  std::ostringstream reason;
  reason.precision(3);
  reason << name_of(chosen->residency) << ", estimated " << chosen->estimate.step_us
         << " us a step";
  for (const Candidate& c : all) {
    if (&c == chosen) continue;
    reason << "; " << name_of(c.residency) << ": ";
    if (c.plan)
      reason << c.estimate.total_us / chosen->estimate.total_us << " times the total";
    else
      reason << c.why_not;
  }
  Plan result = *chosen->plan;
  result.reason = reason.str();
  return result;
}

}  // namespace cuda
}  // namespace rnn_cuda
