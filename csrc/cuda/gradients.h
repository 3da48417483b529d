// From delta_t = dL/dz_t to the gradients of an Elman layer: matrix products of torch's, which add
// up in a fixed order.
#pragma once

#include "execution.h"
#include "layer.h"

namespace rnn_cuda {
namespace cuda {

// Throws where input, state and weight_ih of direction d do not fit its backward recurrence.
void check_forward_arguments(RecurrenceBuilder& backward, const Layer& layer, int64_t d);

// `backward` has been run. The gradient of the input is added to that of another direction, if that
// is given.
DirectionGradients gradients_of(const Job& backward, const Layer& layer, int64_t d,
                                const Tensor& output, const DirectionWanted& wanted,
                                const Tensor* other_of_input);

}  // namespace cuda
}  // namespace rnn_cuda
