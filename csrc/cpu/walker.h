// The loop over time, for one thread's share of a recurrence.
//
// A walk goes through time in chunks of steps. Slot 0 is the state before the chunk, slot s + 1
// that of its step s. What does not depend on a previous state (the input product, where it pays)
// is done for a chunk at once; then each step is one pass of register tiles: init, products,
// epilogue, results out.
#pragma once

#include <algorithm>
#include <vector>

#include "epilogues.h"
#include "product.h"
#include "schedule.h"
#include "team.h"

namespace rnn_cuda::cpu {

// What all threads of a call share.
template <class Storage>
struct Team {
  using T = typename ComputeOf<Storage>::type;
  using E = typename OperandOf<Storage>::type;

  const Recurrence& recurrence;
  const Schedule& schedule;
  const Plan& plan;
  Panels<T> panels;  // of the hidden dimension
  int64_t steps_per_chunk;
  // A chunk's slots lie one behind the other until it ends; else two slots take turns.
  bool keeps_states;
  bool projects_input;     // for a chunk at once; else x is one more factor of each step's tiles
  bool dots_input;         // projects by dot products: too few columns for tiles
  bool streams;            // M, and W unless it is projected, are used where they lie, not packed
  const E* packed_hidden;  // M
  const E* packed_input;   // W
  const T* input_rows;     // for dot products: W's rows, padded to whole vectors
  const T* bias;           // of all padded columns, zeros where there is none
  SpinBarrier& barrier;

  // Between steps: where the batch is cut, nobody waits.
  void wait_for_state() const { barrier.wait(plan.cut_hidden ? plan.threads : 1); }
};

// The memory of a walk; where the hidden dimension is cut, `states` and `projected` are the team's.
template <class Storage>
struct WalkBuffers {
  using T = typename ComputeOf<Storage>::type;
  using E = typename OperandOf<Storage>::type;

  Strips<E> states;        // steps_per_chunk + 1 slots, or two
  Strips<T> values;        // the same in compute type, if states are kept
  Strips<E> inputs;        // x of a chunk
  T* projected = nullptr;  // bias + W x of a chunk, rows of padded columns
  T* sums = nullptr;       // of a panel of all rows, and
  E* block = nullptr;      // a part of a panel, where matrices are streamed
  T* z = nullptr;          // of each of the last z_slots steps, rows of padded columns, if wanted
  int64_t z_slots = 1;
};

template <class Storage, template <class> class EpilogueOf>
class Walker {
 public:
  using T = typename ComputeOf<Storage>::type;
  using E = typename OperandOf<Storage>::type;
  using Epilogue = EpilogueOf<T>;

  Walker(const Team<Storage>& team, const Share& share, const WalkBuffers<Storage>& buffers)
      : team_(team),
        r_(team.recurrence),
        share_(share),
        buffers_(buffers),
        ld_(team.panels.padded_columns()),
        first_column_(team.panels.first_column(share.first_panel)),
        end_column_(team.panels.first_column(share.end_panel)),
        slot_row_(team.steps_per_chunk + 2) {}

  // Walks the whole sequence; calls after_step(chunk's first step, step of the chunk) when a step's
  // states are there, and after_chunk(first step, steps).
  template <class AfterStep, class AfterChunk>
  void run(const AfterStep& after_step, const AfterChunk& after_chunk) {
    for (int64_t start = 0; start < r_.time_steps; start += team_.steps_per_chunk) {
      const int64_t steps = std::min(team_.steps_per_chunk, r_.time_steps - start);
      // Nobody reads a slot any more: the last step ended in a wait. But the first step will read
      // columns of slot 0 that other threads prepare.
      begin_chunk(start, steps);
      team_.wait_for_state();
      for (int64_t s = 0; s < steps; ++s) {
        advance(step(start, s));
        team_.wait_for_state();
        after_step(start, s);
      }
      after_chunk(start, steps);
    }
  }

