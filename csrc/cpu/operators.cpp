// The operators on CPU tensors.
// (Files of this name are compiled as one: torch/library.h takes longest to read.)
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>

#include "gradients_by_products.h"
#include "output_pool.h"

namespace rnn_cuda::cpu {
namespace {

Tensor pooled(at::IntArrayRef shape, at::ScalarType type) {
  return at::detail::empty_generic(shape, output_allocator(),
                                   c10::DispatchKeySet(c10::DispatchKey::CPU), type, std::nullopt);
}

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// The part of rows, or of a block of states, that is direction d's.
void* part_of(const Tensor& tensor, int64_t d, int64_t elements) {
  return static_cast<char*>(tensor.mutable_data_ptr()) +
         d * elements * static_cast<int64_t>(tensor.element_size());
}

Tensor run(const RecurrenceBuilder& builder) {
  Recurrence r = builder.recurrence();
  Tensor output = pooled(builder.shape_with(r.hidden_size), builder.type());
  r.output = output.mutable_data_ptr();
  cpu::run(r, threads());
  return output;
}

// Output and final states; what the cell saves of each direction, if it is wanted.
Tensors layer_forward(const Tensor& input, TensorList states, TensorList weights,
                      std::string_view cell, std::string_view direction,
                      const OptionalTensor& batch_sizes, bool saves) {
  const NoAutograd guard;
  const Layer layer(input, states, weights, cell, direction, batch_sizes);
  const int64_t directions = layer.directions(), hidden = layer.hidden_size();
  // All arguments are checked before anything runs.
  c10::SmallVector<RecurrenceBuilder, 2> builders;
  for (int64_t d = 0; d < directions; ++d) builders.push_back(layer.forward(d));
  const RecurrenceBuilder& first = builders[0];
  const int64_t batch = first.recurrence().batch, values = layer.counts().saved;
  Tensors results = {pooled(first.shape_with(directions * hidden), first.type())};
  for (int64_t i = 0; i < layer.states(); ++i)
    results.push_back(at::empty({directions, batch, hidden}, first.options()));
  for (int64_t d = 0; d < directions; ++d) {
    Recurrence r = builders[d].recurrence();
    r.output = part_of(results[0], d, hidden);
    r.output_stride = directions * hidden;
    r.last = part_of(results[1], d, batch * hidden);
    if (layer.states() == 2) r.last_carried = part_of(results[2], d, batch * hidden);
    if (saves && values > 0)
      r.saved = results.emplace_back(pooled(first.shape_with(values * hidden), first.type()))
                    .mutable_data_ptr();
    cpu::run(r, threads());
  }
  return results;
}

// The builder's recurrence is the backward one.
Gradients gradients_from(RecurrenceBuilder& builder, const Layer& layer, int64_t d,
                         const Tensor& output) {
  Gradients g;
  g.backward = builder.recurrence();
  g.states = layer.is_simple() ? g.backward.operand : builder.hidden_rows(output, "output");
  g.input_size = layer.input().size(-1);
  g.input = builder.rows(layer.input(), "input", g.input_size);
  g.weight_input =
      builder.matrix(layer.weight_ih(d), "weight_ih", layer.hidden_size(), g.input_size);
  if (const OptionalTensor state = layer.state(0)) g.initial = builder.state(*state, "h0");
  return g;
}

// What a backward recurrence is to leave for those who measure adjoints.
void allocate_adjoints(const RecurrenceBuilder& builder, const DirectionWanted& wanted,
                       Recurrence& r, DirectionGradients& gradients) {
  for (int a = 0; a < builder.counts().adjoints; ++a) {
    if (wanted.norms) {
      gradients.norms[a] = pooled(builder.shape_of_norms(), at::kDouble);
      r.adjoint_norms[a] = gradients.norms[a].mutable_data_ptr<double>();
    }
    if (wanted.adjoints || wanted.constants) {
      gradients.adjoints[a] = pooled(builder.shape_with(r.hidden_size), builder.compute_type());
      r.adjoints[a] = gradients.adjoints[a].mutable_data_ptr();
    }
  }
}

// Allocates and fills what is wanted.
DirectionGradients run(const RecurrenceBuilder& builder, Gradients g, const Layer& layer,
                       const DirectionWanted& wanted) {
  const int64_t batch = g.backward.batch, H = g.backward.hidden_size;
  DirectionGradients gradients;
  const auto allocate = [](Tensor& tensor, bool is_wanted, at::IntArrayRef shape,
                           at::ScalarType type) -> void* {
    if (!is_wanted) return nullptr;
    tensor = pooled(shape, type);
    return tensor.mutable_data_ptr();
  };
  const at::ScalarType type = builder.type();
  g.grad_input = allocate(gradients.input, wanted.input, layer.input().sizes(), type);
  g.grad_initial = allocate(gradients.states[0], wanted.states[0], {1, batch, H}, type);
  g.grad_weight_input = allocate(gradients.weight_ih, wanted.weight_ih, {H, g.input_size}, type);
  g.grad_weight_hidden = allocate(gradients.weight_hh, wanted.weight_hh, {H, H}, type);
  g.grad_bias = allocate(gradients.bias_ih, wanted.bias, {H}, builder.compute_type());
  allocate_adjoints(builder, wanted, g.backward, gradients);
  g.backward.output = allocate(gradients.delta, wanted.delta, builder.shape_with(H), type);
  cpu::run(g, threads());
  return gradients;
}

// Of cells with several values of a kind: the backward recurrence, then products.
DirectionGradients run_then_multiply(const RecurrenceBuilder& builder, const Layer& layer,
                                     int64_t d, const Tensor& output, const DirectionWanted& wanted,
                                     const Tensor* other_of_input) {
  Recurrence r = builder.recurrence();
  const Counts& counts = builder.counts();
  const auto kept = [&](int values) {
    return pooled(builder.shape_with(values * r.hidden_size), builder.type());
  };
  BackwardResults results;
  results.delta = kept(counts.published);
  r.output = results.delta.mutable_data_ptr();
  if (counts.saved > 0) {
    results.apart = kept(counts.saved);
    r.saved = results.apart.mutable_data_ptr();
  }
  results.carried = at::empty({1, r.batch, r.hidden_size}, builder.options());
  r.last_carried = results.carried.mutable_data_ptr();
  DirectionGradients gradients;
  allocate_adjoints(builder, wanted, r, gradients);
  cpu::run(r, threads());
  gradients_by_products(builder, results, layer, d, output, wanted, other_of_input, gradients);
  return gradients;
}

// How many time steps the backward pass takes at once. So many that deltas and products stay in the
// cache, and no fewer than packing U is worth; a weight's gradient is then a sum of sums, too,
// which loses fewer digits.
int64_t steps_at_once(const Layer& layer, int64_t batch) {
  constexpr int64_t kDeltaBytes = 2 << 20, kFewestRows = 1024;
  const int64_t row = layer.counts().sums * layer.hidden_size() * layer.input().element_size();
  return std::max<int64_t>(std::max(kFewestRows, kDeltaBytes / row) / std::max<int64_t>(batch, 1),
                           1);
}

// `run_then_multiply` of one segment of time after the other, from the layer's end: what arrives at
// the first state of one is the gradient of the last state of the other.
DirectionGradients run_in_segments(const OptionalTensors& grads, const Tensor& input,
                                   TensorList states, TensorList weights, const Tensor& output,
                                   TensorList saved, std::string_view cell,
                                   std::string_view direction, const Layer& layer, int64_t d,
                                   const DirectionWanted& wanted, const Tensor* other_of_input,
                                   int64_t steps) {
  const int64_t length = input.size(0), directions = layer.directions();
  const OptionalTensor no_batch_sizes;
  DirectionGradients total;
  if (wanted.input)
    total.input = other_of_input != nullptr ? *other_of_input : at::zeros_like(input);
  OptionalTensors final_grads;
  for (int64_t i = 0; i < layer.states(); ++i) final_grads.push_back(grads.get(1 + i));
  Tensors norms[kMaxAdjoints], adjoints[kMaxAdjoints];  // of the segments, in their order
  for (int64_t done = 0, taken = 0; done < length; done += taken) {
    taken = std::min(steps, length - done);
    const bool is_first = done + taken == length;  // in the order of the forward pass
    const int64_t begin = layer.is_reverse(d) ? done : length - done - taken;
    const auto part = [&](const Tensor& whole) { return whole.narrow(0, begin, taken); };
    Tensors starts(states.begin(), states.end());
    if (!is_first) {
      // Of c0 only the shape counts here.
      const Tensor before = output.select(0, layer.is_reverse(d) ? begin + taken : begin - 1);
      starts.assign(layer.states(),
                    before.view({-1, directions, layer.hidden_size()}).transpose(0, 1));
    }
    OptionalTensors its_grads;
    its_grads.push_back(grads.get(0) ? OptionalTensor(part(*grads.get(0))) : std::nullopt);
    for (const OptionalTensor& grad : final_grads) its_grads.push_back(grad);
    Tensors its_saved;
    for (const Tensor& each : saved) its_saved.push_back(part(each));
    const Tensor its_input = part(input), its_output = part(output);
    const Layer segment(its_input, starts, weights, cell, direction, no_batch_sizes);
    DirectionWanted its = wanted;
    for (int64_t i = 0; i < layer.states(); ++i) its.states[i] |= !is_first;
    const Tensor its_grad_input = wanted.input ? part(total.input) : Tensor();
    DirectionGradients its_gradients =
        run_then_multiply(segment.backward(d, its_grads, its_output, its_saved), segment, d,
                          its_output, its, &its_grad_input);
    for (Tensor DirectionGradients::* sum :
         {&DirectionGradients::weight_ih, &DirectionGradients::weight_hh,
          &DirectionGradients::bias_ih, &DirectionGradients::bias_hh}) {
      if ((total.*sum).defined())
        (total.*sum).add_(its_gradients.*sum);
      else
        total.*sum = its_gradients.*sum;
    }
    for (int64_t i = 0; i < layer.states(); ++i) {
      total.states[i] = its_gradients.states[i];
      if (!is_first) final_grads.set(i, total.states[i].expand({directions, -1, -1}));
    }
    for (int a = 0; a < kMaxAdjoints; ++a) {
      if (its_gradients.norms[a].defined()) norms[a].push_back(its_gradients.norms[a]);
      if (its_gradients.adjoints[a].defined()) adjoints[a].push_back(its_gradients.adjoints[a]);
    }
  }
  for (int a = 0; a < kMaxAdjoints; ++a)
    for (Tensors* parts : {&norms[a], &adjoints[a]}) {
      if (parts->empty()) continue;
      if (!layer.is_reverse(d)) std::reverse(parts->begin(), parts->end());
      (parts == &norms[a] ? total.norms : total.adjoints)[a] =
          at::cat(*parts, parts == &norms[a] ? 1 : 0);
    }
  return total;
}

Tensors layer_gradients(const OptionalTensors& grads, const Tensor& input, TensorList states,
                        TensorList weights, const Tensor& output, TensorList saved,
                        std::string_view cell, std::string_view direction,
                        const OptionalTensor& batch_sizes, const c10::List<bool>& wanted) {
  const NoAutograd guard;
  const Layer layer(input, states, weights, cell, direction, batch_sizes);
  const int64_t directions = layer.directions();
  Tensors recomputed;
  if (layer.counts().saved > 0 && saved.empty()) {
    recomputed = layer_forward(input, states, weights, cell, direction, batch_sizes, true);
    saved = TensorList(recomputed).slice(1 + layer.states());
  }
  c10::SmallVector<RecurrenceBuilder, 2> builders;
  c10::SmallVector<Gradients, 2> problems;
  for (int64_t d = 0; d < directions; ++d) {
    builders.push_back(layer.backward(d, grads, output, saved));
    if (layer.has_one_delta())
      problems.push_back(gradients_from(builders.back(), layer, d, output));
    else
      check_forward_arguments(builders.back(), layer, d);
  }
  DirectionGradients gradients[2];
  for (int64_t d = 0; d < directions; ++d) {
    const DirectionWanted its = layer.wanted(d, wanted);
    if (!its.anything()) continue;
    const Tensor* other_of_input = d == 1 ? &gradients[0].input : nullptr;
    const int64_t steps = steps_at_once(layer, builders[d].recurrence().batch);
    if (!layer.has_one_delta() && !batch_sizes && !is_half(builders[d].type()) &&
        input.size(0) > steps)
      gradients[d] = run_in_segments(grads, input, states, weights, output, saved, cell, direction,
                                     layer, d, its, other_of_input, steps);
    else if (!layer.has_one_delta())
      gradients[d] = run_then_multiply(builders[d], layer, d, output, its, other_of_input);
    else if (its.only_delta())
      gradients[d].delta = run(builders[d]);
    else
      gradients[d] = run(builders[d], problems[d], layer, its);
    if (its.constants)
      constant_gradients(builders[d], layer, d, output, saved[d], gradients[d].adjoints[0],
                         gradients[d]);
  }
  if (layer.has_one_delta() && directions == 2 && wanted.get(0))
    gradients[0].input.add_(gradients[1].input);
  return layer.results(gradients, wanted);
}

Tensor linear_recurrence(const Tensor& d, const Tensor& g, const Tensor& m,
                         const OptionalTensor& y0, bool reverse, const OptionalTensor& batch_sizes,
                         bool transposed) {
  const NoAutograd guard;
  const RecurrenceBuilder builder =
      linear_recurrence_builder(d, g, m, y0, reverse, batch_sizes, transposed);
  const Counts& counts = builder.counts();
  if (counts.saved == 0) return run(builder);
  // What is published is not the result, or not all of it.
  Recurrence r = builder.recurrence();
  const Tensor published =
      pooled(builder.shape_with(counts.published * r.hidden_size), builder.type());
  const Tensor result = pooled(builder.shape_with(counts.saved * r.hidden_size), builder.type());
  r.output = published.mutable_data_ptr();
  r.saved = result.mutable_data_ptr();
  cpu::run(r, threads());
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(rnn_cuda, CPU, library) {
  library.impl("layer_forward", layer_forward);
  library.impl("layer_gradients", layer_gradients);
  library.impl("linear_recurrence", linear_recurrence);
}

}  // namespace rnn_cuda::cpu
