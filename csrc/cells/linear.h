// The derivative of a cell whose units carry a value v of their own, c or h itself, in both modes.
//
//   forward     v_t = keep v_{t-1} + sum over gates g of gain_g (M y_{t-1})_g + b_t
//               y_t = v_t, or with an exposure: exposure v_t + output_gain (M y_{t-1})_o + q_t
//
// Its transpose runs against time, with M^T. Gains and so on are operands, read off what the cell
// did in the forward pass (rnn_cuda/cells/): no cell is named here.
#pragma once

#include "unit.h"

namespace rnn_cuda::linear {

// The last gate, o, comes on top of kGates where there is an exposure. The operands are the gains
// of the gates, keep, exposure, output_gain, b, q; p = y. Saved are y and v where they differ.
template <int kGates, bool kExposes>
struct Forward {
  static constexpr Counts kCounts = {kGates + kExposes,
                                     0,
                                     1,
                                     /*carried=*/1,
                                     /*operands=*/kGates + 2 + 3 * kExposes,
                                     0,
                                     /*saved=*/2 * kExposes};

  template <class Math, class Unit>
  static RNN_CUDA_CELL void apply(Unit& unit) {
    const auto* gain = unit.operands;
    const auto* rest = unit.operands + kGates;
    auto v = rest[0] * unit.carried[0] + rest[1 + 2 * kExposes];
    for (int g = 0; g < kGates; ++g) v += gain[g] * unit.sums[g];
    unit.carried[0] = unit.published[0] = v;
    if constexpr (kExposes) {
      unit.published[0] = rest[1] * v + rest[2] * unit.sums[kGates] + rest[4];
      unit.saved[0] = unit.published[0];
      unit.saved[1] = v;
    }
  }
};

// With a_t the direct adjoint of y_t: the sum, with what is carried where there is no exposure, is
// the total one. The operands are the gains, keep, exposure, output_gain and the direct adjoint of
// v_t; without an exposure the last three are not there. p are the adjoints of M y_{t-1}; saved are
// those of y_t and, with an exposure, of v_t.
template <int kGates, bool kExposes>
struct Transpose {
  static constexpr Counts kCounts = {1,
                                     0,
                                     kGates + kExposes,
                                     /*carried=*/1,
                                     /*operands=*/kGates + 1 + 3 * kExposes,
                                     0,
                                     /*saved=*/1 + kExposes};

  template <class Math, class Unit>
  static RNN_CUDA_CELL void apply(Unit& unit) {
    const auto* gain = unit.operands;
    const auto* rest = unit.operands + kGates;
    const auto of_y = kExposes ? unit.sums[0] : unit.sums[0] + unit.carried[0];
    auto of_v = of_y;
    if constexpr (kExposes) {
      of_v = unit.carried[0] + rest[1] * of_y + rest[3];
      unit.published[kGates] = rest[2] * of_y;
      unit.saved[1] = of_v;
    }
    for (int g = 0; g < kGates; ++g) unit.published[g] = gain[g] * of_v;
    unit.carried[0] = rest[0] * of_v;
    unit.saved[0] = of_y;
  }
};

}  // namespace rnn_cuda::linear
