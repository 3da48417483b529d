// A layer as ordinary eager training runs it: one node of the autograd graph, with no Python on the
// way there or back, which takes longer than a small RNN.
//
// This adds nothing to what can be differentiated. The node's derivative is the operator
// layer_gradients, and whatever goes beyond that (a second derivative, forward mode, vmap) that
// operator's own autograd kernel does, in rnn_cuda/operators/. A forward pass under transforms,
// torch.compile or a GradientFlow does not come here: see rnn_cuda/functional.py.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <algorithm>
#include <optional>
#include <string>

#include "layer.h"

namespace rnn_cuda {

// ---- the operators -----------------------------------------------------------------------------

// A single tensor on the device "meta" would take the whole call to kernels that check nothing.
inline void check_devices(const Tensor& input, TensorList states, TensorList weights,
                          const OptionalTensor& batch_sizes) {
  for (TensorList tensors : {states, weights})
    for (const Tensor& tensor : tensors)
      TORCH_CHECK(tensor.device() == input.device(), "rnn_cuda: states and weights must be on the ",
                  "input's device, ", input.device(), ", got ", tensor.device());
  TORCH_CHECK(!batch_sizes || batch_sizes->device().is_cpu(), "rnn_cuda: batch_sizes must be on ",
              "the CPU, got ", batch_sizes->device());
}

inline Tensors forward_below_autograd(const Tensor& input, TensorList states, TensorList weights,
                                      std::string_view cell, std::string_view direction,
                                      const OptionalTensor& batch_sizes, bool saves) {
  static const auto call =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("rnn_cuda::layer_forward", "")
          .typed<Tensors(const Tensor&, TensorList, TensorList, std::string_view, std::string_view,
                         const OptionalTensor&, bool)>();
  check_devices(input, states, weights, batch_sizes);
  const at::AutoDispatchBelowAutograd no_autograd;
  return call.call(input, states, weights, cell, direction, batch_sizes, saves);
}

// Whether a transform of torch.func or forward mode is active.
inline bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

// With autograd kernels, unless only numbers are wanted.
inline Tensors gradients_of(const OptionalTensors& grads, const Tensor& input, TensorList states,
                            TensorList weights, const Tensor& output, TensorList saved,
                            std::string_view cell, std::string_view direction,
                            const OptionalTensor& batch_sizes, const c10::List<bool>& wanted) {
  static const auto call =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("rnn_cuda::layer_gradients", "")
          .typed<Tensors(const OptionalTensors&, const Tensor&, TensorList, TensorList,
                         const Tensor&, TensorList, std::string_view, std::string_view,
                         const OptionalTensor&, const c10::List<bool>&)>();
  const bool wants_only_numbers = !at::GradMode::is_enabled() && !is_transformed();
  std::optional<at::AutoDispatchBelowAutograd> no_autograd;
  if (wants_only_numbers) no_autograd.emplace();
  return call.call(grads, input, states, weights, output, saved, cell, direction, batch_sizes,
                   wanted);
}

// ---- the node ----------------------------------------------------------------------------------

// Of a layer, or of one step of it: then input, states and results have no dimension of time, or of
// directions.
class LayerNode : public torch::autograd::Function<LayerNode> {
  using Context = torch::autograd::AutogradContext;

 public:
  // Also fills a list with what the node saves of its own outputs.
  static Tensors forward(Context* context, const Tensor& input, TensorList states,
                         TensorList weights, std::string_view cell, std::string_view direction,
                         const OptionalTensor& batch_sizes, bool saves, bool is_step,
                         Tensors* saved_outputs) {
    Tensors results = run(input, states, weights, cell, direction, batch_sizes, saves, is_step);
    context->set_materialize_grads(false);
    const Tensor output = results[0];
    Tensors saved = {input};
    saved.insert(saved.end(), states.begin(), states.end());
    saved.insert(saved.end(), weights.begin(), weights.end());
    auto& data = context->saved_data;
    data["states"] = static_cast<int64_t>(states.size());
    data["arguments"] = static_cast<int64_t>(saved.size());
    data["cell"] = std::string(cell);
    data["direction"] = std::string(direction);
    data["batch_sizes"] = batch_sizes;
    data["is_step"] = is_step;
    saved.push_back(output);
    const auto end = results.begin() + cell_named(cell).states + (is_step ? 0 : 1);
    saved.insert(saved.end(), end, results.end());  // what the cell saves
    results.erase(end, results.end());
    context->save_for_backward(std::move(saved));
    *saved_outputs = {output};
    return results;
  }

  // Results of a layer, or the states after a step; then, if `saves`, what the cell saves.
  static Tensors run(const Tensor& input, TensorList states, TensorList weights,
                     std::string_view cell, std::string_view direction,
                     const OptionalTensor& batch_sizes, bool saves, bool is_step) {
    if (!is_step)
      return forward_below_autograd(input, states, weights, cell, direction, batch_sizes, saves);
    // Views that must not be recorded by autograd.
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    Tensors states_of_layer;
    for (const Tensor& state : states) states_of_layer.push_back(with_time(state, input.dim()));
    Tensors results = forward_below_autograd(with_time(input, input.dim()), states_of_layer,
                                             weights, cell, direction, batch_sizes, saves);
    results.erase(results.begin());  // the output, which is the state h
    for (int i = 0; i < cell_named(cell).states; ++i)
      results[i] = without_time(results[i], input.dim());
    return results;
  }

