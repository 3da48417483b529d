// A layer as the operators take it: lists of tensors, for one direction of time or for both.
//
//   states    the initial states, each (D, B, H): h0, and c0 of a cell that has one; or nothing for
//             zeros
//   weights   of each direction in turn: weight_ih (S H, I), weight_hh (S H, H), up to two biases
//             (S H), and the constants of a cell that has some, each (H) in compute precision
//   output    (T, B, D H), or packed (N, D H): the directions' states h side by side
//   saved     of each direction: what the cell saves for its backward pass, with K H features.
//             Nothing if it saves nothing, as an Elman cell does, whose derivative is read off the
//             output; or if it is to be computed again.
//
// D is the number of directions; the second runs against time. S and K are the cell's counts of
// sums and of saved values (cells/unit.h).
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <iterator>
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
  const size_t first = name.find('.'), second = name.rfind('.');
  if (first < second) {
    const auto function_named = [](std::string_view its_name) {
      return std::find(std::begin(kFunctionNames), std::end(kFunctionNames), its_name) -
             std::begin(kFunctionNames);
    };
    const auto candidate = function_named(name.substr(first + 1, second - first - 1));
    const auto gate = function_named(name.substr(second + 1));
    constexpr auto kFunctions = std::end(kFunctionNames) - std::begin(kFunctionNames);
    for (Cell cell : kCellsOfFunctions)
      if (cell.name == name.substr(0, first) && candidate < kFunctions && gate < kFunctions) {
        cell.functions = {static_cast<Function>(candidate), static_cast<Function>(gate)};
        return cell;
      }
  }
  TORCH_CHECK_VALUE(false, "cell: expected one of ", names, ", gru.CANDIDATE.GATE and ",
                    "lstm.CANDIDATE.GATE with functions among tanh, relu, sigmoid, hard_sigmoid ",
                    "and identity; got '", name, "'");
}

// torch's own operators, called from a kernel, must not be recorded by autograd.
using NoAutograd = at::AutoDispatchBelowADInplaceOrView;

// part(direction), a tensor of each, joined along a dimension.
template <class Part>
Tensor joined(int64_t directions, int64_t dim, const Part& part) {
  return directions == 1 ? part(0) : at::cat({part(0), part(1)}, dim);
}

constexpr int64_t kMaxStates = 2;     // h and c
constexpr int64_t kMaxConstants = 2;  // keep and rate

// What layer_gradients may compute for one direction; nothing where it is not wanted.
struct DirectionGradients {
  Tensor input;               // as the layer's
  Tensor states[kMaxStates];  // (1, B, H)
  Tensor weight_ih, weight_hh;
  // In the type that halves compute in. The second only where W x + b and U h + b meet in another
  // way than as a sum (cells/unit.h, `apart`): else the first is that of either bias.
  Tensor bias_ih, bias_hh;
  Tensor constants[kMaxConstants];  // (H), likewise
  // Of the cell's adjoints (cells/unit.h): norms (1, T, B) or (1, N), float64, and the vectors,
  // (T, B, H) or (N, H), in the type that halves compute in.
  Tensor norms[kMaxAdjoints], adjoints[kMaxAdjoints];
  Tensor delta;  // (T, B, H) or (N, H), as the backward recurrence publishes it
};

struct DirectionWanted {
  bool input, states[kMaxStates], weight_ih, weight_hh, bias, constants, norms, delta, adjoints;

