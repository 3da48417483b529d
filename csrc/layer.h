// A layer as the operators take it: lists of tensors, for one direction of time or for both.
//
//   states    the initial state (D, B, H), or nothing for zeros
//   weights   of each direction in turn: weight_ih, weight_hh and up to two biases
//   output    (T, B, D H), or packed (N, D H): the directions' states side by side
//   saved     nothing: an Elman layer's derivative is read off its output
//
// D is the number of directions; the second runs against time.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>

#include <string>
#include <string_view>
#include <vector>

#include "recurrence_builder.h"

namespace rnn_cuda {

using at::TensorList;
using Tensors = std::vector<Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;

inline Cell cell_named(std::string_view name) {
  std::string names;
  for (const Cell& cell : kCells) {
    if (cell.name == name) return cell;
    names.append(names.empty() ? "" : ", ").append(cell.name);
  }
  TORCH_CHECK_VALUE(false, "cell: expected one of ", names, "; got '", name, "'");
}

// torch's own operators, called from a kernel, must not be recorded by autograd.
using NoAutograd = at::AutoDispatchBelowADInplaceOrView;

// A tensor of each direction, joined along a dimension.
template <class Parts>
Tensor joined(const Parts* parts, int64_t directions, Tensor Parts::* member, int64_t dim) {
  return directions == 1 ? parts[0].*member : at::cat({parts[0].*member, parts[1].*member}, dim);
}

// What layer_gradients may compute for one direction; nothing where it is not wanted.
struct DirectionGradients {
  Tensor input;                       // as the layer's
  Tensor state;                       // (1, B, H)
  Tensor weight_ih, weight_hh, bias;  // the bias in the type that halves compute in
  Tensor norms;                       // (1, T, B) or (1, N), float64
  Tensor delta;                       // (T, B, H) or (N, H)
};

struct DirectionWanted {
  bool input, state, weight_ih, weight_hh, bias, norms, delta;

  bool only_delta() const {
    return delta && !(input || state || weight_ih || weight_hh || bias || norms);
  }
  bool anything() const {
    return input || state || weight_ih || weight_hh || bias || norms || delta;
  }
};

// The arguments of an operator. What they have in common is checked here, all else by a
// RecurrenceBuilder.
class Layer {
 public:
  Layer(const Tensor& input, TensorList states, TensorList weights, std::string_view cell,
        std::string_view direction, const OptionalTensor& batch_sizes)
      : input_(input),
        states_(states),
        weights_(weights),
        cell_(cell_named(cell)),
        directions_(direction == "both" ? 2 : 1),
        is_reverse_(direction == "reverse"),
        batch_sizes_(batch_sizes),
        per_direction_(static_cast<int64_t>(weights.size()) / directions_) {
    TORCH_CHECK_VALUE(direction == "forward" || direction == "reverse" || direction == "both",
                      "direction: expected forward, reverse or both; got '", direction, "'");
    TORCH_CHECK_VALUE(2 <= per_direction_ && per_direction_ <= 4 &&
                          per_direction_ * directions_ == static_cast<int64_t>(weights.size()),
                      "weights: expected weight_ih, weight_hh and up to two biases of each of ",
                      directions_, " directions, got ", weights.size(), " tensors");
    TORCH_CHECK_VALUE(states.size() <= 1, "states: expected h0 or nothing, got ", states.size(),
                      " tensors");
    scalar_type_of(input);  // throws if there are no kernels for it
    for (int64_t d = 0; d < directions_; ++d) {
      TORCH_CHECK(weight_hh(d).dim() == 2 && weight_hh(d).size(0) == hidden_size(),
                  "rnn_cuda: weight_hh must have shape (H, H), the same in both directions, got ",
                  weight_hh(d).sizes());
      for (int64_t i = 2; i < per_direction_; ++i) check_bias(weight(d, i));
    }
  }

  int64_t directions() const { return directions_; }
  bool is_reverse(int64_t d) const { return is_reverse_ || d == 1; }
  int64_t hidden_size() const { return weight_hh(0).size(0); }
  const Tensor& input() const { return input_; }
  const Tensor& weight_ih(int64_t d) const { return weight(d, 0); }
  const Tensor& weight_hh(int64_t d) const { return weight(d, 1); }
  OptionalTensor state() const {
    return states_.empty() ? std::nullopt : OptionalTensor(states_[0]);
  }

  RecurrenceBuilder forward(int64_t d) const {
    RecurrenceBuilder builder(cell_.forward, input_, hidden_size(), batch_sizes_, is_reverse(d), d,
                              directions_);
    builder.weight_hidden(weight_hh(d)).input(input_, weight_ih(d)).bias(bias(d)).initial(state());
    return builder;
  }

