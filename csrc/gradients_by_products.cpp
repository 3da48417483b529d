#include "gradients_by_products.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "to_device.h"

namespace rnn_cuda {
namespace {

// Row numbers of neighbours in time: current[i] comes right after previous[i] in the direction of
// the forward pass; `first` are each sample's first rows. Ranges, or tensors of indices.
class Neighbours {
 public:
  Neighbours(const RecurrenceBuilder& builder, bool reverse)
      : builder_(builder),
        reverse_(reverse),
        rows_(builder.total_rows()),
        batch_(builder.recurrence().batch) {}

  Tensor first(const Tensor& rows) const {
    if (!reverse_) return rows.narrow(0, 0, batch_);
    if (!builder_.batch_sizes()) return rows.narrow(0, rows_ - batch_, batch_);
    return rows.index_select(0, last_steps());
  }
  Tensor current(const Tensor& rows) const { return reverse_ ? earlier(rows) : later(rows); }
  Tensor previous(const Tensor& rows) const { return reverse_ ? later(rows) : earlier(rows); }

 private:
  // Of each pair of neighbours, the row of the later time step, and of the earlier one.
  Tensor later(const Tensor& rows) const { return rows.narrow(0, batch_, rows_ - batch_); }
  Tensor earlier(const Tensor& rows) const {
    if (!builder_.batch_sizes()) return rows.narrow(0, 0, rows_ - batch_);
    Tensor indices = at::empty({rows_ - batch_}, at::kLong);
    int64_t* index = indices.mutable_data_ptr<int64_t>();
    const Recurrence& r = builder_.recurrence();
    for (int64_t t = 1, row = batch_; t < r.time_steps; ++t)
      for (int64_t b = 0; b < r.batch_sizes[t]; ++b, ++row) *index++ = row - r.batch_sizes[t - 1];
    return rows.index_select(0, to_device(indices, rows.device()));
  }

  // Rows in which the samples of a packed sequence have their last step.
  Tensor last_steps() const {
    Tensor indices = at::empty({batch_}, at::kLong);
    int64_t* index = indices.mutable_data_ptr<int64_t>();
    const Recurrence& r = builder_.recurrence();
    int64_t row = 0;
    for (int64_t t = 0; t < r.time_steps; row += r.batch_sizes[t++]) {
      const int64_t going_on = t + 1 < r.time_steps ? r.batch_sizes[t + 1] : 0;
      for (int64_t b = going_on; b < r.batch_sizes[t]; ++b) index[b] = row + b;
    }
    return to_device(indices, builder_.options().device());
  }