  // Rows that the share has at step s of the chunk; of s = -1 and the number of steps, of the steps
  // around it, none outside the sequence.
  int64_t rows(int64_t s) const { return rows_[s + 1]; }
  int64_t sample(int64_t row) const { return share_.first_sample + row * share_.sample_step; }
  const WalkBuffers<Storage>& buffers() const { return buffers_; }
  // First row of a slot in `states`; of the slot after the last, the end (if states are kept).
  int64_t slot_row(int64_t slot) const { return slot_row_[slot]; }
  // What the epilogue was applied to, at the step-th visited step.
  T* z(int64_t step, int64_t row) const {
    return buffers_.z + (step % buffers_.z_slots * team_.plan.rows + row) * ld_;
  }

 private:
  // A row of features for each of the share's rows at one step, or null.
  template <class Value>
  struct StepRows {
    Value* first = nullptr;
    int64_t stride = 0;

    Value* row(int64_t i, int64_t column) const {
      return first == nullptr ? nullptr : first + i * stride + column;
    }
  };

  // All that the tiles of one step have in common.
  struct Step {
    int64_t rows, rows_before, rows_after;    // of this step and of those around it
    int64_t previous_row, row;                // first rows of the slots it reads and writes
    int64_t input_row;                        // first row of its inputs
    bool has_previous;                        // a state to be multiplied
    StepRows<const Storage> addend, operand;  // of all rows
    StepRows<const Storage> first_addend;     // of rows rows_before and up
    StepRows<Storage> output;                 // of all rows
    StepRows<Storage> last;                   // of rows rows_after and up
    StepRows<T> z;                            // of all rows
  };

  Step step(int64_t start, int64_t s) const {
    const int64_t t = team_.schedule.time(start + s);
    const auto input_rows = [&](const Rows& rows) -> StepRows<const Storage> {
      if (rows.data == nullptr) return {};
      return {static_cast<const Storage*>(rows.data) +
                  team_.schedule.offset(rows, t, share_.first_sample),
              rows.batch_stride * share_.sample_step};
    };
    // (B, H), contiguous, from a row on.
    const auto block_rows = [&](auto* data,
                                int64_t row) -> StepRows<std::remove_pointer_t<decltype(data)>> {
      if (data == nullptr) return {};
      return {data + row * r_.hidden_size, r_.hidden_size * share_.sample_step};
    };
    return {
        rows(s),
        rows(s - 1),
        rows(s + 1),
        slot_row_[s],
        slot_row_[s + 1],
        input_row_[s],
        start + s > 0 || r_.initial != nullptr || r_.multiplies_zero_initial,
        input_rows(r_.addend),
        input_rows(r_.operand),
        block_rows(static_cast<const Storage*>(r_.first_addend), share_.first_sample),
        block_rows(static_cast<Storage*>(r_.output), team_.schedule.row(t, share_.first_sample)),
        block_rows(static_cast<Storage*>(r_.last), share_.first_sample),
        {buffers_.z == nullptr ? nullptr : z(start + s, 0), ld_}};
  }

  void begin_chunk(int64_t start, int64_t steps) {
    rows_.resize(steps + 2);
    for (int64_t s = -1; s <= steps; ++s)
      rows_[s + 1] = share_.rows(team_.schedule.samples(start + s));
    place_slots(start, steps);
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t i = rows(s - 1); i < rows(s); ++i) read_initial(sample(i), slot_row_[s] + i);
    if (r_.input_size == 0) return;
    if (team_.dots_input) return dot_inputs(start, steps);
    read_inputs(start, steps);
    if (team_.projects_input) project_inputs(input_row_[steps]);
  }

  // A slot holds the states of a step, and behind them the initial states of the samples that enter
  // at the next step (packed, in reverse): both are "previous states" there.
  void place_slots(int64_t start, int64_t steps) {
    input_row_.assign(1, 0);
    for (int64_t s = 0; s < steps; ++s) input_row_.push_back(input_row_[s] + rows(s));
    if (!team_.keeps_states) {
      for (int64_t s = 0; s <= steps; ++s) slot_row_[s] = (start + s) % 2 * team_.plan.rows;
      return;
    }
    const int64_t last_slot = slot_row_[team_.steps_per_chunk];
    for (int64_t n = first_column_; n < end_column_ && start > 0; n += kLanes<T>)
      for (int64_t i = 0; i < rows(-1); ++i)
        std::copy_n(buffers_.states.at(last_slot + i, n), kLanes<T> / kValuesPer<E>,
                    buffers_.states.at(i, n));
    slot_row_[0] = 0;
    for (int64_t s = 0; s <= steps; ++s)
      slot_row_[s + 1] = slot_row_[s] + std::max(rows(s - 1), rows(s));
  }

