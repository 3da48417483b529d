// The operators on CUDA tensors; emulated, on CPU tensors.
// (Files of this name are compiled as one: torch/library.h takes longest to read.)
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "execution.h"
#include "gradients_by_products.h"
#include "runtime.h"

#ifdef RNN_CUDA_EMULATED
#include "emulator/emulator.h"
#define RNN_CUDA_DISPATCH_KEY CPU
#else
#define RNN_CUDA_DISPATCH_KEY CUDA
#endif

namespace rnn_cuda {
namespace cuda {
namespace {

// The jobs of a layer's directions, which run together.
using Jobs = c10::SmallVector<Job, 2>;

void run_all(Jobs& jobs) {
  c10::SmallVector<Job*, 2> pointers;
  for (Job& job : jobs) pointers.push_back(&job);
  run(pointers);
}

Tensors layer_forward(const Tensor& input, TensorList states, TensorList weights,
                      std::string_view cell, std::string_view direction,
                      const OptionalTensor& batch_sizes, bool /*saves*/) {
  const NoAutograd guard;
  const Layer layer(input, states, weights, cell, direction, batch_sizes);
  Jobs jobs;
  for (int64_t d = 0; d < layer.directions(); ++d) {
    jobs.push_back({layer.forward(d)});
    jobs.back().wants_last = true;
  }
  run_all(jobs);
  return {joined(layer.directions(), -1, [&](int64_t d) { return jobs[d].output; }),
          joined(layer.directions(), 0, [&](int64_t d) { return jobs[d].last; })};
}

Tensors layer_gradients(const OptionalTensors& grads, const Tensor& input, TensorList states,
                        TensorList weights, const Tensor& output, TensorList saved,
                        std::string_view cell, std::string_view direction,
                        const OptionalTensor& batch_sizes, const c10::List<bool>& wanted) {
  const NoAutograd guard;
  const Layer layer(input, states, weights, cell, direction, batch_sizes);
  Jobs jobs;
  for (int64_t d = 0; d < layer.directions(); ++d) {
    jobs.push_back({layer.backward(d, grads, output, saved)});
    jobs.back().wants_norms = layer.wanted(d, wanted).norms;
    check_forward_arguments(jobs.back().builder, layer, d);
  }
  run_all(jobs);
  DirectionGradients gradients[2];
  for (int64_t d = 0; d < layer.directions(); ++d) {
    gradients[d].norms[0] = jobs[d].norms;
    gradients_by_products(jobs[d].builder, {jobs[d].output, {}, {}}, layer, d, output,
                          layer.wanted(d, wanted), d == 1 ? &gradients[0].input : nullptr,
                          gradients[d]);
  }
  return layer.results(gradients, wanted);
}

Tensor linear_recurrence(const Tensor& d, const Tensor& g, const Tensor& m,
                         const OptionalTensor& y0, bool reverse, const OptionalTensor& batch_sizes,
                         bool transposed) {
  const NoAutograd guard;
  Job job{linear_recurrence_builder(d, g, m, y0, reverse, batch_sizes, transposed)};
  run({&job});
  return job.output;
}

// The fields of DeviceFigures, for the planner's operator.
std::vector<int64_t> cuda_device_figures(int64_t index) {
  const c10::Device device(kDeviceType,
                           kEmulated ? c10::DeviceIndex(-1) : static_cast<c10::DeviceIndex>(index));
  const c10::DeviceGuard guard(device);
  const DeviceFigures f = figures_of(device);
  return {f.capability_major, f.capability_minor, f.multiprocessors, f.shared_bytes_per_block,
          f.max_cluster_size, f.l2_bytes,         f.kernels_major,   f.kernels_minor};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rnn_cuda, library) {
  library.def("cuda_device_figures(int index) -> int[]", cuda_device_figures);
#ifdef RNN_CUDA_EMULATED
  library.def("emulated_launches() -> int", emulator::launch_count);  // of kernels, so far
#endif
}

TORCH_LIBRARY_IMPL(rnn_cuda, RNN_CUDA_DISPATCH_KEY, library) {
  library.impl("layer_forward", layer_forward);
  library.impl("layer_gradients", layer_gradients);
  library.impl("linear_recurrence", linear_recurrence);
}

}  // namespace cuda
}  // namespace rnn_cuda