  const RecurrenceBuilder& builder_;
  bool reverse_;
  int64_t rows_, batch_;
};

// A product with few columns is several times as fast the other way round, as its transpose.
bool is_faster_transposed(int64_t columns, int64_t rows) { return columns <= 16 && columns < rows; }

// The sum over rows of left^T right. Of many rows a piece at a time: of few columns, a library adds
// up all rows one after the other, and loses digits.
Tensor outer_product(const Tensor& left, const Tensor& right) {
  if (is_faster_transposed(right.size(1), left.size(1)))
    return outer_product(right, left).t().contiguous();
  constexpr int64_t kFewColumns = 8;
  const int64_t rows = left.size(0);
  const bool is_narrow = std::min(left.size(1), right.size(1)) <= kFewColumns;
  const int64_t rows_at_once = is_narrow ? 1 << 11 : 1 << 16;
  const auto product = [&](int64_t row) {
    const int64_t count = std::min(rows_at_once, rows - row);
    return at::mm(left.narrow(0, row, count).t(), right.narrow(0, row, count));
  };
  Tensor sum = product(0);
  for (int64_t row = rows_at_once; row < rows; row += rows_at_once) sum.add_(product(row));
  return sum;
}

}  // namespace

void check_forward_arguments(RecurrenceBuilder& backward, const Layer& layer, int64_t d) {
  const int64_t features = layer.input().size(-1);
  backward.rows(layer.input(), "input", features);
  backward.matrix(layer.weight_ih(d), "weight_ih", layer.counts().sums * layer.hidden_size(),
                  features);
  for (int64_t i = 0; i < layer.states(); ++i)
    if (const OptionalTensor state = layer.state(i)) backward.state(*state, i == 0 ? "h0" : "c0");
}

void constant_gradients(const RecurrenceBuilder& backward, const Layer& layer, int64_t d,
                        const Tensor& output, const Tensor& saved, const Tensor& adjoint,
                        DirectionGradients& gradients) {
  const int64_t rows = backward.total_rows(), hidden = layer.hidden_size();
  const Tensor adjoints = adjoint.view({rows, hidden});
  const Tensor states = output.narrow(-1, d * hidden, hidden).reshape({rows, hidden});
  const Neighbours neighbours(backward, layer.is_reverse(d));
  // Products in compute precision, which a half times a float has.
  gradients.constants[0] = neighbours.current(adjoints).mul(neighbours.previous(states)).sum(0);
  if (const OptionalTensor state = layer.state(0))
    gradients.constants[0].add_(neighbours.first(adjoints).mul(state->select(0, d)).sum(0));
  for (int k = 1; k < layer.counts().constants; ++k)
    gradients.constants[k] =
        adjoints.mul(saved.view({rows, -1}).narrow(-1, (k - 1) * hidden, hidden)).sum(0);
}

void gradients_by_products(const RecurrenceBuilder& backward, const BackwardResults& results,
                           const Layer& layer, int64_t d, const Tensor& output,
                           const DirectionWanted& wanted, const Tensor* other_of_input,
                           DirectionGradients& gradients) {
  const c10::DeviceGuard guard(backward.options().device());
  const int64_t rows = backward.total_rows(), hidden = layer.hidden_size();
  const Counts& counts = layer.counts();
  const Tensor delta = results.delta.view({rows, counts.sums * hidden});
  Tensor delta_input = delta;  // as W x sees it
  if (counts.apart > 0)
    delta_input = at::cat({delta.narrow(-1, 0, (counts.sums - counts.apart) * hidden),
                           results.apart.view({rows, counts.apart * hidden})},
                          -1);
  const Tensor input = layer.input().reshape({rows, layer.input().size(-1)});
  const Neighbours neighbours(backward, layer.is_reverse(d));

  if (wanted.input && other_of_input != nullptr) {
    gradients.input = *other_of_input;
    Tensor grad_input = gradients.input.view(input.sizes());
    if (is_faster_transposed(input.size(1), rows))
      grad_input.add_(at::mm(layer.weight_ih(d).t(), delta_input.t()).t());
    else
      grad_input.addmm_(delta_input, layer.weight_ih(d));
  } else if (wanted.input) {
    gradients.input = at::mm(delta_input, layer.weight_ih(d)).view(layer.input().sizes());
  }
  if (wanted.states[0]) {
    Tensor& state = gradients.states[0];
    state = at::mm(neighbours.first(delta), layer.weight_hh(d)).unsqueeze(0);
    if (counts.carried > 0 && layer.states() == 1) state.add_(results.carried);
  }
  if (wanted.states[1]) gradients.states[1] = results.carried;
  if (wanted.weight_ih) gradients.weight_ih = outer_product(delta_input, input);
  if (wanted.weight_hh) {
    const Tensor states = output.narrow(-1, d * hidden, hidden).reshape({rows, hidden});
    const OptionalTensor state = layer.state(0);
    if (state && backward.recurrence().time_steps == 1) {
      gradients.weight_hh = outer_product(delta, state->select(0, d));
    } else {
      gradients.weight_hh = outer_product(neighbours.current(delta), neighbours.previous(states));
      if (state) gradients.weight_hh.addmm_(neighbours.first(delta).t(), state->select(0, d));
    }
  }
  const auto sum = [&](const Tensor& deltas) {
    return deltas.sum({0}, /*keepdim=*/false, backward.compute_type());
  };
  if (wanted.bias) gradients.bias_ih = sum(delta_input);
  if (wanted.bias && counts.apart > 0) gradients.bias_hh = sum(delta);
  if (wanted.delta) gradients.delta = results.delta;
}

}  // namespace rnn_cuda
