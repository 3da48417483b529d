// The planner as operators, in every build: rnn_cuda/cuda_plan.py is their other side.
// (Files of this name are compiled as one: torch/library.h takes longest to read.)
#include <torch/library.h>

#include <iomanip>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string_view>

#include "cuda/layout.h"
#include "cuda/walk.h"
#include "current.h"
#include "planner.h"

namespace rnn_cuda {
namespace cuda {
namespace {

ScalarType dtype_named(std::string_view name) {
  for (ScalarType dtype :
       {ScalarType::Float32, ScalarType::Float64, ScalarType::BFloat16, ScalarType::Float16})
    if (name == name_of(dtype)) return dtype;
  TORCH_CHECK_VALUE(false, "dtype: expected float32, float64, bfloat16 or float16, got '", name,
                    "'");
}

// A JSON object, written field by field.
class Object {
 public:
  Object& add(const char* name, const std::string& text) { return raw(name, quoted(text)); }
  Object& add(const char* name, const char* text) { return raw(name, quoted(text)); }
  Object& add(const char* name, bool value) { return raw(name, value ? "true" : "false"); }
  Object& add(const char* name, int64_t value) { return raw(name, std::to_string(value)); }
  Object& add(const char* name, int value) { return raw(name, std::to_string(value)); }
  Object& add(const char* name, double value) {
    std::ostringstream text;
    text << std::setprecision(std::numeric_limits<double>::max_digits10) << value;
    return raw(name, text.str());
  }
  Object& raw(const char* name, const std::string& json) {
    fields_ += (fields_.empty() ? "" : ", ") + quoted(name) + ": " + json;
    return *this;
  }
  std::string text() const { return "{" + fields_ + "}"; }

 private:
  static std::string quoted(const std::string& text) {
    std::ostringstream quoted;
    quoted << std::quoted(text);
    return quoted.str();
  }

  std::string fields_;
};

std::string json_of(const Geometry& g) {
  return Object()
      .add("row_tiles", g.row_tiles)
      .add("blocks", g.blocks)
      .add("block_row_tiles", g.block_row_tiles)
      .add("row_rounds", g.row_rounds)
      .add("state_depth", g.state_depth)
      .add("input_depth", g.input_depth)
      .add("state_slice", g.state_slice)
      .add("input_slice", g.input_slice)
      .add("state_words", g.state_words)
      .add("input_words", g.input_words)
      .add("batch_tiles", g.batch_tiles)
      .add("shared_weight_tiles", g.shared_weight_tiles)
      .text();
}

std::string json_of(const std::vector<Candidate>& candidates) {
  std::string list;
  for (const Candidate& c : candidates) {
    Object entry;
    entry.add("residency", name_of(c.residency)).add("why_not", c.why_not);
    if (c.plan) entry.add("step_us", c.estimate.step_us).add("total_us", c.estimate.total_us);
    list += (list.empty() ? "" : ", ") + entry.text();
  }
  return "[" + list + "]";
}

std::string json_of(const Problem& problem, const DeviceFigures& device, const Override& override) {
  const Plan p = plan(problem, device, override);
  const Estimate e = estimate(problem, device, p);
  const int rows = engine_of(problem.dtype, p.arithmetic, p.engine_columns).rows;
  return Object()
      .add("residency", name_of(p.residency))
      .add("arithmetic", name_of(p.arithmetic))
      .add("fuse_input", p.fuse_input)
      .add("blocks", p.blocks)
      .add("columns", p.columns)
      .add("engine_columns", p.engine_columns)
      .add("row_warps", p.row_warps)
      .add("depth_split", p.depth_split)
      .add("shared_bytes", p.shared_bytes)
      .add("workspace_bytes",
           workspace_of(problem, p, problem.time_steps * problem.batch, /*norms=*/false))
      .add("step_us", e.step_us)
      .add("total_us", e.total_us)
      .add("passes", e.passes)
      .add("reason", p.reason)
      .add("rows_per_tile", p.residency == Residency::Streamed ? 0 : rows)
      .raw("geometry", json_of(Geometry::of(problem, p)))
      .raw("candidates", json_of(candidates(problem, device, override)))
      .text();
}

std::string cuda_plan(std::string_view dtype, at::IntArrayRef sizes, int64_t directions,
                      bool allow_tf32, at::IntArrayRef device,
                      std::optional<std::string_view> override) {
  TORCH_CHECK_VALUE(sizes.size() == 4, "sizes: expected T, B, I, H");
  TORCH_CHECK_VALUE(device.size() == 8, "device: expected eight figures");
  Problem problem;
  problem.dtype = dtype_named(dtype);
  problem.time_steps = sizes[0];
  problem.batch = sizes[1];
  problem.input_size = sizes[2];
  problem.hidden_size = sizes[3];
  problem.directions = static_cast<int>(directions);
  problem.allow_tf32 = allow_tf32;
  DeviceFigures figures;
  figures.capability_major = static_cast<int>(device[0]);
  figures.capability_minor = static_cast<int>(device[1]);
  figures.multiprocessors = static_cast<int>(device[2]);
  figures.shared_bytes_per_block = device[3];
  figures.max_cluster_size = static_cast<int>(device[4]);
  figures.l2_bytes = device[5];
  figures.kernels_major = static_cast<int>(device[6]);
  figures.kernels_minor = static_cast<int>(device[7]);
  try {
    const OverrideText source =
        override ? OverrideText{std::string(*override), false} : current_override();
    return with_override(
        source, [&](const Override& decided) { return json_of(problem, figures, decided); });
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

std::optional<std::string> exchange_plan_override(std::optional<std::string_view> text) {
  try {
    return exchange_override(text ? std::optional<std::string>(*text) : std::nullopt);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rnn_cuda, library) {
  // The plan for a problem of sizes T, B, I, H as JSON; `device` lists the fields of DeviceFigures.
  library.def(
      "cuda_plan(str dtype, int[] sizes, int directions, bool allow_tf32, int[] device, "
      "str? override) -> str",
      cuda_plan);
  library.def("exchange_plan_override(str? text) -> str?", exchange_plan_override);
}

}  // namespace cuda
}  // namespace rnn_cuda