  bool gradients() const {
    return input || states[0] || states[1] || weight_ih || weight_hh || bias || constants;
  }
  bool only_delta() const { return delta && !norms && !gradients(); }
  bool anything() const { return delta || adjoints || norms || gradients(); }
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
        counts_(counts_of(cell_.forward)),
        per_direction_(static_cast<int64_t>(weights.size()) / directions_),
        matrices_and_biases_(per_direction_ - counts_.constants) {
    TORCH_CHECK_VALUE(direction == "forward" || direction == "reverse" || direction == "both",
                      "direction: expected forward, reverse or both; got '", direction, "'");
    TORCH_CHECK_VALUE(2 <= matrices_and_biases_ && matrices_and_biases_ <= 4 &&
                          per_direction_ * directions_ == static_cast<int64_t>(weights.size()),
                      "weights: expected weight_ih, weight_hh and up to two biases",
                      counts_.constants > 0 ? ", then keep and rate," : "", " of each of ",
                      directions_, " directions, got ", weights.size(), " tensors");
    TORCH_CHECK_VALUE(counts_.apart == 0 || matrices_and_biases_ != 3,
                      "weights: expected both biases or none of the cell ", cell, ", got one");
    TORCH_CHECK_VALUE(states.empty() || static_cast<int>(states.size()) == cell_.states,
                      "states: expected ", cell_.states == 2 ? "h0 and c0" : "h0",
                      " or nothing, got ", states.size(), " tensors");
    scalar_type_of(input);  // throws if there are no kernels for it
    for (int64_t d = 0; d < directions_; ++d) {
      TORCH_CHECK(weight_hh(d).dim() == 2 && weight_hh(d).size(1) == hidden_size() &&
                      weight_hh(d).size(0) == counts_.sums * hidden_size(),
                  "rnn_cuda: weight_hh must have shape (",
                  counts_.sums > 1 ? std::to_string(counts_.sums) + " H" : "H",
                  ", H), the same in both directions, got ", weight_hh(d).sizes());
      for (int64_t i = 2; i < matrices_and_biases_; ++i)
        check_vector(weight(d, i), "a bias", input.scalar_type(), counts_.sums * hidden_size());
      for (int64_t i = matrices_and_biases_; i < per_direction_; ++i)
        check_vector(weight(d, i), "a constant", wide_type(), hidden_size());
    }
  }

  int64_t directions() const { return directions_; }
  bool is_reverse(int64_t d) const { return is_reverse_ || d == 1; }
  int64_t hidden_size() const { return weight_hh(0).size(1); }
  const Counts& counts() const { return counts_; }
  int64_t states() const { return cell_.states; }
  // Whether output and delta say all: see `Gradients`.
  bool is_simple() const { return rnn_cuda::is_simple(counts_); }
  bool has_one_delta() const { return rnn_cuda::has_one_delta(counts_of(cell_.backward)); }
  const Tensor& input() const { return input_; }
  const Tensor& weight_ih(int64_t d) const { return weight(d, 0); }
  const Tensor& weight_hh(int64_t d) const { return weight(d, 1); }
  OptionalTensor state(int64_t i) const {
    return states_.empty() ? std::nullopt : OptionalTensor(states_[i]);
  }

  RecurrenceBuilder forward(int64_t d) const {
    RecurrenceBuilder builder(cell_.forward, input_, hidden_size(), batch_sizes_, is_reverse(d), d,
                              directions_);
    builder.weight_hidden(weight_hh(d)).input(input_, weight_ih(d)).bias(bias(d)).initial(state(0));
    // Its last state: c, or h in a cell whose units carry that on their own too.
    if (counts_.carried > 0) builder.initial_carried(state(cell_.states - 1));
    if (counts_.constants > 0) builder.constants(constants(d));
    builder.functions(cell_.functions);
    return builder;
  }

  // Against the direction of the forward pass, with U^T; dL/dh_n meets each sample at its last
  // step. `grads` are those of output and of the final states.
  RecurrenceBuilder backward(int64_t d, const OptionalTensors& grads, const Tensor& output,
                             TensorList saved) const {
    TORCH_CHECK_VALUE(static_cast<int64_t>(grads.size()) == 1 + states(),
                      "grads: expected those of output and of the final states, ", 1 + states(),
                      " in all, got ", grads.size());
    TORCH_CHECK_VALUE(static_cast<int64_t>(saved.size()) == (counts_.saved > 0 ? directions_ : 0),
                      "saved: expected what layer_forward saved, got ", saved.size(), " tensors");
    RecurrenceBuilder builder(cell_.backward, output, hidden_size(), batch_sizes_, !is_reverse(d),
                              d, directions_);
    builder.weight_hidden(weight_hh(d).t()).addend(grads.get(0)).first_addend(grads.get(1));
    if (states() == 2) builder.initial_carried(grads.get(2));
    if (counts_.constants > 0) builder.constants(constants(d));
    builder.functions(cell_.functions);
    if (saved.empty()) return builder.operand(output);
    builder.hidden_rows(output, "output");  // only checks it
    return builder.saved_operand(saved[d]);
  }

