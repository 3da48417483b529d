// Runs recurrences by their plan: memory, the product of the input if it is not fused, kernels.
#pragma once

#include <c10/util/ArrayRef.h>

#include "recurrence_builder.h"

namespace rnn_cuda {
namespace cuda {

// One recurrence, and what is wanted of it.
struct Job {
  RecurrenceBuilder builder;
  bool wants_last = false;
  bool wants_norms = false;

  // Filled in by run: s, (1, B, H), (1, T, B) or (1, N).
  Tensor output, last, norms;
};

// Runs up to two jobs of one shape: in one launch, where the plan has a persistent kernel.
void run(c10::ArrayRef<Job*> jobs);

}  // namespace cuda
}  // namespace rnn_cuda
