// Steps of a walk whose matrices are read too seldom, or are too small, to be packed for register
// tiles: a single step, or two of few rows; and W x of a handful of hidden units.
#pragma once

#include "walker.h"

namespace rnn_cuda::cpu {

template <class W>
class UnpackedSteps {
  using Storage = typename W::Storage;
  using T = typename W::T;
  using E = typename W::E;
  using Step = typename W::Step;

 public:
  explicit UnpackedSteps(const W& walker)
      : w_(walker),
        team_(walker.team_),
        r_(walker.r_),
        share_(walker.share_),
        buffers_(walker.buffers_) {}

  // W x + b of a chunk.
  void project_inputs(int64_t start, int64_t steps) const {
    if (team_.use_of_input == MatrixUse::Dotted) return dot_inputs(start, steps);
    stream_inputs(w_.input_row_[steps]);
  }

  void advance(const Step& step) const {
    if (team_.use_of_hidden == MatrixUse::Streamed) return advance_streamed(step);
    advance_in_blocks(step);
  }

 private:
  // Hidden sizes far below a vector: the vectors go along x instead.
  void dot_inputs(int64_t start, int64_t steps) const {
    const int64_t padded = padded_to_vectors<T>(r_.input_size);
    const Storage* const inputs = static_cast<const Storage*>(r_.input.data);
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t t = team_.schedule.time(start + s);
      for (int64_t i = 0; i < w_.rows(s); ++i) {
        const Storage* const x = inputs + team_.schedule.offset(r_.input, t, w_.sample(i));
        T* const to = buffers_.projected + (w_.input_row_[s] + i) * w_.input_ld_;
        std::copy(team_.bias + w_.first_column_, team_.bias + w_.end_column_,
                  to + w_.first_column_);
        for (int64_t n = w_.first_column_; n < std::min(w_.end_column_, r_.hidden_size); ++n)
          to[n] += dot(x, team_.input_rows + n * padded, r_.input_size);
      }
    }
  }

  void stream_inputs(int64_t chunk_rows) const {
    const int apart = team_.counts.apart, width = team_.counts.sums + apart;
    const T* const bias = team_.bias + w_.first_unit_ * width;
    const int64_t columns = (w_.end_unit_ - w_.first_unit_) * width;
    for (int64_t row = 0; row < chunk_rows; row += kStreamedRows) {
      const int64_t rows = std::min(kStreamedRows, chunk_rows - row);
      T* const projected = buffers_.projected + row * w_.input_ld_ + w_.first_unit_ * width;
      for (int64_t i = 0; i < rows; ++i) std::copy_n(bias, columns, projected + i * w_.input_ld_);
      add_streamed_gates(buffers_.inputs.from_row(row), rows, r_.weight_input,
                         {r_.hidden_size, width, apart}, w_.first_unit_, w_.end_unit_,
                         r_.input_size, projected, w_.input_ld_);
    }
  }

  // The product of some rows and a matrix, added to the sums of units [first, end).
  void add_streamed_gates(const Strips<E>& left, int64_t rows, const Matrix& matrix,
                          const Gates& gates, int64_t first, int64_t end, int64_t depth, T* sums,
                          int64_t sums_stride) const {
    const int64_t units = std::min(end, gates.units) - first;
    for (int vector = 0; vector < gates.sums; ++vector)
      if (const int value = gates.value(vector); value >= 0)
        add_streamed_product<Storage>(left, rows, matrix, value * gates.units + first, units, depth,
                                      sums + vector * kLanes<T>, sums_stride, gates.sums);
  }

  // A step of few rows, in as many columns at once as there is memory for their sums.
  void advance_streamed(const Step& step) const {
    const Gates gates = {r_.hidden_size, team_.counts.sums};
    const int64_t unit_columns = gates.sums * kLanes<T>;  // of a vector of units
    const int64_t most = kStreamedColumns<T> / unit_columns * unit_columns;
    for (int64_t column = w_.first_column_; column < w_.end_column_; column += most) {
      const int64_t width = std::min(most, w_.end_column_ - column);
      const int64_t first = column / gates.sums, end = first + width / gates.sums;
      begin_streamed(step, column, width);
      if (r_.input_size > 0 && !team_.projects_input)
        add_streamed_gates(buffers_.inputs.from_row(step.input_row), step.rows, r_.weight_input,
                           gates, first, end, r_.input_size, buffers_.sums, width);
      if (step.multiplied_rows > 0) {
        add_streamed_gates(buffers_.states.from_row(step.previous_row), step.multiplied_rows,
                           r_.weight_hidden, gates, first, end, r_.hidden_size, buffers_.sums,
                           width);
        if (team_.found_infinite != nullptr &&
            !is_finite<T>({buffers_.sums, width, false}, width, 0, step.multiplied_rows))
          team_.found_infinite->store(true, std::memory_order_relaxed);
      }
      (w_.*w_.finish_)(step, {column, width, 0, step.rows}, buffers_.sums);
    }
  }

  // A step of many rows, panel by panel.
  void advance_in_blocks(const Step& step) const {
    const Gates gates = {r_.hidden_size, team_.counts.sums};
    for (int64_t p = share_.first_panel; p < share_.end_panel; ++p) {
      const int64_t column = team_.panels.first_column(p);
      const int64_t width = team_.panels.vectors(p) * kLanes<T>;
      begin_streamed(step, column, width);
      if (r_.input_size > 0 && !team_.projects_input)
        add_product_in_blocks<Storage>(buffers_.inputs.from_row(step.input_row), step.rows,
                                       r_.weight_input, gates, r_.input_size, team_.panels, p,
                                       buffers_.block, buffers_.sums);
      if (step.multiplied_rows > 0)
        add_product_in_blocks<Storage>(
            buffers_.states.from_row(step.previous_row), step.multiplied_rows, r_.weight_hidden,
            gates, r_.hidden_size, team_.panels, p, buffers_.block, buffers_.sums);
      (w_.*w_.finish_)(step, {column, width, 0, step.rows}, buffers_.sums);
    }
  }

  // What the sums of some columns of a step begin with, if matrices are streamed.
  void begin_streamed(const Step& step, int64_t column, int64_t width) const {
    if (!team_.projects_input)
      return w_.init_sums(step, column, width, 0, step.rows, buffers_.sums);
    // What stays apart lies between the sums of two vectors of units.
    const int64_t piece = team_.counts.apart == 0 ? width : team_.counts.sums * kLanes<T>;
    for (int64_t i = 0; i < step.rows; ++i)
      for (int64_t j = 0; j < width; j += piece)
        std::copy_n(w_.projected(step.input_row + i, column + j), piece,
                    buffers_.sums + i * width + j);
  }

  const W& w_;
  const Team<Storage>& team_;
  const Recurrence& r_;
  const Share& share_;
  const WalkBuffers<Storage>& buffers_;
};

}  // namespace rnn_cuda::cpu
