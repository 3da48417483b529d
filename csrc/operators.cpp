// The operators' schemas, and their CPU side: checks, memory, and a Recurrence for the kernel.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "cpu/output_pool.h"
#include "recurrence.h"

namespace rnn_cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

ScalarType scalar_type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return ScalarType::Float32;
    case at::kDouble: return ScalarType::Float64;
    case at::kBFloat16: return ScalarType::BFloat16;
    case at::kHalf: return ScalarType::Float16;
    default:
      TORCH_CHECK(false,
                  "rnn_cuda: expected a tensor of float32, float64, bfloat16 or float16, got ",
                  tensor.scalar_type());
  }
}

struct NonlinearityEpilogues {
  Epilogue forward, backward;
};

NonlinearityEpilogues epilogues_of(std::string_view nonlinearity) {
  if (nonlinearity == "tanh") return {Epilogue::Tanh, Epilogue::TanhBackward};
  if (nonlinearity == "relu") return {Epilogue::Relu, Epilogue::ReluBackward};
  if (nonlinearity == "sigmoid") return {Epilogue::Sigmoid, Epilogue::SigmoidBackward};
  if (nonlinearity == "identity") return {Epilogue::Identity, Epilogue::IdentityBackward};
  TORCH_CHECK(false, "rnn_cuda: nonlinearity must be tanh, relu, sigmoid or identity, got '",
              nonlinearity, "'");
}

// Of input, h0, weight_ih, weight_hh, bias; and the adjoints' norm.
using GradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Fills in a Recurrence. Keeps alive what it had to copy; checks what it takes against what is
// already there. (The Python layer has said the same in friendlier words before.)
class RecurrenceBuilder {
 public:
  // `like` is (T, B, H), or (N, H) with batch_sizes.
  RecurrenceBuilder(const Tensor& like, int64_t hidden_size, const OptionalTensor& batch_sizes,
                    bool reverse)
      : options_(like.options()) {
    r_.dtype = scalar_type_of(like);
    r_.reverse = reverse;
    r_.hidden_size = hidden_size;
    TORCH_CHECK(like.dim() == (batch_sizes ? 2 : 3), "rnn_cuda: expected (T, B, features), or ",
                "(N, features) with batch_sizes; got ", like.sizes());
    if (batch_sizes) {
      const Tensor& sizes = keep(*batch_sizes);
      TORCH_CHECK(sizes.device().is_cpu() && sizes.scalar_type() == at::kLong && sizes.dim() == 1 &&
                      sizes.numel() > 0,
                  "rnn_cuda: batch_sizes must be a one-dimensional int64 CPU tensor, not empty");
      r_.batch_sizes = sizes.const_data_ptr<int64_t>();
      r_.time_steps = sizes.numel();
      r_.batch = r_.batch_sizes[0];
      int64_t previous = r_.batch;
      for (int64_t t = 0; t < r_.time_steps; ++t) {
        const int64_t size = r_.batch_sizes[t];
        TORCH_CHECK(0 < size && size <= previous,
                    "rnn_cuda: batch_sizes must be positive and not increasing");
        total_rows_ += previous = size;
      }
      TORCH_CHECK(total_rows_ == like.size(0), "rnn_cuda: batch_sizes add up to ", total_rows_,
                  " rows, got ", like.size(0));
    } else {
      TORCH_CHECK(like.size(0) > 0, "rnn_cuda: expected at least one time step, got ",
                  like.sizes());
      r_.time_steps = like.size(0);
      r_.batch = like.size(1);
    }
  }

  RecurrenceBuilder& epilogue(Epilogue epilogue) {
    r_.epilogue = epilogue;
    return *this;
  }

  RecurrenceBuilder& weight_hidden(const Tensor& m) {
    r_.weight_hidden = matrix(m, "the recurrent matrix", r_.hidden_size);
    return *this;
  }

  RecurrenceBuilder& input(const Tensor& x, const Tensor& weight) {
    r_.input_size = x.size(-1);
    r_.input = rows(x, "input", r_.input_size);
    r_.weight_input = matrix(weight, "weight_ih", r_.input_size);
    return *this;
  }

  RecurrenceBuilder& bias(const OptionalTensor& bias) {
    if (bias) {
      const auto expected = compute_type();
      TORCH_CHECK(bias->scalar_type() == expected && bias->device() == options_.device() &&
                      bias->dim() == 1 && bias->size(0) == r_.hidden_size,
                  "rnn_cuda: bias must be ", expected, " (", r_.hidden_size, ") on ",
                  options_.device(), ", got ", bias->scalar_type(), " ", bias->sizes(), " on ",
                  bias->device());
      r_.bias = keep(*bias).const_data_ptr();
    }
    return *this;
  }

