// Residency::Streamed: a matrix product and an epilogue for each time step. For matrices that no
// chip holds, and for float64.
#pragma once

#include "recurrence_builder.h"
#include "walk.h"

namespace rnn_cuda {
namespace cuda {

// Of one recurrence without input product. `r` is that of the builder, `output` the tensor of its
// states.
void run_streamed(const RecurrenceBuilder& builder, const Recurrence& r, const Tensor& output,
                  double* norms, const Plan& plan, void* stream);

}  // namespace cuda
}  // namespace rnn_cuda
