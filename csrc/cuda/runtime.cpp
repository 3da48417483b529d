#include "runtime.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <map>
#include <mutex>

#include "plan/planner.h"

namespace rnn_cuda {
namespace cuda {

void* current_stream(c10::Device device) {
  if (kEmulated) return nullptr;
  const c10::impl::VirtualGuardImpl guard(kDeviceType);
  return guard.getStreamNativeHandle(guard.getStream(device));
}

bool allows_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

void check_launch(int code, const Plan& plan) {
  TORCH_CHECK(code == 0, "rnn_cuda: launching a kernel failed: ", error_string(code),
              ". The plan was ", describe(plan),
              "; another can be had with RNN_CUDA_PLAN or rnn_cuda.plan_override.");
}

DeviceFigures figures_of(c10::Device device) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, DeviceFigures> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device.index());
  if (found != known.end()) return found->second;
  DeviceFigures figures;
  const int code = figures_of_current_device(&figures);
  TORCH_CHECK(code == 0, "rnn_cuda: asking ", device,
              " for its figures failed: ", error_string(code));
  return known[device.index()] = figures;
}

at::Tensor to_device(const at::Tensor& tensor, c10::Device device) {
  if (kEmulated) return tensor;
  // From pinned memory, or the copy would wait. torch's allocator keeps that memory until the copy
  // is done; in a captured graph, as long as the graph.
  const at::Tensor pinned =
      at::empty(tensor.sizes(), tensor.options().pinned_memory(true)).copy_(tensor);
  return at::empty(tensor.sizes(), tensor.options().device(device))
      .copy_(pinned, /*non_blocking=*/true);
}

}  // namespace cuda
}  // namespace rnn_cuda
