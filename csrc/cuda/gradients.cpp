#include "gradients.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "runtime.h"

namespace rnn_cuda {
namespace cuda {
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

}  // namespace

void check_forward_arguments(RecurrenceBuilder& backward, const Layer& layer, int64_t d) {
  const int64_t features = layer.input().size(-1);
  backward.rows(layer.input(), "input", features);
  backward.matrix(layer.weight_ih(d), "weight_ih", layer.hidden_size(), features);
  if (const OptionalTensor state = layer.state()) backward.state(*state, "h0");
}

DirectionGradients gradients_of(const Job& backward, const Layer& layer, int64_t d,
                                const Tensor& output, const DirectionWanted& wanted,
                                const Tensor* other_of_input) {
  const RecurrenceBuilder& builder = backward.builder;
  const c10::DeviceGuard guard(builder.options().device());
  const int64_t rows = builder.total_rows(), hidden = layer.hidden_size();
  const Tensor delta = backward.output.view({rows, hidden});
  const Tensor states = output.narrow(-1, d * hidden, hidden).reshape({rows, hidden});
  const Tensor input = layer.input().reshape({rows, layer.input().size(-1)});
  const Neighbours neighbours(builder, layer.is_reverse(d));

  DirectionGradients gradients;
  if (wanted.input && other_of_input != nullptr) {
    gradients.input = *other_of_input;
    gradients.input.view(input.sizes()).addmm_(delta, layer.weight_ih(d));
  } else if (wanted.input) {
    gradients.input = at::mm(delta, layer.weight_ih(d)).view(layer.input().sizes());
  }
  if (wanted.state)
    gradients.state = at::mm(neighbours.first(delta), layer.weight_hh(d)).unsqueeze(0);
  if (wanted.weight_ih) gradients.weight_ih = at::mm(delta.t(), input);
  if (wanted.weight_hh) {
    gradients.weight_hh = at::mm(neighbours.current(delta).t(), neighbours.previous(states));
    if (const OptionalTensor state = layer.state())
      gradients.weight_hh.addmm_(neighbours.first(delta).t(), state->select(0, d));
  }
  if (wanted.bias) gradients.bias = delta.sum({0}, /*keepdim=*/false, builder.compute_type());
  if (wanted.norms) gradients.norms = backward.norms;
  if (wanted.delta) gradients.delta = backward.output;
  return gradients;
}

}  // namespace cuda
}  // namespace rnn_cuda
