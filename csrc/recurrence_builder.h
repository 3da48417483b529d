// From tensors to a Recurrence: the checks that every device's operators share.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
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

inline bool is_half(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

// Fills in a Recurrence. Keeps alive what it had to copy; checks what it takes against what is
// already there. In eager code nothing has been checked before (but biases, one by one, in
// layer.h): every tensor has to pass here before any kernel runs. These checks keep memory safe.
// What they refuse, rnn_cuda/functional.py says in the words of its arguments.
//
// A tensor may hold the features, or the states, of `directions` recurrences, of which this one has
// number `direction`.
class RecurrenceBuilder {
 public:
  // `like` is (T, B, features), or (N, features) with batch_sizes.
  RecurrenceBuilder(Epilogue epilogue, const Tensor& like, int64_t hidden_size,
                    const OptionalTensor& batch_sizes, bool reverse, int64_t direction = 0,
                    int64_t directions = 1)
      : counts_(counts_of(epilogue)),
        options_(like.options()),
        direction_(direction),
        directions_(directions) {
    r_.dtype = scalar_type_of(like);
    r_.epilogue = epilogue;
    r_.reverse = reverse;
    r_.hidden_size = hidden_size;
    r_.output_stride = counts_.published * hidden_size;
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

  RecurrenceBuilder& weight_hidden(const Tensor& m) {
    r_.weight_hidden = matrix(m, "the recurrent matrix", counts_.sums * r_.hidden_size,
                              counts_.published * r_.hidden_size);
    weight_hidden_ = m;
    return *this;
  }

  RecurrenceBuilder& input(const Tensor& x, const Tensor& weight) {
    r_.input_size = x.size(-1);
    r_.input = rows(x, "input", r_.input_size);
    r_.weight_input = matrix(weight, "weight_ih", counts_.sums * r_.hidden_size, r_.input_size);
    input_ = x;
    weight_input_ = weight;
    return *this;
  }

  RecurrenceBuilder& bias(const OptionalTensor& bias) {
    if (bias) {
      const auto expected = compute_type();
      const int64_t size = (counts_.sums + counts_.apart) * r_.hidden_size;
      TORCH_CHECK(bias->scalar_type() == expected && bias->device() == options_.device() &&
                      bias->dim() == 1 && bias->size(0) == size,
                  "rnn_cuda: bias must be ", expected, " (", size, ") on ", options_.device(),
                  ", got ", bias->scalar_type(), " ", bias->sizes(), " on ", bias->device());
      r_.bias = keep(*bias).const_data_ptr();
    }
    return *this;
  }

  RecurrenceBuilder& addend(const OptionalTensor& a) {
    if (a) r_.addend = hidden_rows(*a, "the addend", counts_.sums);
    return *this;
  }

  RecurrenceBuilder& operand(const Tensor& e) {
    r_.operand = hidden_rows(e, "the operand", counts_.operands);
    return *this;
  }

  RecurrenceBuilder& initial(const OptionalTensor& s) {
    if (s) r_.initial = state(*s, "the initial state", counts_.published);
    initial_ = s;
    r_.multiplies_zero_initial = true;
    return *this;
  }

  // What units carry before the first step.
  RecurrenceBuilder& initial_carried(const OptionalTensor& c) {
    if (c) r_.initial_carried = state(*c, "the carried state");
    return *this;
  }

  RecurrenceBuilder& functions(const Functions& functions) {
    r_.functions = functions;
    return *this;
  }

  // Of each unit, by value: (constants, H) in compute precision.
  RecurrenceBuilder& constants(const Tensor& k) {
    r_.constants = keep(k).const_data_ptr();
    return *this;
  }

  // Operands that this direction has for itself: (.., V H).
  RecurrenceBuilder& saved_operand(const Tensor& e) {
    r_.operand = rows(e, "what was saved", counts_.operands * r_.hidden_size);
    return *this;
  }

  RecurrenceBuilder& first_addend(const OptionalTensor& a) {
    if (a) r_.first_addend = state(*a, "the first addend", counts_.sums);
    return *this;
  }

  const Recurrence& recurrence() const { return r_; }
  const Counts& counts() const { return counts_; }
  const at::TensorOptions& options() const { return options_; }
  const OptionalTensor& batch_sizes() const { return batch_sizes_; }
  // What it was given, for products by torch.
  const Tensor& input_tensor() const { return input_; }
  const Tensor& weight_input_tensor() const { return weight_input_; }
  const Tensor& weight_hidden_tensor() const { return weight_hidden_; }

  OptionalTensor initial_tensor() const {
    return initial_ && initial_->dim() == 3 ? initial_->select(0, direction_) : initial_;
  }

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
  // A number for each row of one direction: (1, T, B) or (1, N).
  std::vector<int64_t> shape_of_norms() const {
    std::vector<int64_t> shape = shape_of_rows();
    shape.insert(shape.begin(), 1);
    return shape;
  }

  at::ScalarType type() const { return c10::typeMetaToScalarType(options_.dtype()); }

  // Two half-precision biases are added in float32, so their sum comes in that; so does its
  // gradient.
  at::ScalarType compute_type() const { return is_half(type()) ? at::kFloat : type(); }

  Matrix matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
    check_shape(tensor, name, {rows, columns});
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

  // (.., directions V H): this direction's features, V values of each unit.
  Rows hidden_rows(const Tensor& tensor, const char* name, int64_t values = 1) {
    const int64_t features = values * r_.hidden_size;
    Rows all = rows(tensor, name, directions_ * features);
    all.data = advanced(all.data, direction_ * features);
    return all;
  }

  // (directions, B, V H): this direction's states; of one direction also (B, V H).
  const void* state(const Tensor& tensor, const char* name, int64_t values = 1) {
    const int64_t features = values * r_.hidden_size;
    const std::array<int64_t, 3> shape = {directions_, r_.batch, features};
    const bool is_plain = directions_ == 1 && tensor.dim() == 2;
    check_shape(tensor, name, at::IntArrayRef(shape).slice(is_plain ? 1 : 0));
    return advanced(keep(tensor).const_data_ptr(), direction_ * r_.batch * features);
  }

 private:
  const void* advanced(const void* data, int64_t elements) const {
    return static_cast<const char*>(data) +
           elements * static_cast<int64_t>(options_.dtype().itemsize());
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

  const Counts counts_;
  Recurrence r_;
  int64_t total_rows_ = 0;  // with batch_sizes: their sum
  at::TensorOptions options_;
  int64_t direction_, directions_;
  OptionalTensor batch_sizes_, initial_;
  Tensor input_, weight_input_, weight_hidden_;
  std::vector<Tensor> kept_;
};

}  // namespace rnn_cuda
