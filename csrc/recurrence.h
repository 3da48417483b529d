// The contract between the bindings and the kernels: one plain struct describes every recurrence.
//
//   z_t = a_t + b + W x_t + M p_{t-1}        p_t, c_t = epilogue(z_t, c_{t-1}, e_t)
//
// An epilogue is what a cell does within a unit: csrc/cells/unit.h says how many sums z, published
// values p, carried values c and operands e a unit has. All of a kind that a row has lie value by
// value: (z of all H units, the next z of all H units, ..). Of an Elman cell all are one, or none:
//
//   forward              a = none,          M = U,    p = h,      epilogue  f(z)
//   backward             a = dL/dh direct,  M = U^T,  p = delta,  epilogue  z * f'(h), against time
//   linear recurrence    a = g,             M = M,    p = y,      epilogue  z * d
//
// No torch header is needed to read or implement it.
#pragma once

#include <cstdint>

#include "cells/cells.h"

namespace rnn_cuda {

enum class ScalarType { Float32, Float64, BFloat16, Float16 };

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
  ScalarType dtype = ScalarType::Float32;  // halves compute in float, and so is what says "wide"
  Epilogue epilogue = Epilogue::ElmanTanh;
  Functions functions;   // of an epilogue that lets them be chosen
  bool reverse = false;  // visit t = T-1 .. 0 instead of 0 .. T-1

  int64_t time_steps = 0;                // T
  int64_t batch = 0;                     // B
  int64_t input_size = 0;                // I, 0 where there is no input product
  int64_t hidden_size = 0;               // H
  const int64_t* batch_sizes = nullptr;  // (T), not increasing; null: every sample has every step

  Matrix weight_hidden;             // M (S H, P H)
  Matrix weight_input;              // W (S H, I)
  Rows input;                       // x, I features; null if input_size is 0
  const void* bias = nullptr;       // b ((S + apart) H), wide
  const void* constants = nullptr;  // of the units, (constants, H), wide; null if there are none
  Rows addend;                      // a, S H features; null: zero
  // On CUDA, with half types: a is float32, as W x_t is before it would be rounded.
  bool wide_addend = false;
  Rows operand;                   // e, E H features; null if there are none
  const void* initial = nullptr;  // p before a sample's first visited step, (B, P H); null: zero
  // Whether M multiplies a null initial state too, so that an Inf in M spreads as in torch.nn.RNN.
  // False only where there is no input product: the CUDA kernels then leave out the whole sum.
  bool multiplies_zero_initial = false;
  const void* initial_carried = nullptr;  // c before that step, (C, B, H); null: zero
  const void* first_addend = nullptr;     // added to a at that step, (B, S H)

  // p, (T, B, P H) or (sum of batch_sizes, P H), contiguous but for the distance of rows; null only
  // within Gradients
  void* output = nullptr;
  int64_t output_stride = 0;     // of rows; on CUDA always H
  void* last = nullptr;          // p after each sample's last visited step, (B, P H)
  void* last_carried = nullptr;  // c after that step, (C, B, H)
  void* saved = nullptr;         // contiguous, rows as those of the output
  // The last three may be null: not wanted.

  // On a CPU, of a backward recurrence: each of its cell's total adjoints, wide, (T, B, H) or (sum
  // of batch_sizes, H), and its Euclidean norm over the hidden units, (T, B) or (sum of
  // batch_sizes), whose squares do not vanish before the adjoint does; contiguous. Null where they
  // are not wanted.
  void* adjoints[kMaxAdjoints] = {};
  double* adjoint_norms[kMaxAdjoints] = {};
};

// All gradients of a layer whose backward recurrence publishes one value, delta_t = dL/dz_t
// (`has_one_delta`): that recurrence, and the products of its states with what the forward pass
// saw. Those not wanted are null.
struct Gradients {
  // Its output, delta, may be null: then delta is not rounded to the storage type, except as a
  // factor of products where the processor multiplies pairs of bfloat16.
  Recurrence backward;
  Rows states;  // h_t of the forward pass

  int64_t input_size = 0;         // I
  Rows input;                     // x_t
  Matrix weight_input;            // W (H, I), for grad_input only
  const void* initial = nullptr;  // h_0 (B, H); null: zero

  void* grad_input = nullptr;          // contiguous (T, B, I), or (sum of batch_sizes, I)
  void* grad_initial = nullptr;        // (B, H)
  void* grad_weight_input = nullptr;   // (H, I)
  void* grad_weight_hidden = nullptr;  // (H, H)
  void* grad_bias = nullptr;           // (H), wide
};

namespace cpu {

// Runs on at most `threads` threads. The result does not depend on how many.
void run(const Recurrence& recurrence, int threads);

// Sums over time and batch depend on the number of threads in their last bits: each thread adds up
// its own samples first. Nothing else does.
void run(const Gradients& gradients, int threads);

}  // namespace cpu
}  // namespace rnn_cuda
