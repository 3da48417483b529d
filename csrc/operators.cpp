// The operators' schemas. Their kernels are registered by the operators.cpp of each device.
// (Files of this name are compiled as one: torch/library.h takes longest to read.)
#include <torch/library.h>

#include "eager_layer.h"

TORCH_LIBRARY(rnn_cuda, library) {
  // (T, B, I) or packed (N, I) -> output (T, B, H) or (N, H), h_n (B, H); bias is bias_ih +
  // bias_hh.
  library.def(
      "elman_forward(Tensor input, Tensor? h0, Tensor weight_ih, Tensor weight_hh, Tensor? bias, "
      "str nonlinearity, bool reverse, Tensor? batch_sizes) -> (Tensor output, Tensor h_n)");
  // delta_t = dL/dz_t. `reverse` is the direction of the forward pass.
  library.def(
      "elman_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor output, Tensor weight_hh, "
      "str nonlinearity, bool reverse, Tensor? batch_sizes) -> Tensor");
  // The gradients that training needs, and the norms over H of the adjoints dL/dh_t, in float64,
  // (T, B) or (N); those not wanted have no elements.
  library.def(
      "elman_gradients(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? h0, "
      "Tensor weight_ih, Tensor weight_hh, Tensor output, str nonlinearity, bool reverse, "
      "Tensor? batch_sizes, bool[6] wanted) -> (Tensor grad_input, Tensor grad_h0, "
      "Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias, Tensor adjoint_norm)");
  // Both directions of a layer at once; the second, which runs against time, has the suffix. Each
  // of the two computes what the operators above do, and grad_input is the sum of both directions'.
  library.def(
      "elman_forward_pair(Tensor input, Tensor? h0, Tensor weight_ih, Tensor weight_hh, "
      "Tensor? bias, Tensor? h0_reverse, Tensor weight_ih_reverse, Tensor weight_hh_reverse, "
      "Tensor? bias_reverse, str nonlinearity, Tensor? batch_sizes) -> (Tensor output, Tensor h_n, "
      "Tensor output_reverse, Tensor h_n_reverse)");
  library.def(
      "elman_gradients_pair(Tensor input, Tensor? grad_output, Tensor? grad_h_n, Tensor? h0, "
      "Tensor weight_ih, Tensor weight_hh, Tensor output, Tensor? grad_output_reverse, "
      "Tensor? grad_h_n_reverse, Tensor? h0_reverse, Tensor weight_ih_reverse, "
      "Tensor weight_hh_reverse, Tensor output_reverse, str nonlinearity, Tensor? batch_sizes, "
      "bool[11] wanted) -> (Tensor grad_input, Tensor grad_h0, Tensor grad_weight_ih, "
      "Tensor grad_weight_hh, Tensor grad_bias, Tensor adjoint_norm, Tensor grad_h0_reverse, "
      "Tensor grad_weight_ih_reverse, Tensor grad_weight_hh_reverse, Tensor grad_bias_reverse, "
      "Tensor adjoint_norm_reverse)");
  // y_t = d_t * (g_t + M y_{t-1})
  library.def(
      "linear_recurrence(Tensor d, Tensor g, Tensor m, Tensor? y0, bool reverse, "
      "Tensor? batch_sizes) -> Tensor");

  // elman_forward and elman_forward_pair as eager code runs them: with both biases, and an autograd
  // node of their own.
  library.def(
      "elman_layer(Tensor input, Tensor? h0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
      "Tensor? bias_hh, str nonlinearity, bool reverse, Tensor? batch_sizes) -> (Tensor output, "
      "Tensor h_n)",
      rnn_cuda::elman_layer);
  library.def(
      "elman_layer_pair(Tensor input, Tensor? h0, Tensor weight_ih, Tensor weight_hh, "
      "Tensor? bias_ih, Tensor? bias_hh, Tensor? h0_reverse, Tensor weight_ih_reverse, "
      "Tensor weight_hh_reverse, Tensor? bias_ih_reverse, Tensor? bias_hh_reverse, "
      "str nonlinearity, Tensor? batch_sizes) -> (Tensor output, Tensor h_n, "
      "Tensor output_reverse, Tensor h_n_reverse)",
      rnn_cuda::elman_layer_pair);
}
