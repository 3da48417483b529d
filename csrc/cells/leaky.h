// The leaky cell: h_t = keep h_{t-1} + rate f(z_t), with z_t = W x_t + b + U h_{t-1}. Its constants
// are keep and rate of each unit.
#pragma once

#include "nonlinearities.h"

namespace rnn_cuda::leaky {

// p = h. What is carried is h too, not rounded to the storage type. Saved is f(z).
template <class F>
struct Forward {
  static constexpr Counts kCounts = {1, 0, 1, /*carried=*/1, 0, /*constants=*/2, /*saved=*/1};

  template <class Math, class Unit>
  static RNN_CUDA_CELL void apply(Unit& unit) {
    const auto keep = unit.constants[0], rate = unit.constants[1];
    const auto f = F::template of<Math>(unit.sums[0]);
    const auto h = keep * unit.carried[0] + rate * f;
    unit.published[0] = unit.carried[0] = h;
    unit.saved[0] = f;
  }
};

// Against time, with M = U^T and a_t = dL/dh_t: p = delta_t = dL/dz_t. The operand is f(z).
template <class F>
struct Backward {
  static constexpr Counts kCounts = {
      1, 0, 1, /*carried=*/1, /*operands=*/1, /*constants=*/2, 0, /*adjoints=*/1};

  template <class Math, class Unit>
  static RNN_CUDA_CELL void apply(Unit& unit) {
    const auto keep = unit.constants[0], rate = unit.constants[1];
    const auto adjoint = unit.sums[0] + unit.carried[0];
    unit.published[0] = F::template times_derivative<Math>(rate * adjoint, unit.operands[0]);
    unit.carried[0] = keep * adjoint;
    unit.adjoints[0] = adjoint;
  }
};

}  // namespace rnn_cuda::leaky
