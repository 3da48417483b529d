// The epilogues of recurrence.h in plain double: for the judges of the CPU and the CUDA kernels.
#pragma once

#include <cmath>
#include <cstdlib>

#include "recurrence.h"

namespace check {

using rnn_cuda::Epilogue;

inline double apply(Epilogue epilogue, double z, double e) {
  switch (epilogue) {
    case Epilogue::Tanh: return std::tanh(z);
    case Epilogue::Relu: return z <= 0 ? 0 : z;  // a NaN stays one
    case Epilogue::Sigmoid: return 1 / (1 + std::exp(-z));
    case Epilogue::Identity:
    case Epilogue::IdentityBackward: return z;
    case Epilogue::TanhBackward: return z * (1 - e * e);
    case Epilogue::ReluBackward: return e <= 0 ? 0 : z;
    case Epilogue::SigmoidBackward: return z * e * (1 - e);
    case Epilogue::Modulate: return z * e;
  }
  std::abort();
}

}  // namespace check