  static Tensors backward(Context* context, const Tensors& of_results) {
    const Tensors saved = context->get_saved_variables();
    auto& data = context->saved_data;
    const size_t states = data["states"].toInt(), tensors = data["arguments"].toInt();
    Tensors of_arguments(tensors + 6);  // of `forward`
    const bool any = std::any_of(of_results.begin(), of_results.end(),
                                 [](const Tensor& grad) { return grad.defined(); });
    if (!any) return of_arguments;

    c10::List<bool> wanted;
    wanted.reserve(tensors + 2);
    for (size_t i = 0; i < tensors; ++i) wanted.push_back(context->needs_input_grad(i));
    wanted.push_back(false);  // norms
    wanted.push_back(false);  // delta
    const bool is_step = data["is_step"].toBool();
    const int64_t dim = saved[0].dim();  // of a step's input
    const auto as_sequence = [&](const Tensor& t) { return is_step ? with_time(t, dim) : t; };
    OptionalTensors grads;
    if (is_step) grads.push_back(std::nullopt);
    for (const Tensor& grad : of_results)
      grads.push_back(grad.defined() ? OptionalTensor(as_sequence(grad)) : std::nullopt);
    Tensors states_of_layer;
    for (size_t i = 1; i <= states; ++i) states_of_layer.push_back(as_sequence(saved[i]));

    const Tensors gradients = gradients_of(
        grads, as_sequence(saved[0]), states_of_layer,
        TensorList(saved).slice(1 + states, tensors - 1 - states), as_sequence(saved[tensors]),
        TensorList(saved).slice(tensors + 1), data["cell"].toStringView(),
        data["direction"].toStringView(), data["batch_sizes"].toOptional<Tensor>(), wanted);
    for (size_t i = 0, next = 0; i < tensors; ++i) {
      if (!wanted.get(i)) continue;
      of_arguments[i] = gradients[next++];
      if (is_step && i <= states) of_arguments[i] = without_time(of_arguments[i], dim);
    }
    return of_arguments;
  }

 private:
  // (B, features) or (features), by the dimensions of a step's input, to (1, B, features) and back.
  static Tensor with_time(const Tensor& tensor, int64_t dim) {
    return dim == 1 ? tensor.unsqueeze(0).unsqueeze(0) : tensor.unsqueeze(0);
  }
  static Tensor without_time(const Tensor& tensor, int64_t dim) {
    return dim == 1 ? tensor.squeeze(0).squeeze(0) : tensor.squeeze(0);
  }
};

// ---- operators ---------------------------------------------------------------------------------

inline Tensors run_with_node(const Tensor& input, TensorList states, TensorList weights,
                             std::string_view cell, std::string_view direction,
                             const OptionalTensor& batch_sizes, bool saves, bool is_step) {
  // A C++ node knows no tangents and no levels: it would lose them without a word.
  TORCH_CHECK_NOT_IMPLEMENTED(
      !is_transformed(),
      "rnn_cuda::layer and rnn_cuda::step are for plain eager code; under torch.func and in "
      "forward mode call rnn_cuda::layer_forward");
  const auto require_grad = [](TensorList tensors) {
    return std::any_of(tensors.begin(), tensors.end(),
                       [](const Tensor& tensor) { return tensor.requires_grad(); });
  };
  // (Inference mode does not record, whatever the grad mode says.)
  const bool needs_graph = at::GradMode::is_enabled() && !c10::InferenceMode::is_enabled() &&
                           (input.requires_grad() || require_grad(states) || require_grad(weights));
  if (!needs_graph)
    return LayerNode::run(input, states, weights, cell, direction, batch_sizes, /*saves=*/false,
                          is_step);
  // If a hook on saved tensors throws (recomputing a checkpoint ends that way), PyTorch leaves node
  // and outputs holding each other, for ever: here the outputs are detached from the node.
  Tensors saved_outputs;
  try {
    return LayerNode::apply(input, states, weights, cell, direction, batch_sizes, saves, is_step,
                            &saved_outputs);
  } catch (...) {
    for (const Tensor& output : saved_outputs) output.detach_();
    throw;
  }
}

inline Tensors layer(const Tensor& input, TensorList states, TensorList weights,
                     std::string_view cell, std::string_view direction,
                     const OptionalTensor& batch_sizes, bool recompute) {
  return run_with_node(input, states, weights, cell, direction, batch_sizes,
                       /*saves=*/!recompute, /*is_step=*/false);
}

inline Tensors step(const Tensor& input, TensorList states, TensorList weights,
                    std::string_view cell) {
  return run_with_node(input, states, weights, cell, "forward", std::nullopt, /*saves=*/true,
                       /*is_step=*/true);
}

}  // namespace rnn_cuda
