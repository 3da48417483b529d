// s = epilogue(z, e): what turns the sum of a step into its state. See Epilogue in recurrence.h.
#pragma once

#include <stdexcept>

#include "../recurrence.h"
#include "vector.h"

namespace rnn_cuda::cpu {

// Every functor is called as (z, e); kUsesOperand tells whether e has to be read at all.
template <class T>
struct Tanh {
  static constexpr bool kUsesOperand = false;
  static Vec<T> apply(Vec<T> z, Vec<T>) { return tanh_of<T>(z); }
};

template <class T>
struct Relu {
  static constexpr bool kUsesOperand = false;
  // Not `z > 0 ? z : 0`: a NaN stays a NaN.
  static Vec<T> apply(Vec<T> z, Vec<T>) { return z <= T(0) ? Vec<T>{} : z; }
};

template <class T>
struct Sigmoid {
  static constexpr bool kUsesOperand = false;
  static Vec<T> apply(Vec<T> z, Vec<T>) { return sigmoid_of<T>(z); }
};

template <class T>
struct Identity {
  static constexpr bool kUsesOperand = false;
  static Vec<T> apply(Vec<T> z, Vec<T>) { return z; }
};

template <class T>
struct TanhBackward {
  static constexpr bool kUsesOperand = true;
  static Vec<T> apply(Vec<T> z, Vec<T> h) { return z * (T(1) - h * h); }
};

template <class T>
struct ReluBackward {
  static constexpr bool kUsesOperand = true;
  // As torch: a NaN state lets the gradient pass.
  static Vec<T> apply(Vec<T> z, Vec<T> h) { return h <= T(0) ? Vec<T>{} : z; }
};

template <class T>
struct SigmoidBackward {
  static constexpr bool kUsesOperand = true;
  static Vec<T> apply(Vec<T> z, Vec<T> h) { return z * (h * (T(1) - h)); }
};

template <class T>
struct Modulate {
  static constexpr bool kUsesOperand = true;
  static Vec<T> apply(Vec<T> z, Vec<T> d) { return z * d; }
};

// Returns f(the functor of an epilogue).
template <class T, class F>
auto with_functor_of(Epilogue epilogue, const F& f) {
  switch (epilogue) {
    case Epilogue::Tanh: return f(Tanh<T>{});
    case Epilogue::Relu: return f(Relu<T>{});
    case Epilogue::Sigmoid: return f(Sigmoid<T>{});
    case Epilogue::Identity:
    case Epilogue::IdentityBackward: return f(Identity<T>{});
    case Epilogue::TanhBackward: return f(TanhBackward<T>{});
    case Epilogue::ReluBackward: return f(ReluBackward<T>{});
    case Epilogue::SigmoidBackward: return f(SigmoidBackward<T>{});
    case Epilogue::Modulate: return f(Modulate<T>{});
  }
  throw std::invalid_argument("rnn_cuda: unknown epilogue");
}

}  // namespace rnn_cuda::cpu
