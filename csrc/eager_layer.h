// A layer as ordinary eager training runs it: one node of the autograd graph, with no Python on the
// way there or back, which takes longer than a small RNN.
//
// This adds nothing to what can be differentiated. The node's derivative is the operator
// elman_gradients, and whatever goes beyond that (a second derivative, forward mode, vmap) that
// operator's own autograd kernel does, in rnn_cuda/_autograd.py. A forward pass under transforms,
// torch.compile or a GradientFlow does not come here: see rnn_cuda/functional.py.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "recurrence_builder.h"

namespace rnn_cuda {

using ForwardTensors = std::tuple<Tensor, Tensor>;                      // output, h_n
using PairForwardTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of each direction

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

inline bool requires_grad(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->requires_grad();
}

// What a layer has for one direction; `output` is there in the backward pass.
struct DirectionTensors {
  OptionalTensor h0;
  Tensor weight_ih, weight_hh;
  OptionalTensor bias_ih, bias_hh;
  Tensor output;

  bool requires_grad() const {
    return rnn_cuda::requires_grad(h0) || weight_ih.requires_grad() || weight_hh.requires_grad() ||
           rnn_cuda::requires_grad(bias_ih) || rnn_cuda::requires_grad(bias_hh);
  }
};

// bias_ih + bias_hh as the operators take it, in compute precision: a sum in half precision would
// round once more. The operators check the sum; what a sum can hide is checked here.
inline OptionalTensor total_bias(const DirectionTensors& d) {
  const auto widened = [&](const OptionalTensor& bias, const char* name) -> OptionalTensor {
    if (!bias) return std::nullopt;
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == d.weight_hh.size(0) &&
                    bias->scalar_type() == d.weight_hh.scalar_type(),
                "rnn_cuda: ", name, " must be ", d.weight_hh.scalar_type(), " (",
                d.weight_hh.size(0), "), got ", bias->scalar_type(), " ", bias->sizes());
    const bool is_half = bias->scalar_type() == at::kHalf || bias->scalar_type() == at::kBFloat16;
    return is_half ? bias->to(at::kFloat) : *bias;
  };
  const OptionalTensor first = widened(d.bias_ih, "bias_ih");
  const OptionalTensor second = widened(d.bias_hh, "bias_hh");
  return first && second ? at::add(*first, *second) : (first ? first : second);
}

// A single tensor on the device "meta" would take the whole call to kernels that check nothing.
inline void check_devices(const Tensor& input, const DirectionTensors& d,
                          const OptionalTensor& batch_sizes) {
  const auto check = [&](const OptionalTensor& tensor, const char* name) {
    TORCH_CHECK(!tensor || tensor->device() == input.device(), "rnn_cuda: ", name,
                " must be on the input's device, ", input.device(), ", got ", tensor->device());
  };
  check(d.h0, "h0");
  check(d.weight_ih, "weight_ih");
  check(d.weight_hh, "weight_hh");
  check(d.bias_ih, "bias_ih");
  check(d.bias_hh, "bias_hh");
  TORCH_CHECK(!batch_sizes || batch_sizes->device().is_cpu(), "rnn_cuda: batch_sizes must be on ",
              "the CPU, got ", batch_sizes->device());
}

// ---- the operators of the device, below autograd -----------------------------------------------

inline ForwardTensors forward_below_autograd(const Tensor& input, const DirectionTensors& d,
                                             std::string_view nonlinearity, bool reverse,
                                             const OptionalTensor& batch_sizes) {
  static const auto call = find_operator<ForwardTensors(
      const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const OptionalTensor&,
      std::string_view, bool, const OptionalTensor&)>("rnn_cuda::elman_forward");
  check_devices(input, d, batch_sizes);
  const at::AutoDispatchBelowAutograd no_autograd;
  return call.call(input, d.h0, d.weight_ih, d.weight_hh, total_bias(d), nonlinearity, reverse,
                   batch_sizes);
}

inline PairForwardTensors forward_below_autograd(const Tensor& input, const DirectionTensors& d,
                                                 const DirectionTensors& r,
                                                 std::string_view nonlinearity,
                                                 const OptionalTensor& batch_sizes) {
  static const auto call = find_operator<PairForwardTensors(
      const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const OptionalTensor&,
      const OptionalTensor&, const Tensor&, const Tensor&, const OptionalTensor&, std::string_view,
      const OptionalTensor&)>("rnn_cuda::elman_forward_pair");
  check_devices(input, d, batch_sizes);
  check_devices(input, r, batch_sizes);
  const at::AutoDispatchBelowAutograd no_autograd;
  return call.call(input, d.h0, d.weight_ih, d.weight_hh, total_bias(d), r.h0, r.weight_ih,
                   r.weight_hh, total_bias(r), nonlinearity, batch_sizes);
}

