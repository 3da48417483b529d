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

void check_forward_arguments(RecurrenceBuilder& backward, const Tensor& input,
                             const OptionalTensor& h0, const Tensor& weight_ih) {
  const Recurrence& r = backward.recurrence();
  backward.rows(input, "input", input.size(-1));
  backward.matrix(weight_ih, "weight_ih", input.size(-1));
  if (h0) backward.block(*h0, "h0", {r.batch, r.hidden_size});
}

GradientTensors gradients_of(const Job& backward, const ForwardPass& pass, const Wanted& wanted,
                             const Tensor* other_of_input) {
  const RecurrenceBuilder& builder = backward.builder;
  const c10::DeviceGuard guard(builder.options().device());
  const int64_t hidden = builder.recurrence().hidden_size;
  const Tensor delta = backward.output.view({builder.total_rows(), hidden});
  const Tensor states = pass.output.reshape({builder.total_rows(), hidden});
  const Tensor input = pass.input.reshape({builder.total_rows(), pass.input.size(-1)});
  const Neighbours neighbours(builder, pass.reverse);

  const auto nothing = [&](at::ScalarType type) {
    return at::empty({0}, builder.options().dtype(type));
  };
  const at::ScalarType type = builder.type(), wide = builder.compute_type();
  GradientTensors gradients = {nothing(type), nothing(type), nothing(type),
                               nothing(type), nothing(wide), nothing(at::kDouble)};
  auto& [of_input, of_h0, of_weight_ih, of_weight_hh, of_bias, norms] = gradients;
  if (wanted[0] && other_of_input != nullptr) {
    of_input = *other_of_input;
    of_input.view(input.sizes()).addmm_(delta, pass.weight_ih);
  } else if (wanted[0]) {
    of_input = at::mm(delta, pass.weight_ih).view(pass.input.sizes());
  }
  if (wanted[1]) of_h0 = at::mm(neighbours.first(delta), pass.weight_hh);
  if (wanted[2]) of_weight_ih = at::mm(delta.t(), input);
  if (wanted[3]) {
    of_weight_hh = at::mm(neighbours.current(delta).t(), neighbours.previous(states));
    if (pass.h0) of_weight_hh.addmm_(neighbours.first(delta).t(), *pass.h0);
  }
  if (wanted[4]) of_bias = delta.sum({0}, /*keepdim=*/false, wide);
  if (wanted[5]) norms = backward.norms;
  return gradients;
}

}  // namespace cuda
}  // namespace rnn_cuda
