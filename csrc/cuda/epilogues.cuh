// s = epilogue(z, e): what turns the sum of a step into its state; see Epilogue in recurrence.h.
//
// A switch that all threads take the same way costs nothing beside a step's synchronisation, and
// saves nine copies of every kernel.
#pragma once

#include "device.h"
#include "walk.h"

namespace rnn_cuda {
namespace cuda {

template <class T>
__device__ __forceinline__ T apply_epilogue(Epilogue epilogue, T z, T e) {
  switch (epilogue) {
    case Epilogue::Tanh: return device::tanh_of(z);
    case Epilogue::Relu: return z <= T(0) ? T(0) : z;  // a NaN stays a NaN
    case Epilogue::Sigmoid: return device::sigmoid_of(z);
    case Epilogue::Identity: return z;
    case Epilogue::TanhBackward: return z * (T(1) - e * e);
    case Epilogue::ReluBackward: return e <= T(0) ? T(0) : z;  // as torch: a NaN lets it pass
    case Epilogue::SigmoidBackward: return z * (e * (T(1) - e));
    case Epilogue::IdentityBackward: return z;
    case Epilogue::Modulate: return z * e;
  }
  return z;
}

}  // namespace cuda
}  // namespace rnn_cuda
