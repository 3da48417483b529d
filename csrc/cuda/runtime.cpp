#include "runtime.h"

#include <ATen/Context.h>
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

}  // namespace cuda
}  // namespace rnn_cuda
