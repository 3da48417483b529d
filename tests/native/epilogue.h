// The epilogues of csrc/cells/ in plain double: for the judges of the CPU and the CUDA kernels.
#pragma once

#include <cmath>
#include <cstdlib>
#include <iterator>

#include "recurrence.h"

namespace check {

using rnn_cuda::Epilogue;

constexpr Epilogue kElmanEpilogues[] = {
    Epilogue::ElmanTanh,
    Epilogue::ElmanRelu,
    Epilogue::ElmanSigmoid,
    Epilogue::ElmanIdentity,
    Epilogue::ElmanTanhBackward,
    Epilogue::ElmanReluBackward,
    Epilogue::ElmanSigmoidBackward,
    Epilogue::ElmanIdentityBackward,
    Epilogue::ElmanLinear,
};

inline double apply(Epilogue epilogue, double z, double e) {
  switch (epilogue) {
    case Epilogue::ElmanTanh: return std::tanh(z);
    case Epilogue::ElmanRelu: return z <= 0 ? 0 : z;  // a NaN stays one
    case Epilogue::ElmanSigmoid: return 1 / (1 + std::exp(-z));
    case Epilogue::ElmanIdentity:
    case Epilogue::ElmanIdentityBackward: return z;
    case Epilogue::ElmanTanhBackward: return z * (1 - e * e);
    case Epilogue::ElmanReluBackward: return e <= 0 ? 0 : z;
    case Epilogue::ElmanSigmoidBackward: return z * e * (1 - e);
    case Epilogue::ElmanLinear: return z * e;
    default: std::abort();
  }
}

}  // namespace check
