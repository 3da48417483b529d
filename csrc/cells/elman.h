// The Elman cell: h_t = f(z_t), with z_t = W x_t + b + U h_{t-1}.
#pragma once

#include "nonlinearities.h"

namespace rnn_cuda::elman {

// p = h.
template <class F>
struct Forward {
  static constexpr Counts kCounts = {};

  template <class Math, class Unit>
  static RNN_CUDA_CELL void apply(Unit& unit) {
    unit.published[0] = F::template of<Math>(unit.sums[0]);
  }
};

// Against time, with M = U^T and a_t = dL/dh_t: z is the total adjoint of h_t, p = delta_t =
// dL/dz_t. The operand is h_t.
template <class F>
struct Backward {
  static constexpr Counts kCounts = {1, 0, 1, 0, /*operands=*/1, 0, 0, /*adjoints=*/1};

  template <class Math, class Unit>
  static RNN_CUDA_CELL void apply(Unit& unit) {
    unit.adjoints[0] = unit.sums[0];
    unit.published[0] = F::template times_derivative<Math>(unit.sums[0], unit.operands[0]);
  }
};

// y_t = d_t * (g_t + M y_{t-1}), of which the operand is d_t: both derivatives of the recurrence
// are of this form.
struct Linear {
  static constexpr Counts kCounts = {1, 0, 1, 0, /*operands=*/1};

  template <class Math, class Unit>
  static RNN_CUDA_CELL void apply(Unit& unit) {
    unit.published[0] = unit.sums[0] * unit.operands[0];
  }
};

}  // namespace rnn_cuda::elman