  // Against the direction of the forward pass, with U^T; dL/dh_n meets each sample at its last
  // step. `grads` are those of output and h_n.
  RecurrenceBuilder backward(int64_t d, const OptionalTensors& grads, const Tensor& output) const {
    TORCH_CHECK_VALUE(grads.size() == 2, "grads: expected those of output and h_n, got ",
                      grads.size());
    RecurrenceBuilder builder(cell_.backward, output, hidden_size(), batch_sizes_, !is_reverse(d),
                              d, directions_);
    builder.weight_hidden(weight_hh(d).t())
        .addend(grads.get(0))
        .first_addend(grads.get(1))
        .operand(output);
    return builder;
  }

  // `wanted` goes through input, states and weights, then the adjoints' norms, then delta.
  DirectionWanted wanted(int64_t d, const c10::List<bool>& wanted) const {
    const size_t weights = 1 + states_.size(), first = weights + per_direction_ * d;
    const size_t extra = weights + weights_.size();
    TORCH_CHECK_VALUE(wanted.size() == extra + 2, "wanted: expected ", extra + 2, " bools, got ",
                      wanted.size());
    DirectionWanted result = {wanted.get(0),        !states_.empty() && wanted.get(1),
                              wanted.get(first),    wanted.get(first + 1),
                              /*bias=*/false,       wanted.get(extra),
                              wanted.get(extra + 1)};
    for (int64_t i = 2; i < per_direction_; ++i) result.bias |= wanted.get(first + i);
    return result;
  }

  // Those that are wanted, in that order, of both directions together. The input's gradient is
  // that of the first, which holds the sum.
  Tensors results(const DirectionGradients* gradients, const c10::List<bool>& wanted) const {
    Tensors results;
    if (wanted.get(0)) results.push_back(gradients[0].input);
    size_t next = 1;
    if (!states_.empty() && wanted.get(next++))
      results.push_back(joined(gradients, directions_, &DirectionGradients::state, 0));
    for (int64_t d = 0; d < directions_; ++d) {
      if (wanted.get(next++)) results.push_back(gradients[d].weight_ih);
      if (wanted.get(next++)) results.push_back(gradients[d].weight_hh);
      bool is_given = false;
      for (int64_t i = 2; i < per_direction_; ++i) {
        if (!wanted.get(next++)) continue;
        const Tensor bias = gradients[d].bias.to(input_.scalar_type());
        // Not the same tensor twice: scaling one gradient in place would scale both.
        results.push_back(is_given ? bias.clone() : bias);
        is_given = true;
      }
    }
    if (wanted.get(next++))
      results.push_back(joined(gradients, directions_, &DirectionGradients::norms, 0));
    if (wanted.get(next++))
      results.push_back(joined(gradients, directions_, &DirectionGradients::delta, -1));
    return results;
  }

 private:
  const Tensor& weight(int64_t d, int64_t i) const { return weights_[d * per_direction_ + i]; }

  // The builder checks the sum of both; what a sum can hide is checked here.
  void check_bias(const Tensor& bias) const {
    TORCH_CHECK(bias.dim() == 1 && bias.size(0) == hidden_size() &&
                    bias.scalar_type() == input_.scalar_type() && bias.device() == input_.device(),
                "rnn_cuda: a bias must be ", input_.scalar_type(), " (", hidden_size(), ") on ",
                input_.device(), ", got ", bias.scalar_type(), " ", bias.sizes(), " on ",
                bias.device());
  }

  // In compute precision: a sum in half precision would round once more.
  OptionalTensor bias(int64_t d) const {
    if (per_direction_ == 2) return std::nullopt;
    const bool is_wide = !is_half(input_.scalar_type());
    const auto widened = [&](const Tensor& bias) { return is_wide ? bias : bias.to(at::kFloat); };
    const Tensor first = widened(weight(d, 2));
    return per_direction_ == 3 ? first : at::add(first, widened(weight(d, 3)));
  }

  const Tensor& input_;
  const TensorList states_, weights_;
  const Cell cell_;
  const int64_t directions_;
  const bool is_reverse_;
  const OptionalTensor& batch_sizes_;
  const int64_t per_direction_;
};

// y_t = d_t * (g_t + M y_{t-1})
inline RecurrenceBuilder linear_recurrence_builder(const Tensor& d, const Tensor& g,
                                                   const Tensor& m, const OptionalTensor& y0,
                                                   bool reverse,
                                                   const OptionalTensor& batch_sizes) {
  RecurrenceBuilder builder(Epilogue::ElmanLinear, g, m.size(0), batch_sizes, reverse);
  builder.weight_hidden(m).addend(g).operand(d).initial(y0);
  return builder;
}

}  // namespace rnn_cuda