// ---- and those of the backward pass ------------------------------------------------------------

// Of output and h_n.
struct OutputGradients {
  OptionalTensor output, h_n;
  bool exist() const { return output.has_value() || h_n.has_value(); }
};

// With autograd kernels, unless only numbers are wanted.
class BelowAutogradIfPossible {
 public:
  BelowAutogradIfPossible() {
    const bool wants_only_numbers = !at::GradMode::is_enabled() &&
                                    !c10::impl::tls_is_dispatch_key_included(
                                        c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
                                    torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr;
    if (wants_only_numbers) guard_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowAutograd> guard_;
};

inline GradientTensors gradients_of(const OutputGradients& grads, const Tensor& input,
                                    const DirectionTensors& d, std::string_view nonlinearity,
                                    bool reverse, const OptionalTensor& batch_sizes,
                                    const Wanted& wanted) {
  static const auto call = find_operator<GradientTensors(
      const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
      const Tensor&, const Tensor&, const Tensor&, std::string_view, bool, const OptionalTensor&,
      Wanted)>("rnn_cuda::elman_gradients");
  const BelowAutogradIfPossible guard;
  return call.call(grads.output, grads.h_n, input, d.h0, d.weight_ih, d.weight_hh, d.output,
                   nonlinearity, reverse, batch_sizes, wanted);
}

inline PairGradientTensors gradients_of(const Tensor& input, const OutputGradients& grads,
                                        const DirectionTensors& d,
                                        const OutputGradients& grads_reverse,
                                        const DirectionTensors& r, std::string_view nonlinearity,
                                        const OptionalTensor& batch_sizes,
                                        const PairWanted& wanted) {
  static const auto call = find_operator<PairGradientTensors(
      const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, std::string_view,
      const OptionalTensor&, PairWanted)>("rnn_cuda::elman_gradients_pair");
  const BelowAutogradIfPossible guard;
  return call.call(input, grads.output, grads.h_n, d.h0, d.weight_ih, d.weight_hh, d.output,
                   grads_reverse.output, grads_reverse.h_n, r.h0, r.weight_ih, r.weight_hh,
                   r.output, nonlinearity, batch_sizes, wanted);
}

// ---- nodes -------------------------------------------------------------------------------------

using Context = torch::autograd::AutogradContext;
using Tensors = torch::autograd::variable_list;

// Returns what `apply` does, given a list for what the node saves of its own outputs. If a hook on
// saved tensors throws (recomputing a checkpoint ends that way), PyTorch leaves node and outputs in
// possession of each other, for ever: the outputs then let go of the node.
template <class Apply>
Tensors apply_or_let_go(const Apply& apply) {
  Tensors saved_outputs;
  try {
    return apply(&saved_outputs);
  } catch (...) {
    for (const Tensor& output : saved_outputs) output.detach_();
    throw;
  }
}

// Which arguments of a node need a gradient. Those that are None have no number in the graph.
class Needs {
 public:
  explicit Needs(const Context& context) : context_(context) {}

  bool next(bool is_there = true) { return is_there && context_.needs_input_grad(edge_++); }

 private:
  const Context& context_;
  size_t edge_ = 0;
};

// One direction's place among a node's arguments and saved tensors.
struct DirectionOfNode {
  bool needs_h0, needs_weight_ih, needs_weight_hh, needs_bias_ih, needs_bias_hh;

  static void save(Context* context, const std::string& name, const DirectionTensors& d) {
    context->saved_data[name + "bias_ih"] = d.bias_ih.has_value();
    context->saved_data[name + "bias_hh"] = d.bias_hh.has_value();
  }

  DirectionOfNode(Context* context, const std::string& name, const DirectionTensors& d,
                  Needs& needs)
      : needs_h0(needs.next(d.h0.has_value())),
        needs_weight_ih(needs.next()),
        needs_weight_hh(needs.next()),
        needs_bias_ih(needs.next(context->saved_data[name + "bias_ih"].toBool())),
        needs_bias_hh(needs.next(context->saved_data[name + "bias_hh"].toBool())) {}

  Wanted wanted(bool needs_input) const {
    return {needs_input,
            needs_h0,
            needs_weight_ih,
            needs_weight_hh,
            needs_bias_ih || needs_bias_hh,
            /*adjoint_norm=*/false};
  }

  // Puts gradients where the arguments stand; what is not needed stays undefined.
  void place(const Tensor& h0, const Tensor& weight_ih, const Tensor& weight_hh, const Tensor& bias,
             Tensor* arguments) const {
    if (needs_h0) arguments[0] = h0;
    if (needs_weight_ih) arguments[1] = weight_ih;
    if (needs_weight_hh) arguments[2] = weight_hh;
    if (needs_bias_ih) arguments[3] = bias;
    // Not the same tensor twice: who scales one gradient in place would scale both.
    if (needs_bias_hh) arguments[4] = needs_bias_ih ? bias.clone() : bias;
  }
};

class ElmanLayer : public torch::autograd::Function<ElmanLayer> {
 public:
  static Tensors forward(Context* context, const Tensor& input, const OptionalTensor& h0,
                         const Tensor& weight_ih, const Tensor& weight_hh,
                         const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                         std::string_view nonlinearity, bool reverse,
                         const OptionalTensor& batch_sizes, Tensors* saved_outputs) {
    const DirectionTensors d = {h0, weight_ih, weight_hh, bias_ih, bias_hh, {}};
    const auto [output, h_n] = forward_below_autograd(input, d, nonlinearity, reverse, batch_sizes);
    context->set_materialize_grads(false);
    // Of a single step, the state itself: who takes one step after the other keeps just that.
    const Tensor& states = !batch_sizes && input.size(0) == 1 ? h_n : output;
    context->save_for_backward({input, h0.value_or(Tensor()), weight_ih, weight_hh, states});
    *saved_outputs = {states};
    DirectionOfNode::save(context, "", d);
    context->saved_data["nonlinearity"] = std::string(nonlinearity);
    context->saved_data["reverse"] = reverse;
    context->saved_data["batch_sizes"] = batch_sizes;
    return {output, h_n};
  }

  static Tensors backward(Context* context, const Tensors& grads) {
    Tensors of_arguments(10);  // of `forward`
    const OutputGradients of_outputs = {if_defined(grads[0]), if_defined(grads[1])};
    if (!of_outputs.exist()) return of_arguments;
    const Tensors saved = context->get_saved_variables();
    const auto batch_sizes = context->saved_data["batch_sizes"].toOptional<Tensor>();
    const bool is_single_step = !batch_sizes && saved[4].dim() == 2;
    const Tensor output = is_single_step ? saved[4].unsqueeze(0) : saved[4];
    const DirectionTensors d = {if_defined(saved[1]), saved[2], saved[3], {}, {}, output};
    Needs needs(*context);
    const bool needs_input = needs.next();
    const DirectionOfNode direction(context, "", d, needs);
    const auto [of_input, of_h0, of_weight_ih, of_weight_hh, of_bias, norm] = gradients_of(
        of_outputs, saved[0], d, context->saved_data["nonlinearity"].toStringView(),
        context->saved_data["reverse"].toBool(), batch_sizes, direction.wanted(needs_input));
    if (needs_input) of_arguments[0] = of_input;
    direction.place(of_h0, of_weight_ih, of_weight_hh, of_bias, &of_arguments[1]);
    return of_arguments;
  }
};

class ElmanLayerPair : public torch::autograd::Function<ElmanLayerPair> {
 public:
  static Tensors forward(Context* context, const Tensor& input, const OptionalTensor& h0,
                         const Tensor& weight_ih, const Tensor& weight_hh,
                         const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                         const OptionalTensor& h0_reverse, const Tensor& weight_ih_reverse,
                         const Tensor& weight_hh_reverse, const OptionalTensor& bias_ih_reverse,
                         const OptionalTensor& bias_hh_reverse, std::string_view nonlinearity,
                         const OptionalTensor& batch_sizes, Tensors* saved_outputs) {
    const DirectionTensors d = {h0, weight_ih, weight_hh, bias_ih, bias_hh, {}};
    const DirectionTensors r = {h0_reverse,      weight_ih_reverse, weight_hh_reverse,
                                bias_ih_reverse, bias_hh_reverse,   {}};
    const auto [output, h_n, output_reverse, h_n_reverse] =
        forward_below_autograd(input, d, r, nonlinearity, batch_sizes);
    context->set_materialize_grads(false);
    context->save_for_backward({input, h0.value_or(Tensor()), weight_ih, weight_hh, output,
                                h0_reverse.value_or(Tensor()), weight_ih_reverse, weight_hh_reverse,
                                output_reverse});
    *saved_outputs = {output, output_reverse};
    DirectionOfNode::save(context, "", d);
    DirectionOfNode::save(context, "reverse_", r);
    context->saved_data["nonlinearity"] = std::string(nonlinearity);
    context->saved_data["batch_sizes"] = batch_sizes;
    // A direction of which nothing is differentiated has no part in the graph.
    Tensors constant;
    if (!input.requires_grad() && !d.requires_grad()) constant = {output, h_n};
    if (!input.requires_grad() && !r.requires_grad()) constant = {output_reverse, h_n_reverse};
    context->mark_non_differentiable(constant);
    return {output, h_n, output_reverse, h_n_reverse};
  }

  static Tensors backward(Context* context, const Tensors& grads) {
    Tensors of_arguments(14);  // of `forward`
    const OutputGradients of_outputs = {if_defined(grads[0]), if_defined(grads[1])};
    const OutputGradients of_reverse = {if_defined(grads[2]), if_defined(grads[3])};
    if (!of_outputs.exist() && !of_reverse.exist()) return of_arguments;
    const Tensors saved = context->get_saved_variables();
    const Tensor& input = saved[0];
    const DirectionTensors d = {if_defined(saved[1]), saved[2], saved[3], {}, {}, saved[4]};
    const DirectionTensors r = {if_defined(saved[5]), saved[6], saved[7], {}, {}, saved[8]};
    Needs needs(*context);
    const bool needs_input = needs.next();
    const DirectionOfNode direction(context, "", d, needs);
    const DirectionOfNode reverse(context, "reverse_", r, needs);
    const auto nonlinearity = context->saved_data["nonlinearity"].toStringView();
    const auto batch_sizes = context->saved_data["batch_sizes"].toOptional<Tensor>();

    const auto place = [&](bool is_reverse, const Tensor& of_input, const auto&... of_weights) {
      if (needs_input) of_arguments[0] = of_input;
      (is_reverse ? reverse : direction).place(of_weights..., &of_arguments[is_reverse ? 6 : 1]);
    };
    if (of_outputs.exist() && of_reverse.exist()) {
      const Wanted first = direction.wanted(needs_input), second = reverse.wanted(needs_input);
      PairWanted wanted;
      std::copy(first.begin(), first.end(), wanted.begin());
      std::copy(second.begin() + 1, second.end(), wanted.begin() + first.size());
      const auto g =
          gradients_of(input, of_outputs, d, of_reverse, r, nonlinearity, batch_sizes, wanted);
      place(false, std::get<0>(g), std::get<1>(g), std::get<2>(g), std::get<3>(g), std::get<4>(g));
      place(true, std::get<0>(g), std::get<6>(g), std::get<7>(g), std::get<8>(g), std::get<9>(g));
    } else {
      const bool is_reverse = of_reverse.exist();
      const auto g = gradients_of(is_reverse ? of_reverse : of_outputs, input, is_reverse ? r : d,
                                  nonlinearity, is_reverse, batch_sizes,
                                  (is_reverse ? reverse : direction).wanted(needs_input));
      place(is_reverse, std::get<0>(g), std::get<1>(g), std::get<2>(g), std::get<3>(g),
            std::get<4>(g));
    }
    return of_arguments;
  }
};

// ---- operators ---------------------------------------------------------------------------------

// Whether autograd records now. (Inference mode does not, whatever the grad mode says.)
inline bool records_graph() {
  return at::GradMode::is_enabled() && !c10::InferenceMode::is_enabled();
}

inline ForwardTensors elman_layer(const Tensor& input, const OptionalTensor& h0,
                                  const Tensor& weight_ih, const Tensor& weight_hh,
                                  const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                                  std::string_view nonlinearity, bool reverse,
                                  const OptionalTensor& batch_sizes) {
  const DirectionTensors d = {h0, weight_ih, weight_hh, bias_ih, bias_hh, {}};
  if (!records_graph() || (!input.requires_grad() && !d.requires_grad()))
    return forward_below_autograd(input, d, nonlinearity, reverse, batch_sizes);
  const Tensors results = apply_or_let_go([&](Tensors* saved_outputs) {
    return ElmanLayer::apply(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity,
                             reverse, batch_sizes, saved_outputs);
  });
  return {results[0], results[1]};
}

inline PairForwardTensors elman_layer_pair(
    const Tensor& input, const OptionalTensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& h0_reverse,
    const Tensor& weight_ih_reverse, const Tensor& weight_hh_reverse,
    const OptionalTensor& bias_ih_reverse, const OptionalTensor& bias_hh_reverse,
    std::string_view nonlinearity, const OptionalTensor& batch_sizes) {
  const DirectionTensors d = {h0, weight_ih, weight_hh, bias_ih, bias_hh, {}};
  const DirectionTensors r = {h0_reverse,      weight_ih_reverse, weight_hh_reverse,
                              bias_ih_reverse, bias_hh_reverse,   {}};
  const bool needs_graph = input.requires_grad() || d.requires_grad() || r.requires_grad();
  if (!records_graph() || !needs_graph)
    return forward_below_autograd(input, d, r, nonlinearity, batch_sizes);
  const Tensors results = apply_or_let_go([&](Tensors* saved_outputs) {
    return ElmanLayerPair::apply(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, h0_reverse,
                                 weight_ih_reverse, weight_hh_reverse, bias_ih_reverse,
                                 bias_hh_reverse, nonlinearity, batch_sizes, saved_outputs);
  });
  return {results[0], results[1], results[2], results[3]};
}

}  // namespace rnn_cuda