  // `wanted` goes through input, states and weights, then the adjoints' norms, then delta, or of a
  // cell that is not simple the adjoints.
  DirectionWanted wanted(int64_t d, const c10::List<bool>& wanted) const {
    const size_t weights = 1 + states_.size(), first = weights + per_direction_ * d;
    const size_t extra = weights + weights_.size();
    TORCH_CHECK_VALUE(wanted.size() == extra + 2, "wanted: expected ", extra + 2, " bools, got ",
                      wanted.size());
    DirectionWanted result = {};
    result.input = wanted.get(0);
    for (size_t i = 0; i < states_.size(); ++i) result.states[i] = wanted.get(1 + i);
    result.weight_ih = wanted.get(first);
    result.weight_hh = wanted.get(first + 1);
    for (int64_t i = 2; i < per_direction_; ++i)
      (i < matrices_and_biases_ ? result.bias : result.constants) |= wanted.get(first + i);
    result.norms = wanted.get(extra);
    (is_simple() ? result.delta : result.adjoints) = wanted.get(extra + 1);
    return result;
  }

  // Those that are wanted, in that order, of both directions together. The input's gradient is
  // that of the first, which holds the sum.
  Tensors results(const DirectionGradients* gradients, const c10::List<bool>& wanted) const {
    Tensors results;
    size_t next = 0;
    if (wanted.get(next++)) results.push_back(gradients[0].input);
    for (size_t i = 0; i < states_.size(); ++i)
      if (wanted.get(next++))
        results.push_back(
            joined(directions_, 0, [&](int64_t d) { return gradients[d].states[i]; }));
    for (int64_t d = 0; d < directions_; ++d) {
      if (wanted.get(next++)) results.push_back(gradients[d].weight_ih);
      if (wanted.get(next++)) results.push_back(gradients[d].weight_hh);
      bool is_given = false;
      for (int64_t i = 2; i < matrices_and_biases_; ++i) {
        if (!wanted.get(next++)) continue;
        const bool is_own = i == 3 && gradients[d].bias_hh.defined();
        const Tensor bias =
            (is_own ? gradients[d].bias_hh : gradients[d].bias_ih).to(input_.scalar_type());
        // Not the same tensor twice: scaling one gradient in place would scale both.
        results.push_back(is_given && !is_own ? bias.clone() : bias);
        is_given = true;
      }
      for (int k = 0; k < counts_.constants; ++k)
        if (wanted.get(next++)) results.push_back(gradients[d].constants[k]);
    }
    const int adjoints = counts_of(cell_.backward).adjoints;
    if (wanted.get(next++))
      for (int a = 0; a < adjoints; ++a)
        results.push_back(joined(directions_, 0, [&](int64_t d) { return gradients[d].norms[a]; }));
    if (!wanted.get(next++)) return results;
    if (is_simple())
      results.push_back(joined(directions_, -1, [&](int64_t d) { return gradients[d].delta; }));
    for (int a = 0; a < adjoints && !is_simple(); ++a)
      results.push_back(
          joined(directions_, -1, [&](int64_t d) { return gradients[d].adjoints[a]; }));
    return results;
  }

 private:
  const Tensor& weight(int64_t d, int64_t i) const { return weights_[d * per_direction_ + i]; }

  at::ScalarType wide_type() const {
    return is_half(input_.scalar_type()) ? at::kFloat : input_.scalar_type();
  }

  // The builder sees the sum of both biases, and all constants as one tensor; what that can hide is
  // checked here.
  void check_vector(const Tensor& vector, const char* name, at::ScalarType type,
                    int64_t size) const {
    TORCH_CHECK(vector.dim() == 1 && vector.size(0) == size && vector.scalar_type() == type &&
                    vector.device() == input_.device(),
                "rnn_cuda: ", name, " must be ", type, " (", size, ") on ", input_.device(),
                ", got ", vector.scalar_type(), " ", vector.sizes(), " on ", vector.device());
  }

  Tensor constants(int64_t d) const {
    return at::stack(weights_.slice(d * per_direction_ + matrices_and_biases_, counts_.constants));
  }

