// The loop over time, for one thread's share of a recurrence.
//
// A walk goes through time in chunks of steps. The states of a chunk lie one behind the other in
// slots; slot 0 is the state before the chunk, slot s + 1 that of its step s. What does not depend
// on a previous state (the input product, where it pays) is done for a chunk at once; then each
// step is one pass of register tiles: init, products, epilogue, results out.
#pragma once

#include <algorithm>
#include <vector>

#include "epilogues.h"
#include "product.h"
#include "schedule.h"
#include "team.h"

namespace rnn_cuda::cpu {

// What all threads of a call share.
template <class T>
struct Team {
  const Recurrence& recurrence;
  const Schedule& schedule;
  const Plan& plan;
  Panels<T> panels;  // of the hidden dimension
  int64_t steps_per_chunk;
  bool projects_input;     // for a chunk at once; else x is one more factor of each step's tiles
  const T* packed_hidden;  // M
  const T* packed_input;   // W
  const T* bias;           // of all padded columns, zeros where there is none
  SpinBarrier& barrier;

  // Between steps: where the batch is cut, nobody waits.
  void wait_for_state() const { barrier.wait(plan.cut_hidden ? plan.threads : 1); }
};

// The memory of a walk; where the hidden dimension is cut, `states` and `projected` are the team's.
template <class T>
struct WalkBuffers {
  Strips<T> states;        // steps_per_chunk + 1 slots
  Strips<T> inputs;        // x of a chunk
  T* projected = nullptr;  // bias + W x of a chunk, rows of padded columns
};

template <class Storage, template <class> class EpilogueOf>
class Walker {
 public:
  using T = typename ComputeOf<Storage>::type;
  using Epilogue = EpilogueOf<T>;

  Walker(const Team<T>& team, const Share& share, const WalkBuffers<T>& buffers)
      : team_(team),
        r_(team.recurrence),
        share_(share),
        buffers_(buffers),
        ld_(team.panels.padded_columns()),
        first_column_(team.panels.first_column(share.first_panel)),
        end_column_(team.panels.first_column(share.end_panel)),
        slot_row_(team.steps_per_chunk + 2) {}

  // Walks the whole sequence; calls after_chunk(first step, steps) when a chunk's states are there.
  template <class AfterChunk>
  void run(const AfterChunk& after_chunk) {
    for (int64_t start = 0; start < r_.time_steps; start += team_.steps_per_chunk) {
      const int64_t steps = std::min(team_.steps_per_chunk, r_.time_steps - start);
      // Nobody reads a slot any more: the last step ended in a wait. But the first step will read
      // columns of slot 0 that other threads prepare.
      begin_chunk(start, steps);
      team_.wait_for_state();
      for (int64_t s = 0; s < steps; ++s) {
        advance(start + s, s);
        team_.wait_for_state();
      }
      after_chunk(start, steps);
    }
  }

  // Rows that the share has at a visited step, none outside the sequence.
  int64_t rows(int64_t step) const { return share_.rows(team_.schedule.samples(step)); }
  int64_t sample(int64_t row) const { return share_.first_sample + row * share_.sample_step; }
  const Strips<T>& states() const { return buffers_.states; }
  // First row of a slot in `states`; of the slot after the last, the end.
  int64_t slot_row(int64_t slot) const { return slot_row_[slot]; }

 private:
  void begin_chunk(int64_t start, int64_t steps) {
    const int64_t carried = rows(start - 1);
    for (int64_t n = first_column_; n < end_column_ && carried > 0; n += kLanes<T>)
      std::copy_n(buffers_.states.at(slot_row_[team_.steps_per_chunk], n), carried * kLanes<T>,
                  buffers_.states.at(0, n));
    // Slot s + 1 holds the states of step s, and behind them the initial states of the samples that
    // enter at the next step (packed, in reverse): both are "previous states" there.
    slot_row_[0] = 0;
    for (int64_t s = 0; s <= steps; ++s)
      slot_row_[s + 1] = slot_row_[s] + std::max(rows(start + s - 1), rows(start + s));
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t i = rows(start + s - 1); i < rows(start + s); ++i)
        read_initial(sample(i), slot_row_[s] + i);
    if (r_.input_size == 0) return;
    read_inputs(start, steps);
    if (team_.projects_input) project_inputs(slot_row_[steps + 1] - slot_row_[1]);
  }

  void read_initial(int64_t b, int64_t row) {
    const Storage* from = static_cast<const Storage*>(r_.initial);
    if (from != nullptr) from += b * r_.hidden_size;
    for (int64_t n = first_column_; n < end_column_; n += kLanes<T>)
      store<T>(buffers_.states.at(row, n),
               from == nullptr ? Vec<T>{} : load_converted(from + n, r_.hidden_size - n));
  }