  RecurrenceBuilder& addend(const OptionalTensor& a) {
    if (a) r_.addend = rows(*a, "the addend", r_.hidden_size);
    return *this;
  }

  RecurrenceBuilder& operand(const Tensor& e) {
    r_.operand = rows(e, "the operand", r_.hidden_size);
    return *this;
  }

  RecurrenceBuilder& initial(const OptionalTensor& s) {
    if (s) r_.initial = block(*s, "the initial state", {r_.batch, r_.hidden_size});
    r_.multiplies_zero_initial = true;
    return *this;
  }

  RecurrenceBuilder& first_addend(const OptionalTensor& a) {
    if (a) r_.first_addend = block(*a, "the first addend", {r_.batch, r_.hidden_size});
    return *this;
  }

  // Allocates and fills the states, and the last states if wanted.
  Tensor run(Tensor* last = nullptr) {
    const auto type = c10::typeMetaToScalarType(options_.dtype());
    Tensor output = r_.batch_sizes != nullptr
                        ? pooled({total_rows_, r_.hidden_size}, type)
                        : pooled({r_.time_steps, r_.batch, r_.hidden_size}, type);
    r_.output = output.mutable_data_ptr();
    if (last != nullptr) {
      *last = at::empty({r_.batch, r_.hidden_size}, options_);
      r_.last = last->mutable_data_ptr();
    }
    cpu::run(r_, threads());
    return output;
  }

  // The recurrence being the backward one: what is wanted of the gradients.
  GradientTensors run_gradients(const Tensor& x, const Tensor& weight, const OptionalTensor& h0,
                                std::array<bool, 6> wanted) {
    Gradients g;
    g.input_size = x.size(-1);
    g.input = rows(x, "input", g.input_size);
    g.weight_input = matrix(weight, "weight_ih", g.input_size);
    if (h0) g.initial = block(*h0, "h0", {r_.batch, r_.hidden_size});
    const auto allocate = [](bool is_wanted, at::IntArrayRef shape, at::ScalarType type) {
      return is_wanted ? pooled(shape, type) : pooled({0}, type);
    };
    const auto type = c10::typeMetaToScalarType(options_.dtype());
    const int64_t H = r_.hidden_size;
    GradientTensors gradients = {allocate(wanted[0], x.sizes(), type),
                                 allocate(wanted[1], {r_.batch, H}, type),
                                 allocate(wanted[2], {H, g.input_size}, type),
                                 allocate(wanted[3], {H, H}, type),
                                 allocate(wanted[4], {H}, compute_type()),
                                 allocate(wanted[5], x.sizes().slice(0, x.dim() - 1), at::kDouble)};
    const auto data_of = [&](const Tensor& tensor, bool is_wanted) {
      return is_wanted ? tensor.mutable_data_ptr() : nullptr;
    };
    g.grad_input = data_of(std::get<0>(gradients), wanted[0]);
    g.grad_initial = data_of(std::get<1>(gradients), wanted[1]);
    g.grad_weight_input = data_of(std::get<2>(gradients), wanted[2]);
    g.grad_weight_hidden = data_of(std::get<3>(gradients), wanted[3]);
    g.grad_bias = data_of(std::get<4>(gradients), wanted[4]);
    g.adjoint_norm = static_cast<double*>(data_of(std::get<5>(gradients), wanted[5]));
    g.backward = r_;
    cpu::run(g, threads());
    return gradients;
  }

 private:
  static Tensor pooled(at::IntArrayRef shape, at::ScalarType type) {
    return at::detail::empty_generic(shape, cpu::output_allocator(),
                                     c10::DispatchKeySet(c10::DispatchKey::CPU), type,
                                     std::nullopt);
  }

  static int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

  // Two half-precision biases are added in float32, so their sum comes in that; so does its
  // gradient.
  at::ScalarType compute_type() const {
    const bool half = r_.dtype == ScalarType::BFloat16 || r_.dtype == ScalarType::Float16;
    return half ? at::kFloat : c10::typeMetaToScalarType(options_.dtype());
  }

  const Tensor& keep(const Tensor& tensor) { return kept_.emplace_back(tensor.contiguous()); }

  void check_type(const Tensor& tensor, const char* name) const {
    TORCH_CHECK(tensor.scalar_type() == options_.dtype() && tensor.device() == options_.device(),
                "rnn_cuda: ", name, " must be ", options_.dtype(), " on ", options_.device(),
                ", got ", tensor.scalar_type(), " on ", tensor.device());
  }

  void check_shape(const Tensor& tensor, const char* name, at::IntArrayRef expected) const {
    check_type(tensor, name);
    TORCH_CHECK(tensor.sizes() == expected, "rnn_cuda: ", name, " must have shape ", expected,
                ", got ", tensor.sizes());
  }

