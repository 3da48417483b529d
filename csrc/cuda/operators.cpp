// The operators on CUDA tensors; emulated, on CPU tensors.
// (Files of this name are compiled as one: torch/library.h takes longest to read.)
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "execution.h"
#include "gradients.h"
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

// The backward recurrence of elman_gradients.
Job backward_job(const ForwardPass& pass, const OptionalTensor& grad_output,
                 const OptionalTensor& grad_h_n, std::string_view nonlinearity,
                 const OptionalTensor& batch_sizes, bool wants_norms) {
  Job job{elman_backward_builder(grad_output, grad_h_n, pass.output, pass.weight_hh, nonlinearity,
                                 pass.reverse, batch_sizes)};
  job.wants_norms = wants_norms;
  check_forward_arguments(job.builder, pass.input, pass.h0, pass.weight_ih);
  return job;
}

GradientTensors elman_gradients(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                const Tensor& input, const OptionalTensor& h0,
                                const Tensor& weight_ih, const Tensor& weight_hh,
                                const Tensor& output, std::string_view nonlinearity, bool reverse,
                                const OptionalTensor& batch_sizes, Wanted wanted) {
  const NoAutograd guard;
  const ForwardPass pass{input, h0, weight_ih, weight_hh, output, reverse};
  Job job = backward_job(pass, grad_output, grad_h_n, nonlinearity, batch_sizes, wanted[5]);
  run({&job});
  return gradients_of(job, pass, wanted);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> elman_forward_pair(
    const Tensor& input, const OptionalTensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
    const OptionalTensor& bias, const OptionalTensor& h0_reverse, const Tensor& weight_ih_reverse,
    const Tensor& weight_hh_reverse, const OptionalTensor& bias_reverse,
    std::string_view nonlinearity, const OptionalTensor& batch_sizes) {
  const NoAutograd guard;
  check_one_hidden_size(weight_hh, weight_hh_reverse);
  Job forward = forward_job(input, h0, weight_ih, weight_hh, bias, nonlinearity, /*reverse=*/false,
                            batch_sizes);
  Job reverse = forward_job(input, h0_reverse, weight_ih_reverse, weight_hh_reverse, bias_reverse,
                            nonlinearity, /*reverse=*/true, batch_sizes);
  run({&forward, &reverse});
  return {forward.output, forward.last, reverse.output, reverse.last};
}

PairGradientTensors elman_gradients_pair(
    const Tensor& input, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
    const Tensor& output, const OptionalTensor& grad_output_reverse,
    const OptionalTensor& grad_h_n_reverse, const OptionalTensor& h0_reverse,
    const Tensor& weight_ih_reverse, const Tensor& weight_hh_reverse, const Tensor& output_reverse,
    std::string_view nonlinearity, const OptionalTensor& batch_sizes, PairWanted wanted) {
  const NoAutograd guard;
  check_one_hidden_size(weight_hh, weight_hh_reverse);
  const ForwardPass pass{input, h0, weight_ih, weight_hh, output, /*reverse=*/false};
  const ForwardPass reverse_pass{
      input, h0_reverse, weight_ih_reverse, weight_hh_reverse, output_reverse, /*reverse=*/true};
  const Wanted of_forward = wanted_of_direction(wanted, 0);
  const Wanted of_reverse = wanted_of_direction(wanted, 1);
  Job forward = backward_job(pass, grad_output, grad_h_n, nonlinearity, batch_sizes, of_forward[5]);
  Job reverse = backward_job(reverse_pass, grad_output_reverse, grad_h_n_reverse, nonlinearity,
                             batch_sizes, of_reverse[5]);
  run({&forward, &reverse});
  const GradientTensors first = gradients_of(forward, pass, of_forward);
  const Tensor& of_input = std::get<0>(first);
  return pair_of(of_input, first, gradients_of(reverse, reverse_pass, of_reverse, &of_input));
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
  library.impl("elman_forward", elman_forward);
  library.impl("elman_backward", elman_backward);
  library.impl("elman_gradients", elman_gradients);
  library.impl("elman_forward_pair", elman_forward_pair);
  library.impl("elman_gradients_pair", elman_gradients_pair);
  library.impl("linear_recurrence", linear_recurrence);
}

}  // namespace cuda
}  // namespace rnn_cuda
