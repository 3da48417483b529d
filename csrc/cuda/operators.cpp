// The operators on CUDA tensors; emulated, on CPU tensors.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <array>

#include "execution.h"
#include "gradients.h"
#include "runtime.h"

#ifdef RNN_CUDA_EMULATED
#define RNN_CUDA_DISPATCH_KEY CPU
#else
#define RNN_CUDA_DISPATCH_KEY CUDA
#endif

namespace rnn_cuda {
namespace cuda {
namespace {

// torch's own operators, called from here, are no business of autograd.
using NoAutograd = at::AutoDispatchBelowADInplaceOrView;

Job forward_job(const Tensor& input, const OptionalTensor& h0, const Tensor& weight_ih,
                const Tensor& weight_hh, const OptionalTensor& bias, std::string_view nonlinearity,
                bool reverse, const OptionalTensor& batch_sizes) {
  Job job{RecurrenceBuilder(input, weight_hh.size(0), batch_sizes, reverse)};
  job.builder.epilogue(epilogues_of(nonlinearity).forward)
      .weight_hidden(weight_hh)
      .input(input, weight_ih)
      .bias(bias)
      .initial(h0);
  job.wants_last = true;
  return job;
}

std::tuple<Tensor, Tensor> elman_forward(const Tensor& input, const OptionalTensor& h0,
                                         const Tensor& weight_ih, const Tensor& weight_hh,
                                         const OptionalTensor& bias, std::string_view nonlinearity,
                                         bool reverse, const OptionalTensor& batch_sizes) {
  const NoAutograd guard;
  Job job = forward_job(input, h0, weight_ih, weight_hh, bias, nonlinearity, reverse, batch_sizes);
  run({&job});
  return {job.output, job.last};
}

Tensor elman_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                      const Tensor& output, const Tensor& weight_hh, std::string_view nonlinearity,
                      bool reverse, const OptionalTensor& batch_sizes) {
  const NoAutograd guard;
  Job job{elman_backward_builder(grad_output, grad_h_n, output, weight_hh, nonlinearity, reverse,
                                 batch_sizes)};
  run({&job});
  return job.output;
}

// `wanted` says which of the results; the others come back without elements.
GradientTensors elman_gradients(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                const Tensor& input, const OptionalTensor& h0,
                                const Tensor& weight_ih, const Tensor& weight_hh,
                                const Tensor& output, std::string_view nonlinearity, bool reverse,
                                const OptionalTensor& batch_sizes, std::array<bool, 6> wanted) {
  const NoAutograd guard;
  Job job{elman_backward_builder(grad_output, grad_h_n, output, weight_hh, nonlinearity, reverse,
                                 batch_sizes)};
  job.wants_norms = wanted[5];
  check_forward_arguments(job.builder, input, h0, weight_ih);
  run({&job});
  const ForwardPass pass{input, h0, weight_ih, weight_hh, output, reverse};
  return gradients_of(job, pass, wanted);
}

Tensor linear_recurrence(const Tensor& d, const Tensor& g, const Tensor& m,
                         const OptionalTensor& y0, bool reverse,
                         const OptionalTensor& batch_sizes) {
  const NoAutograd guard;
  Job job{linear_recurrence_builder(d, g, m, y0, reverse, batch_sizes)};
  run({&job});
  return job.output;
}

// The fields of DeviceFigures, for the planner's operator.
std::vector<int64_t> cuda_device_figures(int64_t index) {
  const c10::Device device(kDeviceType,
                           kEmulated ? c10::DeviceIndex(-1) : static_cast<c10::DeviceIndex>(index));
  const c10::DeviceGuard guard(device);
  const DeviceFigures f = figures_of(device);
  return {f.capability_major,       f.capability_minor, f.multiprocessors,
          f.shared_bytes_per_block, f.max_cluster_size, f.l2_bytes};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rnn_cuda, library) {
  library.def("cuda_device_figures(int index) -> int[]", cuda_device_figures);
}

TORCH_LIBRARY_IMPL(rnn_cuda, RNN_CUDA_DISPATCH_KEY, library) {
  library.impl("elman_forward", elman_forward);
  library.impl("elman_backward", elman_backward);
  library.impl("elman_gradients", elman_gradients);
  library.impl("linear_recurrence", linear_recurrence);
}

}  // namespace cuda
}  // namespace rnn_cuda