  Matrix matrix(const Tensor& tensor, const char* name, int64_t columns) {
    check_shape(tensor, name, {r_.hidden_size, columns});
    if (tensor.stride(1) != 1 && tensor.stride(0) == 1)
      return {tensor.const_data_ptr(), tensor.stride(1), /*transposed=*/true};
    const bool readable = tensor.stride(1) == 1 || columns <= 1;
    const Tensor& m = readable ? kept_.emplace_back(tensor) : keep(tensor);
    return {m.const_data_ptr(), m.stride(0), /*transposed=*/false};
  }

  // Any strides between rows will do (views, expanded gradients); features must be contiguous.
  Rows rows(const Tensor& tensor, const char* name, int64_t features) {
    if (r_.batch_sizes != nullptr)
      check_shape(tensor, name, {total_rows_, features});
    else
      check_shape(tensor, name, {r_.time_steps, r_.batch, features});
    const bool readable = tensor.stride(-1) == 1 || features == 1;
    const Tensor& t = readable ? kept_.emplace_back(tensor) : keep(tensor);
    return {t.const_data_ptr(), r_.batch_sizes != nullptr ? 0 : t.stride(0), t.stride(-2)};
  }

  const void* block(const Tensor& tensor, const char* name, at::IntArrayRef shape) {
    check_shape(tensor, name, shape);
    return keep(tensor).const_data_ptr();
  }

  Recurrence r_;
  int64_t total_rows_ = 0;  // with batch_sizes: their sum
  at::TensorOptions options_;
  std::vector<Tensor> kept_;
};

std::tuple<Tensor, Tensor> elman_forward(const Tensor& input, const OptionalTensor& h0,
                                         const Tensor& weight_ih, const Tensor& weight_hh,
                                         const OptionalTensor& bias, std::string_view nonlinearity,
                                         bool reverse, const OptionalTensor& batch_sizes) {
  Tensor h_n;
  Tensor output = RecurrenceBuilder(input, weight_hh.size(0), batch_sizes, reverse)
                      .epilogue(epilogues_of(nonlinearity).forward)
                      .weight_hidden(weight_hh)
                      .input(input, weight_ih)
                      .bias(bias)
                      .initial(h0)
                      .run(&h_n);
  return {output, h_n};
}

// Against the direction of the forward pass, with U^T; dL/dh_n meets each sample at its last step.
RecurrenceBuilder elman_backward_builder(const OptionalTensor& grad_output,
                                         const OptionalTensor& grad_h_n, const Tensor& output,
                                         const Tensor& weight_hh, std::string_view nonlinearity,
                                         bool reverse, const OptionalTensor& batch_sizes) {
  RecurrenceBuilder builder(output, weight_hh.size(0), batch_sizes, !reverse);
  builder.epilogue(epilogues_of(nonlinearity).backward)
      .weight_hidden(weight_hh.t())
      .addend(grad_output)
      .first_addend(grad_h_n)
      .operand(output);
  return builder;
}

Tensor elman_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                      const Tensor& output, const Tensor& weight_hh, std::string_view nonlinearity,
                      bool reverse, const OptionalTensor& batch_sizes) {
  return elman_backward_builder(grad_output, grad_h_n, output, weight_hh, nonlinearity, reverse,
                                batch_sizes)
      .run();
}

// `wanted` says which of the results; the others come back without elements.
GradientTensors elman_gradients(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                const Tensor& input, const OptionalTensor& h0,
                                const Tensor& weight_ih, const Tensor& weight_hh,
                                const Tensor& output, std::string_view nonlinearity, bool reverse,
                                const OptionalTensor& batch_sizes, std::array<bool, 6> wanted) {
  return elman_backward_builder(grad_output, grad_h_n, output, weight_hh, nonlinearity, reverse,
                                batch_sizes)
      .run_gradients(input, weight_ih, h0, wanted);
}

Tensor linear_recurrence(const Tensor& d, const Tensor& g, const Tensor& m,
                         const OptionalTensor& y0, bool reverse,
                         const OptionalTensor& batch_sizes) {
  return RecurrenceBuilder(g, m.size(0), batch_sizes, reverse)
      .epilogue(Epilogue::Modulate)
      .weight_hidden(m)
      .addend(g)
      .operand(d)
      .initial(y0)
      .run();
}

}  // namespace

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
  // y_t = d_t * (g_t + M y_{t-1})
  library.def(
      "linear_recurrence(Tensor d, Tensor g, Tensor m, Tensor? y0, bool reverse, "
      "Tensor? batch_sizes) -> Tensor");
}

TORCH_LIBRARY_IMPL(rnn_cuda, CPU, library) {
  library.impl("elman_forward", elman_forward);
  library.impl("elman_backward", elman_backward);
  library.impl("elman_gradients", elman_gradients);
  library.impl("linear_recurrence", linear_recurrence);
}

}  // namespace rnn_cuda
