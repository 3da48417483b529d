// What a plan is expected to cost. A model to compare plans with, not a prediction: its constants
// are published figures of H100-class cards and assumptions; none was measured by this project.
#pragma once

#include "cuda/walk.h"

namespace rnn_cuda {
namespace cuda {

struct Estimate {
  double step_us = 0;   // one time step of one pass
  double total_us = 0;  // everything: the product of the input, loading U, all passes
  int64_t passes = 0;   // over the sequence, one batch tile of each team after the other
};

Estimate estimate(const Problem& problem, const DeviceFigures& device, const Plan& plan);

}  // namespace cuda
}  // namespace rnn_cuda
