// A small CPU tensor on a device, without waiting for the device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace rnn_cuda {

inline at::Tensor to_device(const at::Tensor& tensor, c10::Device device) {
  if (device.is_cpu()) return tensor;
  // From pinned memory, or the copy would wait. torch's allocator keeps that memory until the copy
  // is done; in a captured graph, as long as the graph.
  const at::Tensor pinned =
      at::empty(tensor.sizes(), tensor.options().pinned_memory(true)).copy_(tensor);
  return at::empty(tensor.sizes(), tensor.options().device(device))
      .copy_(pinned, /*non_blocking=*/true);
}

}  // namespace rnn_cuda
