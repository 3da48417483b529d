// From tensors to a Recurrence: the checks that every device's operators share.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "recurrence.h"

namespace rnn_cuda {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline ScalarType scalar_type_of(const Tensor& tensor) {
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

inline NonlinearityEpilogues epilogues_of(std::string_view nonlinearity) {
  if (nonlinearity == "tanh") return {Epilogue::Tanh, Epilogue::TanhBackward};
  if (nonlinearity == "relu") return {Epilogue::Relu, Epilogue::ReluBackward};
  if (nonlinearity == "sigmoid") return {Epilogue::Sigmoid, Epilogue::SigmoidBackward};
  if (nonlinearity == "identity") return {Epilogue::Identity, Epilogue::IdentityBackward};
  TORCH_CHECK(false, "rnn_cuda: nonlinearity must be tanh, relu, sigmoid or identity, got '",
              nonlinearity, "'");
}

// Of input, h0, weight_ih, weight_hh, bias; and the adjoints' norm.
using GradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Wanted = std::array<bool, 6>;  // which of them; the others come back without elements

// Of both directions of a layer: of their common input, then of the rest of each.
using PairGradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                       Tensor, Tensor, Tensor, Tensor>;
using PairWanted = std::array<bool, 11>;

inline Wanted wanted_of_direction(const PairWanted& wanted, size_t direction) {
  Wanted own = {wanted[0]};
  for (size_t i = 1; i < own.size(); ++i) own[i] = wanted[5 * direction + i];
  return own;
}

inline PairGradientTensors pair_of(const Tensor& grad_input, const GradientTensors& forward,
                                   const GradientTensors& reverse) {
  const auto but_input = [](const Tensor&, const auto&... rest) { return std::tuple(rest...); };
  return std::tuple_cat(std::tuple(grad_input), std::apply(but_input, forward),
                        std::apply(but_input, reverse));
}

// All else of the two directions' shapes is checked against what they have in common.
inline void check_one_hidden_size(const Tensor& weight_hh, const Tensor& weight_hh_reverse) {
  TORCH_CHECK(weight_hh.sizes() == weight_hh_reverse.sizes(),
              "rnn_cuda: weight_hh_reverse must have shape ", weight_hh.sizes(),
              " as weight_hh has, got ", weight_hh_reverse.sizes());
}

// Fills in a Recurrence. Keeps alive what it had to copy; checks what it takes against what is
// already there. In eager code nothing has been checked before (but biases, one by one, in
// eager_layer.h): every tensor has to pass here before any kernel runs. What is refused, the Python
// layer then explains in friendlier words.
class RecurrenceBuilder {
 public:
  // `like` is (T, B, H), or (N, H) with batch_sizes.
  RecurrenceBuilder(const Tensor& like, int64_t hidden_size, const OptionalTensor& batch_sizes,
                    bool reverse)
      : options_(like.options()) {
    r_.dtype = scalar_type_of(like);
    r_.reverse = reverse;
    r_.hidden_size = hidden_size;
    TORCH_CHECK(hidden_size > 0, "rnn_cuda: expected at least one hidden unit, got ", hidden_size);
    TORCH_CHECK(like.dim() == (batch_sizes ? 2 : 3), "rnn_cuda: expected (T, B, features), or ",
                "(N, features) with batch_sizes; got ", like.sizes());
    if (batch_sizes) {
      const Tensor& sizes = keep(*batch_sizes);
      batch_sizes_ = sizes;
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
    weight_hidden_ = m;
    return *this;
  }

  RecurrenceBuilder& input(const Tensor& x, const Tensor& weight) {
    r_.input_size = x.size(-1);
    r_.input = rows(x, "input", r_.input_size);
    r_.weight_input = matrix(weight, "weight_ih", r_.input_size);
    input_ = x;
    weight_input_ = weight;
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
    initial_ = s;
    r_.multiplies_zero_initial = true;
    return *this;
  }

  RecurrenceBuilder& first_addend(const OptionalTensor& a) {
    if (a) r_.first_addend = block(*a, "the first addend", {r_.batch, r_.hidden_size});
    return *this;
  }

  const Recurrence& recurrence() const { return r_; }
  const at::TensorOptions& options() const { return options_; }
  const OptionalTensor& batch_sizes() const { return batch_sizes_; }
  // What it was given, for products by torch.
  const Tensor& input_tensor() const { return input_; }
  const Tensor& weight_input_tensor() const { return weight_input_; }
  const Tensor& weight_hidden_tensor() const { return weight_hidden_; }
  const OptionalTensor& initial_tensor() const { return initial_; }

  // Rows of all time steps together.
  int64_t total_rows() const {
    return r_.batch_sizes != nullptr ? total_rows_ : r_.time_steps * r_.batch;
  }

  // (T, B, features) or (N, features); or without the features.
  std::vector<int64_t> shape_with(int64_t features) const {
    std::vector<int64_t> shape = shape_of_rows();
    shape.push_back(features);
    return shape;
  }
  std::vector<int64_t> shape_of_rows() const {
    if (r_.batch_sizes != nullptr) return {total_rows_};
    return {r_.time_steps, r_.batch};
  }

  at::ScalarType type() const { return c10::typeMetaToScalarType(options_.dtype()); }

  // Two half-precision biases are added in float32, so their sum comes in that; so does its
  // gradient.
  at::ScalarType compute_type() const {
    const bool half = r_.dtype == ScalarType::BFloat16 || r_.dtype == ScalarType::Float16;
    return half ? at::kFloat : type();
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

 private:
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

  Recurrence r_;
  int64_t total_rows_ = 0;  // with batch_sizes: their sum
  at::TensorOptions options_;
  OptionalTensor batch_sizes_, initial_;
  Tensor input_, weight_input_, weight_hidden_;
  std::vector<Tensor> kept_;
};

// Against the direction of the forward pass, with U^T; dL/dh_n meets each sample at its last step.
inline RecurrenceBuilder elman_backward_builder(const OptionalTensor& grad_output,
                                                const OptionalTensor& grad_h_n,
                                                const Tensor& output, const Tensor& weight_hh,
                                                std::string_view nonlinearity, bool reverse,
                                                const OptionalTensor& batch_sizes) {
  RecurrenceBuilder builder(output, weight_hh.size(0), batch_sizes, !reverse);
  builder.epilogue(epilogues_of(nonlinearity).backward)
      .weight_hidden(weight_hh.t())
      .addend(grad_output)
      .first_addend(grad_h_n)
      .operand(output);
  return builder;
}

// y_t = d_t * (g_t + M y_{t-1})
inline RecurrenceBuilder linear_recurrence_builder(const Tensor& d, const Tensor& g,
                                                   const Tensor& m, const OptionalTensor& y0,
                                                   bool reverse,
                                                   const OptionalTensor& batch_sizes) {
  RecurrenceBuilder builder(g, m.size(0), batch_sizes, reverse);
  builder.epilogue(Epilogue::Modulate).weight_hidden(m).addend(g).operand(d).initial(y0);
  return builder;
}

}  // namespace rnn_cuda
