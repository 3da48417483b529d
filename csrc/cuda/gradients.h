// From delta_t = dL/dz_t to the gradients of an Elman layer: matrix products of torch's, which add
// up in a fixed order.
#pragma once

#include "execution.h"

namespace rnn_cuda {
namespace cuda {

struct ForwardPass {
  const Tensor& input;
  const OptionalTensor& h0;
  const Tensor &weight_ih, &weight_hh, &output;
  bool reverse;
};

// Throws where these do not fit the backward recurrence.
void check_forward_arguments(RecurrenceBuilder& backward, const Tensor& input,
                             const OptionalTensor& h0, const Tensor& weight_ih);

// `backward` has been run. The gradient of the input is added to that of another direction, if that
// is given.
GradientTensors gradients_of(const Job& backward, const ForwardPass& pass, const Wanted& wanted,
                             const Tensor* other_of_input = nullptr);

}  // namespace cuda
}  // namespace rnn_cuda
