// What the cells compute with on a CPU: vectors of neighbouring units.
#pragma once

#include "vector.h"

namespace rnn_cuda::cpu {

template <class T>
struct Math {
  using Number = T;
  using Value = Vec<T>;

  static Value tanh(Value z) { return tanh_of<T>(z); }
  static Value sigmoid(Value z) { return sigmoid_of<T>(z); }
  static Value softplus(Value z) { return softplus_of<T>(z); }
  static Value expm1(Value z) { return expm1_of<T>(z); }
};

}  // namespace rnn_cuda::cpu
