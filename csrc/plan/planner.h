// Chooses a plan: a pure function of the problem and the device's figures.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cost.h"
#include "cuda/engine_table.h"
#include "cuda/plan.h"

namespace rnn_cuda {
namespace cuda {

constexpr int kMaxWarps = kMaxThreads / 32;  // of a block

const char* name_of(Residency residency);
const char* name_of(Arithmetic arithmetic);
const char* name_of(ScalarType dtype);

// A plan's fields as an override would name them.
std::string describe(const Plan& plan);

// Fields that a user has decided; the planner chooses the others.
struct Override {
  std::optional<Residency> residency;
  std::optional<Arithmetic> arithmetic;
  std::optional<bool> fuse_input;
  std::optional<int> blocks, columns, engine_columns, row_warps, depth_split;
  std::string text;  // as it was written

  // Reads "residency=cluster,blocks=4". Throws std::invalid_argument that names the bad field.
  static Override parse(const std::string& text);
};

// The best plan of one residency.
struct Candidate {
  Residency residency = Residency::Streamed;
  std::optional<Plan> plan;  // none: it is not possible
  Estimate estimate;
  std::string why_not;
};

// One for each residency, in the order of the enumeration.
std::vector<Candidate> candidates(const Problem& problem, const DeviceFigures& device,
                                  const Override& override = {});

// The cheapest of them. Throws std::invalid_argument where the override is impossible; the message
// names the field.
Plan plan(const Problem& problem, const DeviceFigures& device, const Override& override = {});

}  // namespace cuda
}  // namespace rnn_cuda
