// The plan that a call runs with: the planner's, under the override in force, remembered.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>

#include "planner.h"

namespace rnn_cuda {
namespace cuda {

struct OverrideText {
  std::string text;
  bool from_environment = false;
};

// The override in force: that of exchange_override, else the environment variable RNN_CUDA_PLAN.
OverrideText current_override();

// make(override). What is wrong with an override of the environment names the variable.
template <class Make>
auto with_override(const OverrideText& source, const Make& make) {
  try {
    return make(Override::parse(source.text));
  } catch (const std::invalid_argument& error) {
    if (!source.from_environment) throw;
    throw std::invalid_argument(std::string("RNN_CUDA_PLAN: ") + error.what());
  }
}

// Sets it for the whole process, null: back to the environment; returns what was set before.
std::optional<std::string> exchange_override(std::optional<std::string> text);

// Plans differ little between similar lengths: the number of time steps is rounded up to a power of
// two, so that sequences of many lengths make few plans.
Plan current_plan(Problem problem, const DeviceFigures& device);

}  // namespace cuda
}  // namespace rnn_cuda
