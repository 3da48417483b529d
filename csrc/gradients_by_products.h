// From the deltas of a backward recurrence to the gradients of a layer: matrix products of torch's,
// which add up in a fixed order.
#pragma once

#include "layer.h"

namespace rnn_cuda {

// What a backward recurrence left, of one direction.
struct BackwardResults {
  Tensor delta;    // (.., P H): the deltas of the sums of U h + b
  Tensor apart;    // (.., A H): those of W x + b for the sums that stay apart, if any do
  Tensor carried;  // (1, B, H): what arrived at the carried values before the first step, if any
};

// Throws where input, states and weight_ih of direction d do not fit its backward recurrence.
void check_forward_arguments(RecurrenceBuilder& backward, const Layer& layer, int64_t d);

// The gradients of a cell's constants, given the adjoint of what its units carry.
void constant_gradients(const RecurrenceBuilder& backward, const Layer& layer, int64_t d,
                        const Tensor& output, const Tensor& saved, const Tensor& adjoint,
                        DirectionGradients& gradients);

// Adds what is wanted to `gradients`, but for norms and adjoints. The gradient of the input is
// added to that of another direction, if that is given.
void gradients_by_products(const RecurrenceBuilder& backward, const BackwardResults& results,
                           const Layer& layer, int64_t d, const Tensor& output,
                           const DirectionWanted& wanted, const Tensor* other_of_input,
                           DirectionGradients& gradients);

}  // namespace rnn_cuda
