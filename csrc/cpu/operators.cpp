// The operators on CPU tensors.
// (Files of this name are compiled as one: torch/library.h takes longest to read.)
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "output_pool.h"
#include "recurrence_builder.h"

namespace rnn_cuda::cpu {
namespace {

Tensor pooled(at::IntArrayRef shape, at::ScalarType type) {
  return at::detail::empty_generic(shape, output_allocator(),
                                   c10::DispatchKeySet(c10::DispatchKey::CPU), type, std::nullopt);
}

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Allocates and fills the states, and the last states if wanted.
Tensor run(const RecurrenceBuilder& builder, Tensor* last = nullptr) {
  Recurrence r = builder.recurrence();
  Tensor output = pooled(builder.shape_with(r.hidden_size), builder.type());
  r.output = output.mutable_data_ptr();
  if (last != nullptr) {
    *last = at::empty({r.batch, r.hidden_size}, builder.options());
    r.last = last->mutable_data_ptr();
  }
  cpu::run(r, threads());
  return output;
}

// What the gradients are computed from; the builder's recurrence is the backward one.
Gradients gradients_from(RecurrenceBuilder& builder, const Tensor& x, const Tensor& weight,
                         const OptionalTensor& h0) {
  Gradients g;
  g.backward = builder.recurrence();
  g.input_size = x.size(-1);
  g.input = builder.rows(x, "input", g.input_size);
  g.weight_input = builder.matrix(weight, "weight_ih", g.input_size);
  if (h0) g.initial = builder.block(*h0, "h0", {g.backward.batch, g.backward.hidden_size});
  return g;
}

// Allocates and fills what is wanted of them.
GradientTensors run_gradients(const RecurrenceBuilder& builder, Gradients g, const Tensor& x,
                              const Wanted& wanted) {
  const int64_t batch = g.backward.batch, H = g.backward.hidden_size;
  const auto allocate = [](bool is_wanted, at::IntArrayRef shape, at::ScalarType type) {
    return is_wanted ? pooled(shape, type) : pooled({0}, type);
  };
  const at::ScalarType type = builder.type();
  GradientTensors gradients = {allocate(wanted[0], x.sizes(), type),
                               allocate(wanted[1], {batch, H}, type),
                               allocate(wanted[2], {H, g.input_size}, type),
                               allocate(wanted[3], {H, H}, type),
                               allocate(wanted[4], {H}, builder.compute_type()),
                               allocate(wanted[5], builder.shape_of_rows(), at::kDouble)};
  const auto data_of = [&](const Tensor& tensor, bool is_wanted) {
    return is_wanted ? tensor.mutable_data_ptr() : nullptr;
  };
  g.grad_input = data_of(std::get<0>(gradients), wanted[0]);
  g.grad_initial = data_of(std::get<1>(gradients), wanted[1]);
  g.grad_weight_input = data_of(std::get<2>(gradients), wanted[2]);
  g.grad_weight_hidden = data_of(std::get<3>(gradients), wanted[3]);
  g.grad_bias = data_of(std::get<4>(gradients), wanted[4]);
  g.adjoint_norm = static_cast<double*>(data_of(std::get<5>(gradients), wanted[5]));
  cpu::run(g, threads());
  return gradients;
}

RecurrenceBuilder elman_forward_builder(const Tensor& input, const OptionalTensor& h0,
                                        const Tensor& weight_ih, const Tensor& weight_hh,
                                        const OptionalTensor& bias, std::string_view nonlinearity,
                                        bool reverse, const OptionalTensor& batch_sizes) {
  RecurrenceBuilder builder(input, weight_hh.size(0), batch_sizes, reverse);
  builder.epilogue(epilogues_of(nonlinearity).forward)
      .weight_hidden(weight_hh)
      .input(input, weight_ih)
      .bias(bias)
      .initial(h0);
  return builder;
}

std::tuple<Tensor, Tensor> run_with_last(const RecurrenceBuilder& builder) {
  Tensor h_n;
  Tensor output = run(builder, &h_n);
  return {output, h_n};
}

std::tuple<Tensor, Tensor> elman_forward(const Tensor& input, const OptionalTensor& h0,
                                         const Tensor& weight_ih, const Tensor& weight_hh,
                                         const OptionalTensor& bias, std::string_view nonlinearity,
                                         bool reverse, const OptionalTensor& batch_sizes) {
  return run_with_last(elman_forward_builder(input, h0, weight_ih, weight_hh, bias, nonlinearity,
                                             reverse, batch_sizes));
}

Tensor elman_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                      const Tensor& output, const Tensor& weight_hh, std::string_view nonlinearity,
                      bool reverse, const OptionalTensor& batch_sizes) {
  return run(elman_backward_builder(grad_output, grad_h_n, output, weight_hh, nonlinearity, reverse,
                                    batch_sizes));
}

GradientTensors elman_gradients(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                const Tensor& input, const OptionalTensor& h0,
                                const Tensor& weight_ih, const Tensor& weight_hh,
                                const Tensor& output, std::string_view nonlinearity, bool reverse,
                                const OptionalTensor& batch_sizes, Wanted wanted) {
  RecurrenceBuilder builder = elman_backward_builder(grad_output, grad_h_n, output, weight_hh,
                                                     nonlinearity, reverse, batch_sizes);
  return run_gradients(builder, gradients_from(builder, input, weight_ih, h0), input, wanted);
}

Tensor linear_recurrence(const Tensor& d, const Tensor& g, const Tensor& m,
                         const OptionalTensor& y0, bool reverse,
                         const OptionalTensor& batch_sizes) {
  return run(linear_recurrence_builder(d, g, m, y0, reverse, batch_sizes));
}

// Both directions, one after the other, when the arguments of both have been checked.
std::tuple<Tensor, Tensor, Tensor, Tensor> elman_forward_pair(
    const Tensor& input, const OptionalTensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
    const OptionalTensor& bias, const OptionalTensor& h0_reverse, const Tensor& weight_ih_reverse,
    const Tensor& weight_hh_reverse, const OptionalTensor& bias_reverse,
    std::string_view nonlinearity, const OptionalTensor& batch_sizes) {
  check_one_hidden_size(weight_hh, weight_hh_reverse);
  const RecurrenceBuilder forward = elman_forward_builder(
      input, h0, weight_ih, weight_hh, bias, nonlinearity, /*reverse=*/false, batch_sizes);
  const RecurrenceBuilder reverse =
      elman_forward_builder(input, h0_reverse, weight_ih_reverse, weight_hh_reverse, bias_reverse,
                            nonlinearity, /*reverse=*/true, batch_sizes);
  return std::tuple_cat(run_with_last(forward), run_with_last(reverse));
}

PairGradientTensors elman_gradients_pair(
    const Tensor& input, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
    const Tensor& output, const OptionalTensor& grad_output_reverse,
    const OptionalTensor& grad_h_n_reverse, const OptionalTensor& h0_reverse,
    const Tensor& weight_ih_reverse, const Tensor& weight_hh_reverse, const Tensor& output_reverse,
    std::string_view nonlinearity, const OptionalTensor& batch_sizes, PairWanted wanted) {
  check_one_hidden_size(weight_hh, weight_hh_reverse);
  RecurrenceBuilder builder = elman_backward_builder(grad_output, grad_h_n, output, weight_hh,
                                                     nonlinearity, /*reverse=*/false, batch_sizes);
  RecurrenceBuilder builder_reverse =
      elman_backward_builder(grad_output_reverse, grad_h_n_reverse, output_reverse,
                             weight_hh_reverse, nonlinearity, /*reverse=*/true, batch_sizes);
  const Gradients g = gradients_from(builder, input, weight_ih, h0);
  const Gradients g_reverse = gradients_from(builder_reverse, input, weight_ih_reverse, h0_reverse);
  const GradientTensors forward = run_gradients(builder, g, input, wanted_of_direction(wanted, 0));
  const GradientTensors reverse =
      run_gradients(builder_reverse, g_reverse, input, wanted_of_direction(wanted, 1));
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  return pair_of(std::get<0>(forward).add_(std::get<0>(reverse)), forward, reverse);
}

}  // namespace

TORCH_LIBRARY_IMPL(rnn_cuda, CPU, library) {
  library.impl("elman_forward", elman_forward);
  library.impl("elman_backward", elman_backward);
  library.impl("elman_gradients", elman_gradients);
  library.impl("elman_forward_pair", elman_forward_pair);
  library.impl("elman_gradients_pair", elman_gradients_pair);
  library.impl("linear_recurrence", linear_recurrence);
}

}  // namespace rnn_cuda::cpu
