// The GRU cell as in torch, with r, z, n the gates and h' = h_{t-1}:
//
//   r = sigmoid(W_r x + b_r + U_r h')       z = sigmoid(W_z x + b_z + U_z h')
//   q = U_n h' + b_hn                       n = tanh(W_n x + b_in + r q)
//   h = (1 - z) n + z h'
//
// Other functions can stand for tanh and sigmoid.
#pragma once

#include "nonlinearities.h"

namespace rnn_cuda::gru {

// p = h; the sums are those of r, z and q, and W_n x + b_in stays apart. What is carried is h too,
// not rounded to the storage type. Saved are r, z, n, q and h'.
template <class NewFunction, class GateFunction>
struct Forward {
  static constexpr Counts kCounts = {/*sums=*/3,    /*apart=*/1, /*published=*/1,
                                     /*carried=*/1, 0,           /*constants=*/0,
                                     /*saved=*/5};

  template <class Math, class Unit>
  static RNN_CUDA_CELL void apply(Unit& unit) {
    const auto candidate = as_chosen<NewFunction>(unit.functions.candidate);
    const auto gate = as_chosen<GateFunction>(unit.functions.gate);
    const auto r = gate.template of<Math>(unit.sums[0]), z = gate.template of<Math>(unit.sums[1]);
    const auto q = unit.sums[2], previous = unit.carried[0];
    const auto n = candidate.template of<Math>(unit.apart[0] + r * q);
    const auto h = n + z * (previous - n);
    unit.published[0] = unit.carried[0] = h;
    unit.saved[0] = r, unit.saved[1] = z, unit.saved[2] = n, unit.saved[3] = q;
    unit.saved[4] = previous;
  }
};

// Against time, with M = U^T and a_t = dL/dh_t. The total adjoint is the sum and what is carried,
// z times that of the step after. p are the deltas as U sees them; W sees another one of n, which
// is saved. The operands are what the forward pass saved.
template <class NewFunction, class GateFunction>
struct Backward {
  static constexpr Counts kCounts = {/*sums=*/1,     /*apart=*/0,     /*published=*/3,
                                     /*carried=*/1,
                                     /*operands=*/5, /*constants=*/0, /*saved=*/1,
                                     /*adjoints=*/1};

  template <class Math, class Unit>
  static RNN_CUDA_CELL void apply(Unit& unit) {
    const auto candidate = as_chosen<NewFunction>(unit.functions.candidate);
    const auto gate = as_chosen<GateFunction>(unit.functions.gate);
    const typename Math::Number one = 1;
    const auto r = unit.operands[0], z = unit.operands[1], n = unit.operands[2];
    const auto q = unit.operands[3], previous = unit.operands[4];
    const auto adjoint = unit.sums[0] + unit.carried[0];
    const auto delta_n = candidate.template times_derivative<Math>(adjoint * (one - z), n);
    unit.published[0] = gate.template times_derivative<Math>(delta_n * q, r);
    unit.published[1] = gate.template times_derivative<Math>(adjoint * (previous - n), z);
    unit.published[2] = delta_n * r;
    unit.saved[0] = delta_n;
    unit.carried[0] = adjoint * z;
    unit.adjoints[0] = adjoint;
  }
};

}  // namespace rnn_cuda::gru
