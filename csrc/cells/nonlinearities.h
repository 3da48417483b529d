// f(z), and z times its derivative, read off the output h = f(z).
//
// Math is the arithmetic of a device: Number, Value (a Number or a vector of them), and the
// functions that operators do not give: tanh, sigmoid, softplus and expm1 of what is not positive.
#pragma once

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

}  // namespace rnn_cuda
