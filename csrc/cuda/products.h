// Large matrix products, which are torch's, in the type that halves compute in.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

#include "recurrence_builder.h"
#include "runtime.h"

namespace rnn_cuda {
namespace cuda {

// a b, of half types in float32: what is added to it later is rounded with it, once.
inline at::Tensor wide_product(const at::Tensor& a, const at::Tensor& b) {
  if (!is_half(a.scalar_type())) return at::mm(a, b);
  // torch has no such product on the CPU.
  if (kEmulated) return at::mm(a.to(at::kFloat), b.to(at::kFloat));
  return at::mm(a, b, at::kFloat);
}

inline void wide_product_out(at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
  if (!is_half(a.scalar_type()))
    at::mm_out(out, a, b);
  else if (kEmulated)
    out.copy_(wide_product(a, b));
  else
    at::mm_out(out, a, b, at::kFloat);
}

}  // namespace cuda
}  // namespace rnn_cuda
