// The contract between the bindings and the kernels: one plain struct describes either primitive.
//
//   z_t = a_t + bias + W x_t + M s_{t-1}        s_t = epilogue(z_t, e_t)
//
//   Elman forward       a = none,          M = U,    s = h,      epilogue  f(z)
//   Elman backward      a = dL/dh direct,  M = U^T,  s = delta,  epilogue  z * f'(h), against time
//   linear recurrence   a = g,             M = M,    s = y,      epilogue  z * d
//
// No torch header is needed to read or implement it.
#pragma once

#include <cstdint>

namespace rnn_cuda {

enum class ScalarType { Float32, Float64, BFloat16, Float16 };

enum class Epilogue {
  Tanh,
  Relu,
  Sigmoid,
  Identity,
  // z times the derivative of the nonlinearity, read off its output e_t = h_t.
  TanhBackward,
  ReluBackward,
  SigmoidBackward,
  IdentityBackward,
  // z times e_t.
  Modulate,
};

// A matrix (n, k), so laid out that a transposed view needs no copy: element (n, k) is
// data[n * stride + k], or data[k * stride + n] if transposed. Strides count elements.
struct Matrix {
  const void* data = nullptr;
  int64_t stride = 0;
  bool transposed = false;
};

// One row of features per (time step t, sample b), features contiguous. Strides count elements.
// With batch_sizes (below) row (t, b) is number `batch_sizes[0] + ... + batch_sizes[t-1] + b`, and
// only batch_stride is used.
struct Rows {
  const void* data = nullptr;
  int64_t time_stride = 0;
  int64_t batch_stride = 0;
};

struct Recurrence {
  ScalarType dtype = ScalarType::Float32;  // of every tensor but the bias; halves compute in float
  Epilogue epilogue = Epilogue::Tanh;
  bool reverse = false;  // visit t = T-1 .. 0 instead of 0 .. T-1

  int64_t time_steps = 0;                // T
  int64_t batch = 0;                     // B
  int64_t input_size = 0;                // I, 0 where there is no input product
  int64_t hidden_size = 0;               // H
  const int64_t* batch_sizes = nullptr;  // (T), not increasing; null: every sample has every step

  Matrix weight_hidden;        // M (H, H)
  Matrix weight_input;         // W (H, I)
  Rows input;                  // x, I features; null if input_size is 0
  const void* bias = nullptr;  // (H), in the type that halves compute in
  Rows addend;                 // a, H features; null: zero
  // On CUDA, with half types: a is float32, as W x_t is before it would be rounded.
  bool wide_addend = false;
  Rows operand;                   // e, H features; null for the epilogues of one argument
  const void* initial = nullptr;  // s before a sample's first visited step, (B, H); null: zero
  // Whether M multiplies a null initial state too, so that an Inf in M spreads as in torch.nn.RNN.
  // False only where there is no input product: the CUDA kernels then leave out the whole sum.
  bool multiplies_zero_initial = false;
  const void* first_addend = nullptr;  // added to a at a sample's first visited step, (B, H)

  // s, (T, B, H) or (sum of batch_sizes, H), contiguous but for the distance of rows; null only
  // within Gradients
  void* output = nullptr;
  int64_t output_stride = 0;  // of rows; on CUDA always H
  void* last = nullptr;       // s after each sample's last visited step, (B, H); null: not wanted
};

// All gradients of an Elman layer: the backward recurrence, delta_t = dL/dz_t, and the products of
// its states with what the forward pass saw. Those not wanted are null.
struct Gradients {
  // Its operand holds the states h_t of the forward pass. Its output, delta, may be null: then
  // delta is not rounded to the storage type, except as a factor of products where the processor
  // multiplies pairs of bfloat16.
  Recurrence backward;

  int64_t input_size = 0;         // I
  Rows input;                     // x_t
  Matrix weight_input;            // W (H, I), for grad_input only
  const void* initial = nullptr;  // h_0 (B, H); null: zero

  void* grad_input = nullptr;          // contiguous (T, B, I), or (sum of batch_sizes, I)
  void* grad_initial = nullptr;        // (B, H)
  void* grad_weight_input = nullptr;   // (H, I)
  void* grad_weight_hidden = nullptr;  // (H, H)
  void* grad_bias = nullptr;           // (H), in the type that halves compute in
  // The Euclidean norm over the hidden units of the total adjoint dL/dh_t, which is the z_t of the
  // backward recurrence: contiguous (T, B), or (sum of batch_sizes). Its squares do not vanish
  // before the adjoint does.
  double* adjoint_norm = nullptr;
};

namespace cpu {

// Runs on at most `threads` threads. The result does not depend on how many.
void run(const Recurrence& recurrence, int threads);

// Sums over time and batch depend on the number of threads in their last bits: each thread adds up
// its own samples first. Nothing else does.
void run(const Gradients& gradients, int threads);

}  // namespace cpu
}  // namespace rnn_cuda
