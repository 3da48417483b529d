// f(z), and z times its derivative, read off the output h = f(z).
//
// Math is the arithmetic of a device: Number, Value (a Number or a vector of them), and the
// functions that operators do not give: tanh, sigmoid, softplus and expm1 of what is not positive.
#pragma once

#include <type_traits>

#include "unit.h"

namespace rnn_cuda {

struct Tanh {
  template <class Math>
  static RNN_CUDA_CELL typename Math::Value of(typename Math::Value z) {
    return Math::tanh(z);
  }
  template <class Math>
  static RNN_CUDA_CELL typename Math::Value times_derivative(typename Math::Value z,
                                                             typename Math::Value h) {
    return z * (typename Math::Number(1) - h * h);
  }
};

struct Relu {
  // Not `z > 0 ? z : 0`: a NaN stays a NaN.
  template <class Math>
  static RNN_CUDA_CELL typename Math::Value of(typename Math::Value z) {
    return z <= typename Math::Number(0) ? typename Math::Value{} : z;
  }
  // As torch: a NaN state lets the gradient pass.
  template <class Math>
  static RNN_CUDA_CELL typename Math::Value times_derivative(typename Math::Value z,
                                                             typename Math::Value h) {
    return h <= typename Math::Number(0) ? typename Math::Value{} : z;
  }
};

struct Sigmoid {
  template <class Math>
  static RNN_CUDA_CELL typename Math::Value of(typename Math::Value z) {
    return Math::sigmoid(z);
  }
  template <class Math>
  static RNN_CUDA_CELL typename Math::Value times_derivative(typename Math::Value z,
                                                             typename Math::Value h) {
    return z * (h * (typename Math::Number(1) - h));
  }
};

struct Identity {
  template <class Math>
  static RNN_CUDA_CELL typename Math::Value of(typename Math::Value z) {
    return z;
  }
  template <class Math>
  static RNN_CUDA_CELL typename Math::Value times_derivative(typename Math::Value z,
                                                             typename Math::Value /*h*/) {
    return z;
  }
};

struct Softplus {
  template <class Math>
  static RNN_CUDA_CELL typename Math::Value of(typename Math::Value z) {
    return Math::softplus(z);
  }
  // 1 - exp(-h), whose digits a difference would lose where h is small.
  template <class Math>
  static RNN_CUDA_CELL typename Math::Value times_derivative(typename Math::Value z,
                                                             typename Math::Value h) {
    return -z * Math::expm1(-h);
  }
};

// max(0, min(1, z / 6 + 1/2)), as torch's.
struct HardSigmoid {
  template <class Math>
  static RNN_CUDA_CELL typename Math::Value of(typename Math::Value z) {
    using Number = typename Math::Number;
    const typename Math::Value one = typename Math::Value{} + Number(1);
    const typename Math::Value line = z * Number(1.0 / 6) + Number(0.5);
    const typename Math::Value capped = line >= one ? one : line;
    return capped <= Number(0) ? typename Math::Value{} : capped;
  }
  template <class Math>
  static RNN_CUDA_CELL typename Math::Value times_derivative(typename Math::Value z,
                                                             typename Math::Value h) {
    using Number = typename Math::Number;
    const typename Math::Value inside = z * Number(1.0 / 6);
    const typename Math::Value below = h >= Number(1) ? typename Math::Value{} : inside;
    return h <= Number(0) ? typename Math::Value{} : below;
  }
};

// One of the above, by its name: one kernel for all of them. The branch is the same for all units.
struct Chosen {
  Function function;

  template <class Math>
  RNN_CUDA_CELL typename Math::Value of(typename Math::Value z) const {
    switch (function) {
      case Function::Tanh: return Tanh::of<Math>(z);
      case Function::Relu: return Relu::of<Math>(z);
      case Function::Sigmoid: return Sigmoid::of<Math>(z);
      case Function::HardSigmoid: return HardSigmoid::of<Math>(z);
      case Function::Identity: break;
    }
    return z;
  }
  template <class Math>
  RNN_CUDA_CELL typename Math::Value times_derivative(typename Math::Value z,
                                                      typename Math::Value h) const {
    switch (function) {
      case Function::Tanh: return Tanh::times_derivative<Math>(z, h);
      case Function::Relu: return Relu::times_derivative<Math>(z, h);
      case Function::Sigmoid: return Sigmoid::times_derivative<Math>(z, h);
      case Function::HardSigmoid: return HardSigmoid::times_derivative<Math>(z, h);
      case Function::Identity: break;
    }
    return z;
  }
};

// F itself, or the Chosen one.
template <class F>
RNN_CUDA_CELL F as_chosen(Function function) {
  if constexpr (std::is_same_v<F, Chosen>)
    return {function};
  else
    return {};
}

}  // namespace rnn_cuda