  // In compute precision: a sum in half precision would round once more.
  OptionalTensor bias(int64_t d) const {
    if (matrices_and_biases_ == 2) return std::nullopt;
    const bool is_wide = !is_half(input_.scalar_type());
    const auto widened = [&](const Tensor& bias) { return is_wide ? bias : bias.to(at::kFloat); };
    const Tensor first = widened(weight(d, 2));
    if (matrices_and_biases_ == 3) return first;
    const Tensor second = widened(weight(d, 3));
    if (counts_.apart == 0) return at::add(first, second);
    // That of W x comes last where it stays apart.
    const int64_t together = (counts_.sums - counts_.apart) * hidden_size();
    const int64_t apart = counts_.apart * hidden_size();
    return at::cat({at::add(first.narrow(0, 0, together), second.narrow(0, 0, together)),
                    second.narrow(0, together, apart), first.narrow(0, together, apart)});
  }

  const Tensor& input_;
  const TensorList states_, weights_;
  const Cell cell_;
  const int64_t directions_;
  const bool is_reverse_;
  const OptionalTensor& batch_sizes_;
  const Counts counts_;                                // of the forward pass
  const int64_t per_direction_, matrices_and_biases_;  // weights; all but the constants
};

// y_t = d_t * (g_t + M y_{t-1}), or the linearised step of a cell whose units carry a value of
// their own, or the transpose of that: see csrc/cells/linear.h and
// rnn_cuda/operators/linear_recurrence.py.
inline RecurrenceBuilder linear_recurrence_builder(const Tensor& d, const Tensor& g,
                                                   const Tensor& m, const OptionalTensor& y0,
                                                   bool reverse, const OptionalTensor& batch_sizes,
                                                   bool transposed) {
  TORCH_CHECK(m.dim() == 2 && d.dim() >= 2 && g.dim() >= 2,
              "rnn_cuda: m must be a matrix, d and g sequences, got ", m.sizes(), ", ", d.sizes(),
              " and ", g.sizes());
  const int64_t hidden = m.size(1);
  if (d.size(-1) == hidden) {
    TORCH_CHECK_VALUE(!transposed, "transposed: this recurrence is its own transpose, with m.T");
    RecurrenceBuilder builder(Epilogue::ElmanLinear, g, hidden, batch_sizes, reverse);
    builder.weight_hidden(m).addend(g).operand(d).initial(y0);
    return builder;
  }
  const bool exposes = g.size(-1) == 2 * hidden;
  const auto* const form =
      std::find_if(std::begin(kLinearForms), std::end(kLinearForms), [&](const LinearForm& form) {
        return form.exposes == exposes && m.size(0) == (form.gates + exposes) * hidden &&
               d.size(-1) == (form.gates + 1 + 2 * exposes) * hidden;
      });
  TORCH_CHECK_VALUE(form != std::end(kLinearForms), "d, g, m: there is no linear recurrence ",
                    "(kLinearForms in csrc/cells/cells.h) for the shapes ", d.sizes(), ", ",
                    g.sizes(), " and ", m.sizes());
  TORCH_CHECK_VALUE(!transposed || !y0, "y0: expected none of the transpose");
  TORCH_CHECK(d.scalar_type() == g.scalar_type(), "rnn_cuda: d and g must be of one type, got ",
              d.scalar_type(), " and ", g.scalar_type());
  Tensor operand = d;
  if (!transposed) operand = at::cat({d, g}, -1);
  if (transposed && exposes) operand = at::cat({d, g.narrow(-1, hidden, hidden)}, -1);
  RecurrenceBuilder builder(transposed ? form->transpose : form->forward, operand, hidden,
                            batch_sizes, reverse);
  builder.weight_hidden(transposed ? m.t() : m).saved_operand(operand);
  if (transposed) builder.addend(g.narrow(-1, 0, hidden));
  if (y0) {
    TORCH_CHECK(y0->dim() == 2 && y0->size(1) == g.size(-1), "rnn_cuda: y0 must be (B, ",
                g.size(-1), "), got ", y0->sizes());
    builder.initial(y0->narrow(1, 0, hidden));
    builder.initial_carried(y0->narrow(1, exposes ? hidden : 0, hidden));
  } else if (!transposed) {
    builder.initial(std::nullopt);
  }
  return builder;
}

}  // namespace rnn_cuda
