// The LSTM cell as in torch, with i, f, g, o the gates, c' = c_{t-1} and z = W x + b + U h_{t-1}:
//
//   i, f, o = sigmoid(z)    g = tanh(z)    c = f c' + i g    h = o tanh(c)
//
// Other functions can stand for tanh and sigmoid.
#pragma once

#include "nonlinearities.h"

namespace rnn_cuda::lstm {

// p = h; the sums are those of i, f, g, o. What is carried is c. Saved are the gates, c' and
// tanh(c).
template <class NewFunction, class GateFunction>
struct Forward {
  static constexpr Counts kCounts = {/*sums=*/4,    /*apart=*/0, /*published=*/1,
                                     /*carried=*/1, 0,           /*constants=*/0,
                                     /*saved=*/6};

  template <class Math, class Unit>
  static RNN_CUDA_CELL void apply(Unit& unit) {
    const auto candidate = as_chosen<NewFunction>(unit.functions.candidate);
    const auto gate = as_chosen<GateFunction>(unit.functions.gate);
    const auto i = gate.template of<Math>(unit.sums[0]), f = gate.template of<Math>(unit.sums[1]);
    const auto g = candidate.template of<Math>(unit.sums[2]);
    const auto o = gate.template of<Math>(unit.sums[3]);
    const auto previous = unit.carried[0];
    const auto c = f * previous + i * g;
    const auto tanh_c = candidate.template of<Math>(c);
    unit.published[0] = o * tanh_c;
    unit.carried[0] = c;
    unit.saved[0] = i, unit.saved[1] = f, unit.saved[2] = g, unit.saved[3] = o;
    unit.saved[4] = previous, unit.saved[5] = tanh_c;
  }
};

// Against time, with M = U^T and a_t = dL/dh_t: the sum is the total adjoint of h_t. What is
// carried is dL/dc_t but for what c_t does through h_t. p are the deltas; the operands are what the
// forward pass saved. The adjoints are dL/dh_t, dL/dc_t, and dL/dc_t where h_t is held fixed.
template <class NewFunction, class GateFunction>
struct Backward {
  static constexpr Counts kCounts = {/*sums=*/1,     /*apart=*/0,     /*published=*/4,
                                     /*carried=*/1,
                                     /*operands=*/6, /*constants=*/0, /*saved=*/0,
                                     /*adjoints=*/3};

  template <class Math, class Unit>
  static RNN_CUDA_CELL void apply(Unit& unit) {
    const auto candidate = as_chosen<NewFunction>(unit.functions.candidate);
    const auto gate = as_chosen<GateFunction>(unit.functions.gate);
    const auto i = unit.operands[0], f = unit.operands[1], g = unit.operands[2];
    const auto o = unit.operands[3], previous = unit.operands[4], tanh_c = unit.operands[5];
    const auto of_h = unit.sums[0];
    const auto of_c = unit.carried[0] + candidate.template times_derivative<Math>(of_h * o, tanh_c);
    unit.published[0] = gate.template times_derivative<Math>(of_c * g, i);
    unit.published[1] = gate.template times_derivative<Math>(of_c * previous, f);
    unit.published[2] = candidate.template times_derivative<Math>(of_c * i, g);
    unit.published[3] = gate.template times_derivative<Math>(of_h * tanh_c, o);
    unit.adjoints[0] = of_h, unit.adjoints[1] = of_c, unit.adjoints[2] = unit.carried[0];
    unit.carried[0] = of_c * f;
  }
};

}  // namespace rnn_cuda::lstm