  // x of a chunk into strips, row by row as the slots have them.
  void read_inputs(int64_t start, int64_t steps) {
    const Storage* const from = static_cast<const Storage*>(r_.input.data);
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t t = team_.schedule.time(start + s);
      for (int64_t row = slot_row_[s + 1]; row < slot_row_[s + 2]; ++row) {
        const int64_t i = row - slot_row_[s + 1];
        const bool exists = i < rows(start + s);
        const Storage* x = exists ? from + team_.schedule.offset(r_.input, t, sample(i)) : nullptr;
        for (int64_t k = 0; k < r_.input_size; k += kLanes<T>)
          store<T>(buffers_.inputs.at(row - slot_row_[1], k),
                   exists ? load_converted(x + k, r_.input_size - k) : Vec<T>{});
      }
    }
  }

  void project_inputs(int64_t chunk_rows) {
    for (int64_t p = share_.first_panel; p < share_.end_panel; ++p) {
      const int64_t column = team_.panels.first_column(p);
      const int vectors = team_.panels.vectors(p);
      for_row_blocks(chunk_rows, vectors, [&](int64_t row, int64_t height) {
        kTiles<T>[vectors - 1][height - 1]({team_.bias + column,
                                            0,
                                            {input_factors(row, column)},
                                            1,
                                            buffers_.projected + row * ld_ + column,
                                            ld_});
      });
    }
  }

  Factors<T> input_factors(int64_t row, int64_t column) const {
    return {buffers_.inputs.at(row, 0), buffers_.inputs.stride,
            team_.packed_input + r_.input_size * column, r_.input_size};
  }

  void advance(int64_t step, int64_t s) {
    for (int64_t p = share_.first_panel; p < share_.end_panel; ++p)
      for_row_blocks(rows(step), team_.panels.vectors(p),
                     [&](int64_t row, int64_t height) { advance_tile(step, s, p, row, height); });
  }

  // Rows [first, first + height) of a step, the columns of one panel.
  void advance_tile(int64_t step, int64_t s, int64_t panel, int64_t first, int64_t height) {
    const int64_t column = team_.panels.first_column(panel);
    const int vectors = team_.panels.vectors(panel);
    const int64_t width = vectors * kLanes<T>;
    alignas(kVectorBytes) T sums[kMaxTileRows * kMaxPanelVectors * kLanes<T>];

    TileArguments<T> arguments;
    arguments.out = sums;
    arguments.out_stride = width;
    arguments.product_count = 0;
    const int64_t input_row = slot_row_[s + 1] - slot_row_[1] + first;
    const bool has_first = r_.first_addend != nullptr && first + height > rows(step - 1);
    if (r_.addend.data != nullptr || has_first) {
      init_sums(step, column, width, first, height, sums);
      arguments.init = sums;
      arguments.init_stride = width;
    } else if (team_.projects_input) {
      arguments.init = buffers_.projected + input_row * ld_ + column;
      arguments.init_stride = ld_;
    } else {
      arguments.init = team_.bias + column;
      arguments.init_stride = 0;
    }
    if (r_.input_size > 0 && !team_.projects_input)
      arguments.products[arguments.product_count++] = input_factors(input_row, column);
    arguments.products[arguments.product_count++] = {
        buffers_.states.at(slot_row_[s] + first, 0), buffers_.states.stride,
        team_.packed_hidden + r_.hidden_size * column, r_.hidden_size};
    kTiles<T>[vectors - 1][height - 1](arguments);
    finish(step, column, width, first, height, sums, slot_row_[s + 1] + first);
  }

  // The addend, and what a sample gets on its first step.
  void init_sums(int64_t step, int64_t column, int64_t width, int64_t first, int64_t height,
                 T* sums) const {
    const int64_t t = team_.schedule.time(step);
    for (int64_t i = first; i < first + height; ++i, sums += width) {
      const Storage* addend = static_cast<const Storage*>(r_.addend.data);
      if (addend != nullptr) addend += team_.schedule.offset(r_.addend, t, sample(i)) + column;
      const Storage* more = nullptr;
      if (r_.first_addend != nullptr && i >= rows(step - 1))
        more = static_cast<const Storage*>(r_.first_addend) + sample(i) * r_.hidden_size + column;
      for (int64_t j = 0; j < width; j += kLanes<T>) {
        const int64_t count = r_.hidden_size - column - j;
        Vec<T> sum = load(team_.bias + column + j);
        if (addend != nullptr) sum += load_converted(addend + j, count);
        if (more != nullptr) sum += load_converted(more + j, count);
        store<T>(sums + j, sum);
      }
    }
  }

  void finish(int64_t step, int64_t column, int64_t width, int64_t first, int64_t height,
              const T* sums, int64_t state_row) {
    const int64_t t = team_.schedule.time(step);
    T* state = buffers_.states.at(state_row, column);
    const int64_t strip_stride = buffers_.states.stride;
    for (int64_t i = first; i < first + height; ++i, sums += width, state += kLanes<T>) {
      const int64_t b = sample(i);
      Storage* out = static_cast<Storage*>(r_.output);
      if (out != nullptr) out += team_.schedule.row(t, b) * r_.hidden_size + column;
      const Storage* operand = nullptr;
      if constexpr (Epilogue::kUsesOperand)
        operand = static_cast<const Storage*>(r_.operand.data) +
                  team_.schedule.offset(r_.operand, t, b) + column;
      T* strip = state;
      for (int64_t j = 0; j < width; j += kLanes<T>, strip += strip_stride) {
        const int64_t count = r_.hidden_size - column - j;
        Vec<T> e{};
        if constexpr (Epilogue::kUsesOperand) e = load_converted(operand + j, count);
        Vec<T> v = Epilogue::apply(load(sums + j), e);
        if (out != nullptr) v = store_converted(out + j, v, count);
        store<T>(strip, v);
      }
      if (r_.last != nullptr && i >= rows(step + 1))
        std::copy_n(out, std::min(width, r_.hidden_size - column),
                    static_cast<Storage*>(r_.last) + b * r_.hidden_size + column);
    }
  }

  const Team<T>& team_;
  const Recurrence& r_;
  const Share share_;
  const WalkBuffers<T> buffers_;
  const int64_t ld_;
  const int64_t first_column_, end_column_;
  std::vector<int64_t> slot_row_;  // of the chunk
};

}  // namespace rnn_cuda::cpu
