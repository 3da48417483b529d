// From delta_t = dL/dz_t to the gradients of an Elman layer: matrix products of torch's, which add
// up in a fixed order.
#pragma once

#include <array>

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

// `backward` has been run. Of input, h0, weight_ih, weight_hh, bias, and the adjoints' norm; those
// not wanted have no elements.
GradientTensors gradients_of(const Job& backward, const ForwardPass& pass,
                             std::array<bool, 6> wanted);

}  // namespace cuda
}  // namespace rnn_cuda
