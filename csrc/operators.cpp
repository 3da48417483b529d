// The operators' schemas. Their kernels are registered by the operators.cpp of each device.
// (Files of this name are compiled as one: torch/library.h takes longest to read.)
#include <torch/library.h>

#include "layer_node.h"

TORCH_LIBRARY(rnn_cuda, library) {
  // The lists are those of layer.h; direction is forward, reverse or both. Returns output, the
  // final states and, if `saves`, what layer_gradients takes for `saved`.
  library.def(
      "layer_forward(Tensor input, Tensor[] states, Tensor[] weights, str cell, str direction, "
      "Tensor? batch_sizes, bool saves=False) -> Tensor[]");
  // From the gradients of output and final states: those of input, states and weights, the norms
  // over H of the cell's adjoints (csrc/cells/unit.h), (D, T, B) or (D, N) in float64, and the
  // adjoints themselves, (T, B, D H) or (N, D H) in compute precision; for an Elman cell in place
  // of these delta, the adjoint of the sums U h_{t-1} + b. `wanted` goes through all these; what it
  // does not want is left out.
  library.def(
      "layer_gradients(Tensor?[] grads, Tensor input, Tensor[] states, Tensor[] weights, "
      "Tensor output, Tensor[] saved, str cell, str direction, Tensor? batch_sizes, bool[] wanted) "
      "-> Tensor[]");
  // y_t = d_t * (g_t + M y_{t-1}), d and g (T, B, H) or (N, H); with more features than that the
  // linearised step of a cell whose units carry a value of their own, or its transpose.
  library.def(
      "linear_recurrence(Tensor d, Tensor g, Tensor m, Tensor? y0, bool reverse, "
      "Tensor? batch_sizes, bool transposed=False) -> Tensor");

  // layer_forward as eager code runs it, with an autograd node of its own; without what is saved.
  // `recompute` saves memory: the backward pass then runs the forward pass again.
  library.def(
      "layer(Tensor input, Tensor[] states, Tensor[] weights, str cell, str direction, "
      "Tensor? batch_sizes, bool recompute=False) -> Tensor[]",
      rnn_cuda::layer);
  // One step of one direction: input (B, I) or (I), states likewise; returns the new ones.
  library.def("step(Tensor input, Tensor[] states, Tensor[] weights, str cell) -> Tensor[]",
              rnn_cuda::step);
}