  void read_initial(int64_t b, int64_t row) {
    const Storage* from = static_cast<const Storage*>(r_.initial);
    if (from != nullptr) from += b * r_.hidden_size;
    for (int64_t n = first_column_; n < end_column_; n += kLanes<T>)
      set_state(row, n, from == nullptr ? Vec<T>{} : load_converted(from + n, r_.hidden_size - n));
  }

  void set_state(int64_t row, int64_t column, Vec<T> v) const {
    store_operands(buffers_.states.at(row, column), v);
    if constexpr (kValuesPer<E> > 1)
      if (team_.keeps_states) store<T>(buffers_.values.at(row, column), v);
  }

  // x of a chunk into strips, row by row.
  void read_inputs(int64_t start, int64_t steps) {
    const Storage* const x = static_cast<const Storage*>(r_.input.data);
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t t = team_.schedule.time(start + s);
      for (int64_t i = 0; i < rows(s); ++i)
        read_row(x + team_.schedule.offset(r_.input, t, sample(i)), r_.input_size, buffers_.inputs,
                 input_row_[s] + i);
    }
  }

  // Hidden sizes far below a vector: the vectors go along x instead.
  void dot_inputs(int64_t start, int64_t steps) {
    const int64_t padded = padded_to_vectors<T>(r_.input_size);
    const Storage* const inputs = static_cast<const Storage*>(r_.input.data);
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t t = team_.schedule.time(start + s);
      for (int64_t i = 0; i < rows(s); ++i) {
        const Storage* const x = inputs + team_.schedule.offset(r_.input, t, sample(i));
        T* const to = buffers_.projected + (input_row_[s] + i) * ld_;
        std::copy_n(team_.bias, ld_, to);
        for (int64_t n = 0; n < r_.hidden_size; ++n)
          to[n] += dot(x, team_.input_rows + n * padded, r_.input_size);
      }
    }
  }

  void project_inputs(int64_t chunk_rows) {
    for (int64_t p = share_.first_panel; p < share_.end_panel; ++p) {
      const int64_t column = team_.panels.first_column(p);
      const int vectors = team_.panels.vectors(p);
      for_row_blocks(chunk_rows, vectors, [&](int64_t row, int64_t height) {
        kTiles<E>[vectors - 1][height - 1]({team_.bias + column,
                                            0,
                                            {input_factors(row, column)},
                                            1,
                                            buffers_.projected + row * ld_ + column,
                                            ld_});
      });
    }
  }

  Factors<E> input_factors(int64_t row, int64_t column) const {
    const int64_t depth = operands<E>(r_.input_size);
    return {buffers_.inputs.at(row, 0), buffers_.inputs.stride, team_.packed_input + depth * column,
            depth};
  }

  void advance(const Step& step) {
    for (int64_t p = share_.first_panel; p < share_.end_panel; ++p) {
      if (team_.streams) {
        advance_streamed(step, p);
        continue;
      }
      const int64_t column = team_.panels.first_column(p);
      const int vectors = team_.panels.vectors(p);
      for_row_blocks(step.rows, vectors, [&](int64_t first, int64_t height) {
        advance_tile(step, column, vectors, first, height);
      });
    }
  }

  // Rows [first, first + height) of a step, the columns of one panel.
  void advance_tile(const Step& step, int64_t column, int vectors, int64_t first, int64_t height) {
    const int64_t width = vectors * kLanes<T>;
    alignas(kVectorBytes) T sums[kMaxTileRows * kMaxPanelVectors * kLanes<T>];

    TileArguments<E> arguments;
    arguments.out = sums;
    arguments.out_stride = width;
    arguments.product_count = 0;
    const int64_t input_row = step.input_row + first;
    const bool has_first = step.first_addend.first != nullptr && first + height > step.rows_before;
    if (step.addend.first != nullptr || has_first) {
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
    if (step.has_previous)
      arguments.products[arguments.product_count++] = {
          buffers_.states.at(step.previous_row + first, 0), buffers_.states.stride,
          team_.packed_hidden + operands<E>(r_.hidden_size) * column, operands<E>(r_.hidden_size)};
    prefetch(step, column, width, first, height);
    kTiles<E>[vectors - 1][height - 1](arguments);
    finish(step, column, width, first, height, sums);
  }

  // All rows of a step, one panel.
  void advance_streamed(const Step& step, int64_t p) {
    const int64_t column = team_.panels.first_column(p);
    const int64_t width = team_.panels.vectors(p) * kLanes<T>;
    if (team_.projects_input)
      for (int64_t i = 0; i < step.rows; ++i)
        std::copy_n(buffers_.projected + (step.input_row + i) * ld_ + column, width,
                    buffers_.sums + i * width);
    else
      init_sums(step, column, width, 0, step.rows, buffers_.sums);
    if (r_.input_size > 0 && !team_.projects_input)
      add_streamed_product<Storage>(buffers_.inputs.from_row(step.input_row), step.rows,
                                    r_.weight_input, r_.hidden_size, r_.input_size, team_.panels, p,
                                    buffers_.block, buffers_.sums);
    if (step.has_previous)
      add_streamed_product<Storage>(buffers_.states.from_row(step.previous_row), step.rows,
                                    r_.weight_hidden, r_.hidden_size, r_.hidden_size, team_.panels,
                                    p, buffers_.block, buffers_.sums);
    finish(step, column, width, 0, step.rows, buffers_.sums);
  }

  // The addend, and what a sample gets on its first step.
  void init_sums(const Step& step, int64_t column, int64_t width, int64_t first, int64_t height,
                 T* sums) const {
    for (int64_t i = first; i < first + height; ++i, sums += width) {
      const Storage* const addend = step.addend.row(i, column);
      const Storage* const more =
          i >= step.rows_before ? step.first_addend.row(i, column) : nullptr;
      for (int64_t j = 0; j < width; j += kLanes<T>) {
        const int64_t count = r_.hidden_size - column - j;
        Vec<T> sum = load(team_.bias + column + j);
        if (addend != nullptr) sum += load_converted(addend + j, count);
        if (more != nullptr) sum += load_converted(more + j, count);
        store<T>(sums + j, sum);
      }
    }
  }

  // Asks for what `finish` will touch: while the products are summed, the memory can answer.
  void prefetch(const Step& step, int64_t column, int64_t width, int64_t first,
                int64_t height) const {
    const int64_t bytes = std::min(width, r_.hidden_size - column) * sizeof(Storage);
    for (int64_t i = first; i < first + height; ++i) {
      const char* const out = reinterpret_cast<const char*>(step.output.row(i, column));
      for (int64_t j = 0; out != nullptr && j < bytes; j += 64) __builtin_prefetch(out + j, 1);
      if constexpr (Epilogue::kUsesOperand) {
        const char* const operand = reinterpret_cast<const char*>(step.operand.row(i, column));
        for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(operand + j);
      }
    }
  }

  // The epilogue, and the new states to where they are wanted.
  void finish(const Step& step, int64_t column, int64_t width, int64_t first, int64_t height,
              const T* sums) {
    const int64_t columns = std::min(width, r_.hidden_size - column);
    for (int64_t i = first; i < first + height; ++i, sums += width) {
      Storage* const out = step.output.row(i, column);
      const Storage* const operand = step.operand.row(i, column);
      T* const z = step.z.row(i, column);
      for (int64_t j = 0; j < width; j += kLanes<T>) {
        Vec<T> e{};
        if constexpr (Epilogue::kUsesOperand) e = load_converted(operand + j, columns - j);
        Vec<T> v = load(sums + j);
        if (z != nullptr) store<T>(z + j, v);
        v = Epilogue::apply(v, e);
        if (out != nullptr) v = store_converted(out + j, v, columns - j);
        set_state(step.row + i, column + j, v);
      }
      if (i >= step.rows_after && step.last.first != nullptr)
        std::copy_n(out, columns, step.last.row(i, column));
    }
  }

  const Team<Storage>& team_;
  const Recurrence& r_;
  const Share share_;
  const WalkBuffers<Storage> buffers_;
  const int64_t ld_;
  const int64_t first_column_, end_column_;
  std::vector<int64_t> rows_, slot_row_, input_row_;  // of the chunk
};

}  // namespace rnn_cuda::cpu
