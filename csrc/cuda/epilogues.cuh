// The epilogues of csrc/cells/ on the numbers of a CUDA thread: of cells with one sum, one
// published value and nothing carried. (The binding refuses others.)
//
// A switch that all threads take the same way costs nothing beside a step's synchronisation, and
// saves nine copies of every kernel.
#pragma once

#include "device.h"
#include "walk.h"

namespace rnn_cuda {
namespace cuda {

template <class T>
struct Math {
  using Number = T;
  using Value = T;

  static __device__ __forceinline__ T tanh(T z) { return device::tanh_of(z); }
  static __device__ __forceinline__ T sigmoid(T z) { return device::sigmoid_of(z); }
  static __device__ __forceinline__ T softplus(T z) { return device::softplus_of(z); }
  static __device__ __forceinline__ T expm1(T z) { return device::expm1_of(z); }
};

template <class Epilogue, class T>
__device__ __forceinline__ T applied(T z, T e) {
  if constexpr (kIsSimple<Epilogue>) {
    Unit<T, Epilogue> unit;
    unit.sums[0] = z;
    unit.operands[0] = e;
    Epilogue::template apply<Math<T>>(unit);
    return unit.published[0];
  } else {
    return z;
  }
}

template <class T>
__device__ __forceinline__ T apply_epilogue(Epilogue epilogue, T z, T e) {
  return with_epilogue(epilogue, [&](auto type) { return applied<decltype(type)>(z, e); });
}

// The same of several values, z in place: one switch for all, so that they overlap.
template <int kRows, int kColumns>
__device__ __forceinline__ void apply_epilogue(Epilogue epilogue, float (&z)[kRows][kColumns],
                                               const float (&e)[kRows][kColumns]) {
  with_epilogue(epilogue, [&](auto type) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) z[i][j] = applied<decltype(type)>(z[i][j], e[i][j]);
    }
  });
}

}  // namespace cuda
}  // namespace rnn_cuda
