// What a call for all gradients needs beyond its backward recurrence, and where in the scratch
// memory that lies.
#pragma once

#include <algorithm>
#include <vector>

#include "call.h"
#include "outer_product.h"

namespace rnn_cuda::cpu {

// Up to here, a product with W^T is little more than the writing of its result.
constexpr int64_t kShallowHiddenSize = 16;

template <class Storage>
struct GradientScratch {
  using T = typename ComputeOf<Storage>::type;
  using E = typename OperandOf<Storage>::type;
  using R = typename OperandOf<Storage>::of_rows;

  GradientScratch(const Gradients& g, const Call<Storage>& call, ScratchLayout& layout)
      : rows(std::min(call.chunk_rows(), kRowsPerChunk)),
        sums_at_once(call.is_single_chunk() &&
                     (call.division().threads == 1 || call.division().cut_hidden)),
        use_of_input(choose_use_of_input(g, call)),
        input_panels(g.grad_input == nullptr ? 0 : g.input_size, call.division().panel_vectors),
        uses_input_in_place(is_flat(g.backward.hidden_size, g.input_size)),
        // Columns of strips are padded to whole vectors: let the longer side be along them.
        input_is_left(!uses_input_in_place &&
                      g.input_size * padded_to_vectors<T>(g.backward.hidden_size) <
                          g.backward.hidden_size * padded_to_vectors<T>(g.input_size)) {
    const int threads = call.division().threads;
    const int64_t hidden = g.backward.hidden_size;
    packed_input = layout.add<E>(use_of_input == MatrixUse::Packed
                                     ? input_panels.padded_columns() * operands<E>(hidden)
                                     : 0);
    zeros_size = padded_to_vectors<T>(g.input_size) + call.panels().padded_columns();
    zeros = layout.add<T>(zeros_size);
    previous_size = Strips<R>::size_for(row_operands<R>(rows), hidden);
    previous = layout.add<R>(previous_size * threads);
    input_size = uses_input_in_place ? 0 : Strips<R>::size_for(row_operands<R>(rows), g.input_size);
    input = layout.add<R>(input_size * threads);
    delta_size = kRowsPer<R> == 1 ? 0 : previous_size;
    delta = layout.add<R>(delta_size * threads);
    for (int thread = 0; thread < threads; ++thread) {
      const Share share = call.share(thread);
      const int64_t first = call.panels().first_column(share.first_panel);
      const int64_t end = std::min(call.panels().first_column(share.end_panel), hidden);
      OuterProduct<R> hidden_product, input_product;
      if (g.grad_weight_hidden != nullptr) hidden_product = {first, end, hidden};
      if (g.grad_weight_input != nullptr && uses_input_in_place)
        input_product = OuterProduct<R>::in_place(first, end, g.input_size);
      else if (g.grad_weight_input != nullptr)
        input_product = input_is_left ? OuterProduct<R>(0, g.input_size, end - first)
                                      : OuterProduct<R>(first, end, g.input_size);
      weight_hidden.push_back(hidden_product);
      weight_input.push_back(input_product);
      weight_hidden_at.push_back(layout.add<T>(sums_at_once ? 0 : hidden_product.size()));
      weight_input_at.push_back(layout.add<T>(sums_at_once ? 0 : input_product.size()));
      bias_at.push_back(layout.add<T>(call.panels().padded_columns()));
    }
  }

  // Streamed for many rows too, a few at a time, where there is little to sum: tiles would do next
  // to nothing between one write and the next.
  static MatrixUse choose_use_of_input(const Gradients& g, const Call<Storage>& call) {
    if (g.backward.hidden_size <= kShallowHiddenSize && can_stream<E>(kStreamedRows))
      return MatrixUse::Streamed;
    if (call.use_of_hidden() == MatrixUse::Streamed && call.chunk_rows() <= kStreamedRows)
      return MatrixUse::Streamed;
    return g.backward.time_steps == 1 ? call.use_of_hidden() : MatrixUse::Packed;
  }

  const int64_t rows;            // that are worked on at once
  const bool sums_at_once;       // a weight gradient is one outer product and needs no adding up
  const MatrixUse use_of_input;  // W, for the gradient of the input
  const Panels<T> input_panels;
  const bool uses_input_in_place;  // for W's gradient
  const bool input_is_left;
  int64_t packed_input, zeros, zeros_size, previous, previous_size, input, input_size;
  int64_t delta, delta_size;  // as row operands, where these are not the values themselves
  // One per thread.
  std::vector<OuterProduct<R>> weight_hidden, weight_input;
  std::vector<int64_t> weight_hidden_at, weight_input_at, bias_at;
};

}  // namespace rnn_cuda::cpu
