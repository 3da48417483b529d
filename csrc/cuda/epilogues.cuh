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

// The same of several values, z in place: one switch for all, so that they overlap.
template <int kRows, int kColumns>
__device__ __forceinline__ void apply_epilogue(Epilogue epilogue, float (&z)[kRows][kColumns],
                                               const float (&e)[kRows][kColumns]) {
  const auto apply = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) z[i][j] = f(z[i][j], e[i][j]);
    }
  };
#define RNN_CUDA_APPLY(name) \
  case Epilogue::name:       \
    return apply([](float z, float e) { return apply_epilogue<float>(Epilogue::name, z, e); })
  switch (epilogue) {
    RNN_CUDA_APPLY(Tanh);
    RNN_CUDA_APPLY(Relu);
    RNN_CUDA_APPLY(Sigmoid);
    RNN_CUDA_APPLY(Identity);
    RNN_CUDA_APPLY(TanhBackward);
    RNN_CUDA_APPLY(ReluBackward);
    RNN_CUDA_APPLY(SigmoidBackward);
    RNN_CUDA_APPLY(IdentityBackward);
    RNN_CUDA_APPLY(Modulate);
  }
#undef RNN_CUDA_APPLY
}

}  // namespace cuda
}  // namespace rnn_cuda
