// The loop over time, for one thread's share of a recurrence.
//
// A walk goes through time in chunks of steps. Slot 0 is the state before the chunk, slot s + 1
// that of its step s. What does not depend on a previous state (the input product, where it pays)
// is done for a chunk at once; then each step is one pass of register tiles: init, products,
// epilogue, results out.
#pragma once

#include <algorithm>
#include <atomic>
#include <iterator>
#include <vector>

#include "../cells/cells.h"
#include "arithmetic.h"
#include "product.h"
#include "row_norm.h"
#include "schedule.h"
#include "streamed.h"
#include "team.h"

namespace rnn_cuda::cpu {

// What all threads of a call share.
template <class Storage>
struct Team {
  using T = typename ComputeOf<Storage>::type;
  using E = typename OperandOf<Storage>::type;

  const Recurrence& recurrence;
  Counts counts;
  const Schedule& schedule;
  const Division& division;
  const Panels<T>& panels;        // of the sums
  const Panels<T>& input_panels;  // of W x + b: the same, but for what stays apart
  int64_t steps_per_chunk;
  // A chunk's slots lie one behind the other until it ends; else two slots take turns.
  bool keeps_states;
  MatrixUse use_of_hidden;            // M
  MatrixUse use_of_input;             // W
  bool projects_input;                // for a chunk at once; else x is one more factor of each step
  bool multiplies_initial;            // or else the first step has no previous state
  std::atomic<bool>* found_infinite;  // to be set if products with M are not finite; or null
  const E* packed_hidden;             // M
  const E* packed_input;              // W
  const T* input_rows;                // for dot products: W's rows, padded to whole vectors
  const T* bias;                      // of all padded columns, zeros where there is none
  SpinBarrier& barrier;

  // Between steps: where the batch is cut, nobody waits.
  void wait_for_state() const { barrier.wait(division.cut_hidden ? division.threads : 1); }
};

// The memory of a walk. Where the hidden dimension is cut, `states`, `inputs` and `projected` are
// the team's.
template <class Storage>
struct WalkBuffers {
  using T = typename ComputeOf<Storage>::type;
  using E = typename OperandOf<Storage>::type;

  Strips<E> states;        // steps_per_chunk + 1 slots, or two
  Strips<T> values;        // the same in compute type, if states are kept
  Strips<E> inputs;        // x of a chunk
  T* carried = nullptr;    // by value, row and unit
  T* projected = nullptr;  // bias + W x of a chunk, rows of padded columns
  T* sums = nullptr;       // of a panel of all rows, or kSumsBytes
  E* block = nullptr;      // of a panel, where matrices are streamed in blocks
  // Of the last step, or the last two where threads read what others wrote: by row, value and unit.
  // Null if no norms are wanted.
  T* adjoints = nullptr;
};

// How many steps these buffers hold.
inline int64_t adjoint_slots(const Division& division) { return division.cut_hidden ? 2 : 1; }

template <class Walker>
class UnpackedSteps;

// With kOneDelta of epilogues for which `has_one_delta` holds: then no others are compiled.
template <class Storage_, bool kOneDelta = false>
class Walker {
 public:
  using Storage = Storage_;
  using T = typename ComputeOf<Storage>::type;
  using E = typename OperandOf<Storage>::type;

  Walker(const Team<Storage>& team, const Share& share, const WalkBuffers<Storage>& buffers)
      : team_(team),
        r_(team.recurrence),
        share_(share),
        buffers_(buffers),
        sums_(team.counts.sums),
        published_(team.counts.published),
        padded_units_(padded_to_vectors<T>(r_.hidden_size)),
        depth_(operands<E>(published_columns<T>(r_))),
        input_ld_(team.input_panels.padded_columns()),
        first_column_(team.panels.first_column(share.first_panel)),
        end_column_(team.panels.first_column(share.end_panel)),
        first_unit_(first_column_ / sums_),
        end_unit_(end_column_ / sums_),
        finish_(with_epilogue(r_.epilogue,
                              [](auto epilogue) -> Finish {
                                using Type = decltype(epilogue);
                                if constexpr (kOneDelta && !has_one_delta(Type::kCounts))
                                  return nullptr;
                                else
                                  return &Walker::finish<Type>;
                              })),
        keeps_adjoints_(std::any_of(std::begin(r_.adjoints), std::end(r_.adjoints),
                                    [](const void* adjoint) { return adjoint != nullptr; }) ||
                        buffers.adjoints != nullptr),
        streams_output_(kStages && r_.output_stride % r_.hidden_size == 0 &&
                        is_better_streamed(static_cast<const Storage*>(r_.output),
                                           team.schedule.total_rows(), r_.hidden_size)),
        slot_row_(team.steps_per_chunk + 2) {}

  // Walks the whole sequence; calls after_chunk(first step, steps).
  template <class AfterChunk>
  void run(const AfterChunk& after_chunk) {
    for (int64_t start = 0; start < r_.time_steps; start += team_.steps_per_chunk) {
      const int64_t steps = std::min(team_.steps_per_chunk, r_.time_steps - start);
      // Nobody reads a slot or an input any more: the last step ended in a wait. But the first step
      // will read columns of slot 0, and rows of inputs, that other threads prepare.
      begin_chunk(start, steps);
      team_.wait_for_state();
      if (team_.projects_input) project_inputs(start, steps);
      for (int64_t s = 0; s < steps; ++s) {
        const Step step = this->step(start, s);
        advance(step);
        if constexpr (kStages) write_output(step);
        write_last(step);
        team_.wait_for_state();
        if (buffers_.adjoints != nullptr) write_norms(step);
      }
      after_chunk(start, steps);
    }
    if (streams_output_) finish_streaming();
  }

  // Rows that the share has at step s of the chunk; of s = -1 and the number of steps, of the steps
  // around it, none outside the sequence.
  int64_t rows(int64_t s) const { return rows_[s + 1]; }
  int64_t sample(int64_t row) const { return share_.first_sample + row * share_.sample_step; }
  const WalkBuffers<Storage>& buffers() const { return buffers_; }
  // First row of a slot in `states`; of the slot after the last, the end (if states are kept).
  int64_t slot_row(int64_t slot) const { return slot_row_[slot]; }
  // What the share's i-th sample carries, of all units.
  T* carried(int64_t value, int64_t i) const {
    return buffers_.carried + (value * team_.division.rows + i) * padded_units_;
  }

 private:
  friend class UnpackedSteps<Walker>;

  static constexpr bool kStages = std::is_same_v<Storage, E>;

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
    int64_t multiplied_rows;                  // the first so many have a state to be multiplied
    bool is_odd;                              // the number of steps before it
    StepRows<const Storage> addend, operand;  // of all rows
    StepRows<const Storage> next_addend, next_operand;  // of rows_after rows, one step later
    StepRows<const Storage> first_addend;               // of rows rows_before and up
    StepRows<Storage> output, saved;                    // of all rows
    StepRows<Storage> last;                             // of rows rows_after and up
    StepRows<T> adjoints;                               // of all rows
    int64_t sequence_row;                               // of the first row
  };

  Step step(int64_t start, int64_t s) const {
    const int64_t t = team_.schedule.time(start + s);
    const auto input_rows = [&](const Rows& rows, int64_t time) -> StepRows<const Storage> {
      if (rows.data == nullptr || time < 0 || time >= r_.time_steps) return {};
      return {static_cast<const Storage*>(rows.data) +
                  team_.schedule.offset(rows, time, share_.first_sample),
              rows.batch_stride * share_.sample_step};
    };
    const int64_t next = team_.schedule.time(start + s + 1);
    const int64_t row = team_.schedule.row(t, share_.first_sample);
    // Of evenly spaced rows, those from a row on.
    const auto rows_from = [&](auto* data, int64_t row,
                               int64_t stride) -> StepRows<std::remove_pointer_t<decltype(data)>> {
      if (data == nullptr) return {};
      return {data + row * stride, stride * share_.sample_step};
    };
    return {
        rows(s),
        rows(s - 1),
        rows(s + 1),
        slot_row_[s],
        slot_row_[s + 1],
        input_row_[s],
        team_.multiplies_initial ? rows(s) : std::min(rows(s - 1), rows(s)),
        (start + s) % 2 != 0,
        input_rows(r_.addend, t),
        input_rows(r_.operand, t),
        input_rows(r_.addend, next),
        input_rows(r_.operand, next),
        rows_from(static_cast<const Storage*>(r_.first_addend), share_.first_sample,
                  sums_ * r_.hidden_size),
        rows_from(static_cast<Storage*>(r_.output), row, r_.output_stride),
        rows_from(static_cast<Storage*>(r_.saved), row, team_.counts.saved * r_.hidden_size),
        rows_from(static_cast<Storage*>(r_.last), share_.first_sample, published_ * r_.hidden_size),
        {buffers_.adjoints == nullptr ? nullptr : adjoints(start + s),
         team_.counts.adjoints * padded_units_},
        row};
  }

  void begin_chunk(int64_t start, int64_t steps) {
    rows_.resize(steps + 2);
    for (int64_t s = -1; s <= steps; ++s)
      rows_[s + 1] = share_.rows(team_.schedule.samples(start + s));
    place_slots(start, steps);
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t i = rows(s - 1); i < rows(s); ++i) read_initial(i, slot_row_[s] + i);
    if (r_.input_size > 0 && team_.use_of_input != MatrixUse::Dotted) read_inputs(start, steps);
  }

  // A slot holds the states of a step, and behind them the initial states of the samples that enter
  // at the next step (packed, in reverse): both are "previous states" there.
  void place_slots(int64_t start, int64_t steps) {
    input_row_.assign(1, 0);
    for (int64_t s = 0; s < steps; ++s) input_row_.push_back(input_row_[s] + rows(s));
    if (!team_.keeps_states) {
      for (int64_t s = 0; s <= steps; ++s) slot_row_[s] = (start + s) % 2 * team_.division.rows;
      return;
    }
    const int64_t last_slot = slot_row_[team_.steps_per_chunk];
    if (start > 0)
      for_own_states([&](int64_t, int64_t, int64_t column) {
        for (int64_t i = 0; i < rows(-1); ++i)
          std::copy_n(buffers_.states.at(last_slot + i, column), kLanes<T> / kValuesPer<E>,
                      buffers_.states.at(i, column));
      });
    slot_row_[0] = 0;
    for (int64_t s = 0; s <= steps; ++s)
      slot_row_[s + 1] = slot_row_[s] + std::max(rows(s - 1), rows(s));
  }

  // Calls f(value, unit, column in strips) for the vectors of published values of this thread's
  // units.
  template <class F>
  void for_own_states(const F& f) const {
    for (int64_t p = 0; p < published_; ++p)
      for (int64_t n = first_unit_; n < end_unit_; n += kLanes<T>) f(p, n, p * padded_units_ + n);
  }

  // The states before the first step of the share's i-th sample, and what it carries.
  void read_initial(int64_t i, int64_t row) {
    const int64_t H = r_.hidden_size, b = sample(i);
    const auto vector = [&](const void* states, int64_t first, int64_t unit) {
      return states == nullptr
                 ? Vec<T>{}
                 : load_converted(static_cast<const Storage*>(states) + first + unit, H - unit);
    };
    for_own_states([&](int64_t p, int64_t n, int64_t column) {
      set_state(row, column, vector(r_.initial, (b * published_ + p) * H, n));
    });
    for (int64_t c = 0; c < team_.counts.carried; ++c)
      for (int64_t n = first_unit_; n < end_unit_; n += kLanes<T>)
        store<T>(carried(c, i) + n, vector(r_.initial_carried, (c * r_.batch + b) * H, n));
  }

  // Those of the step-th visited step.
  T* adjoints(int64_t step) const {
    return buffers_.adjoints + step % adjoint_slots(team_.division) * team_.division.rows *
                                   team_.counts.adjoints * padded_units_;
  }

  // Where all threads have all rows, each writes the norms of a part of them.
  void write_norms(const Step& step) const {
    const int64_t first = step.rows * share_.part / share_.parts;
    const int64_t end = step.rows * (share_.part + 1) / share_.parts;
    for (int a = 0; a < team_.counts.adjoints; ++a) {
      if (r_.adjoint_norms[a] == nullptr) continue;
      for (int64_t i = first; i < end; ++i)
        r_.adjoint_norms[a][step.sequence_row + i * share_.sample_step] =
            row_norm(step.adjoints.row(i, a * padded_units_), r_.hidden_size);
    }
  }

  void set_state(int64_t row, int64_t column, Vec<T> v) const {
    store_operands(buffers_.states.at(row, column), v);
    if constexpr (kValuesPer<E> > 1)
      if (team_.keeps_states) store<T>(buffers_.values.at(row, column), v);
  }

  // x of a chunk into strips: the rows that are this thread's to read.
  void read_inputs(int64_t start, int64_t steps) {
    const Storage* const x = static_cast<const Storage*>(r_.input.data);
    input_rows_.clear();
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t t = team_.schedule.time(start + s);
      for (int64_t i = 0; i < rows(s); ++i)
        input_rows_.push_back(x + team_.schedule.offset(r_.input, t, sample(i)));
    }
    const int64_t count = input_row_[steps];
    const int64_t first = count * share_.part / share_.parts;
    const int64_t end = count * (share_.part + 1) / share_.parts;
    read_rows<Storage>(end - first, r_.input_size, buffers_.inputs.from_row(first),
                       [&](int64_t i) { return input_rows_[first + i]; });
  }

  void project_inputs(int64_t start, int64_t steps) {
    if (team_.use_of_input != MatrixUse::Packed)
      return UnpackedSteps<Walker>(*this).project_inputs(start, steps);
    const int64_t chunk_rows = input_row_[steps];
    for (int64_t p = share_.first_panel; p < share_.end_panel; ++p) {
      const int64_t column = team_.input_panels.first_column(p);
      const int vectors = team_.input_panels.vectors(p);
      const Factors<E> input = input_factors(0, column);
      multiply_panel(buffers_.inputs, chunk_rows, input.panel, vectors, input.depth,
                     team_.bias + column, 0, buffers_.projected + column, input_ld_);
      if (team_.counts.apart > 0) forget_products_of_zero(chunk_rows, column, vectors);
    }
  }

  // Sums that get nothing of W x met zeros in the panel, which an infinite x turns into NaN.
  void forget_products_of_zero(int64_t chunk_rows, int64_t column, int vectors) {
    const int apart = team_.counts.apart;
    const Gates gates = {r_.hidden_size, team_.counts.sums + apart, apart};
    for (int v = 0; v < vectors; ++v) {
      if (gates.value(v) >= 0) continue;
      const int64_t first = column + v * kLanes<T>;
      const Vec<T> bias = load(team_.bias + first);
      for (int64_t row = 0; row < chunk_rows; ++row)
        store<T>(buffers_.projected + row * input_ld_ + first, bias);
    }
  }

  Factors<E> input_factors(int64_t row, int64_t column) const {
    const int64_t depth = operands<E>(r_.input_size);
    return {buffers_.inputs.at(row, 0), buffers_.inputs.stride, team_.packed_input + depth * column,
            depth};
  }

  // A part of a step: rows [first, first + height), and columns.
  struct Region {
    int64_t column, width, first, height;
  };

  using Finish = void (Walker::*)(const Step&, const Region&, const T* sums) const;

  // One of the columns of one panel.
  struct Tile : Region {
    TileFunction<E> add_products;
  };

  // The share's tiles, panel by panel, of steps that have so many rows, the first of which are to
  // be multiplied. None has both kinds: what has no previous state must not meet an Inf in M.
  void cut_into_tiles(int64_t rows, int64_t multiplied_rows) {
    if (rows == tiled_rows_ && multiplied_rows == tiled_multiplied_rows_) return;
    tiled_rows_ = rows;
    tiled_multiplied_rows_ = multiplied_rows;
    tiles_.clear();
    panel_tiles_.clear();
    for (int64_t p = share_.first_panel; p < share_.end_panel; ++p) {
      const int vectors = team_.panels.vectors(p);
      panel_tiles_.push_back(tiles_.size());
      const auto cut = [&](int64_t begin, int64_t end) {
        for_row_blocks(end - begin, vectors, [&](int64_t first, int64_t height) {
          tiles_.push_back(
              {{team_.panels.first_column(p), vectors * kLanes<T>, begin + first, height},
               kTiles<E>[vectors - 1][height - 1]});
        });
      };
      cut(0, multiplied_rows);
      cut(multiplied_rows, rows);
    }
    panel_tiles_.push_back(tiles_.size());
  }

  void advance(const Step& step) {
    if (step.rows == 0) return;
    if (team_.use_of_hidden != MatrixUse::Packed) return UnpackedSteps<Walker>(*this).advance(step);
    cut_into_tiles(step.rows, step.multiplied_rows);
    // There and back again: what was used last is still in the caches.
    const int64_t panels = static_cast<int64_t>(panel_tiles_.size()) - 1;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t panel = step.is_odd ? panels - 1 - p : p;
      advance_panel(step, tiles_.data() + panel_tiles_[panel],
                    tiles_.data() + panel_tiles_[panel + 1]);
    }
  }

  void advance_panel(const Step& step, const Tile* begin, const Tile* end) {
    const int64_t block = panel_block_depth<E>(depth_, begin->width);
    if (step.multiplied_rows > 0 && block < depth_ && end - begin > 1)
      return advance_tiles(step, begin, end, block);
    const int64_t rows = kSumsBytes / (begin->width * static_cast<int64_t>(sizeof(T)));
    while (begin < end) {
      const Tile* const first = begin++;
      while (begin < end && begin->first + begin->height - first->first <= rows) ++begin;
      advance_tiles(step, first, begin, depth_);
    }
  }

  // Tiles of one panel, which are finished together. A panel that is larger than the first-level
  // cache goes through them in blocks of its rows, each of which stays there until all tiles are
  // done with it.
  void advance_tiles(const Step& step, const Tile* begin, const Tile* end, int64_t block) {
    const int64_t depth = step.multiplied_rows > 0 ? depth_ : 0;
    const E* const panel = team_.packed_hidden + depth_ * begin->column;
    int64_t k = 0;
    do {
      const Factors<E> factors = {buffers_.states.data + step.previous_row * kLanes<E> +
                                      k / kLanes<E> * buffers_.states.stride,
                                  buffers_.states.stride, panel + k * begin->width,
                                  std::min(block, depth - k)};
      for (const Tile* tile = begin; tile < end; ++tile) {
        const bool is_multiplied = tile->first < step.multiplied_rows;
        if (k > 0 && !is_multiplied) break;
        T* const sums = buffers_.sums + (tile->first - begin->first) * tile->width;
        TileArguments<E> arguments = {sums, tile->width, {}, 0, sums, tile->width};
        if (k == 0) {
          begin_tile(step, *tile, arguments);
          prefetch(step, *tile);
        }
        Factors<E>& product = arguments.products[arguments.product_count++];
        product = factors;
        product.rows += tile->first * kLanes<E>;
        if (!is_multiplied) product.depth = 0;
        tile->add_products(arguments);
      }
      k += block;
    } while (k < depth);
    (this->*finish_)(
        step,
        {begin->column, begin->width, begin->first, end[-1].first + end[-1].height - begin->first},
        buffers_.sums);
  }

  // What the sums of a tile begin with, and the product of the input unless it is in there.
  void begin_tile(const Step& step, const Tile& tile, TileArguments<E>& arguments) const {
    const int64_t input_row = step.input_row + tile.first;
    const bool has_first =
        step.first_addend.first != nullptr && tile.first + tile.height > step.rows_before;
    if (has_first || step.addend.first != nullptr) {
      if constexpr (std::is_same_v<Storage, T>)
        if (!has_first && r_.bias == nullptr && sums_ == 1 &&
            tile.column + tile.width <= r_.hidden_size) {
          arguments.init = step.addend.row(tile.first, tile.column);
          arguments.init_stride = step.addend.stride;
        }
      if (arguments.init == arguments.out)
        init_sums(step, tile.column, tile.width, tile.first, tile.height, arguments.out);
    } else if (team_.projects_input) {
      arguments.init = projected(input_row, tile.column);
      arguments.init_stride = input_ld_;
    } else {
      arguments.init = team_.bias + tile.column;
      arguments.init_stride = 0;
    }
    if (r_.input_size > 0 && !team_.projects_input)
      arguments.products[arguments.product_count++] = input_factors(input_row, tile.column);
  }

  // W x + b of a row of the chunk, from a column of the sums on.
  const T* projected(int64_t row, int64_t column) const {
    return buffers_.projected + row * input_ld_ + column / sums_ * (sums_ + team_.counts.apart);
  }

  // The states of a step from their strips to the output, row by row.
  void write_output(const Step& step) const {
    if (step.output.first == nullptr) return;
    const int64_t end = std::min(end_unit_, r_.hidden_size), stride = buffers_.states.stride;
    for (int64_t i = 0; i < step.rows; ++i)
      for (int64_t p = 0; p < published_; ++p) {
        Storage* const out = step.output.row(i, p * r_.hidden_size);
        const E* state = buffers_.states.at(step.row + i, p * padded_units_ + first_unit_);
        int64_t n = first_unit_;
        if (streams_output_)
          for (; n < end; n += kLanes<T>, state += stride) store_streaming<T>(out + n, load(state));
        for (; n + kLanes<T> <= end; n += kLanes<T>, state += stride)
          store<T>(out + n, load(state));
        if (n < end) store_first(out + n, load(state), end - n);
      }
  }

  // The states of the samples that end with a step, from its output, and what they carry.
  void write_last(const Step& step) const {
    const int64_t H = r_.hidden_size, units = std::min(end_unit_, H) - first_unit_;
    for (int64_t i = step.rows_after; i < step.rows; ++i) {
      for (int64_t p = 0; p < published_ && step.last.first != nullptr; ++p)
        std::copy_n(step.output.row(i, p * H + first_unit_), units,
                    step.last.row(i, p * H + first_unit_));
      for (int64_t c = 0; c < team_.counts.carried && r_.last_carried != nullptr; ++c) {
        Storage* const to = static_cast<Storage*>(r_.last_carried) + (c * r_.batch + sample(i)) * H;
        for (int64_t n = first_unit_; n < first_unit_ + units; n += kLanes<T>)
          store_converted(to + n, load(carried(c, i) + n), first_unit_ + units - n);
      }
    }
  }

  // The addend, and what a sample gets on its first step.
  void init_sums(const Step& step, int64_t column, int64_t width, int64_t first, int64_t height,
                 T* sums) const {
    for (int64_t i = first; i < first + height; ++i, sums += width) {
      const Storage* const addend = step.addend.row(i, 0);
      const Storage* const more = i >= step.rows_before ? step.first_addend.row(i, 0) : nullptr;
      for (int64_t j = 0; j < width; j += kLanes<T>) {
        const auto [feature, count] = features(column + j);
        Vec<T> sum = load(team_.bias + column + j);
        if (addend != nullptr) {
          // Without a bias the addend itself, as in tiles that begin with it: 0 + -0 would be 0.
          const Vec<T> a = load_converted(addend + feature, count);
          sum = r_.bias == nullptr ? a : sum + a;
        }
        if (more != nullptr) sum += load_converted(more + feature, count);
        store<T>(sums + j, sum);
      }
    }
  }

  // Where the features of a vector of columns begin in a row of a tensor, and how many there are.
  struct Features {
    int64_t first, count;
  };
  Features features(int64_t column) const {
    if (sums_ == 1) return {column, r_.hidden_size - column};
    const int64_t vector = column / kLanes<T>, unit = vector / sums_ * kLanes<T>;
    return {vector % sums_ * r_.hidden_size + unit, r_.hidden_size - unit};
  }

  // Asks for what `finish` will write, and for what the same tile of the next step will read: while
  // the products are summed, the memory can answer.
  void prefetch(const Step& step, const Tile& tile) const {
    const int64_t unit = tile.column / sums_, units = tile.width / sums_;
    const int64_t bytes =
        std::min(units, r_.hidden_size - unit) * static_cast<int64_t>(sizeof(Storage));
    const auto ask = [&](const auto& rows, int64_t count, int values, bool is_written) {
      if (rows.first == nullptr) return;
      for (int64_t i = tile.first; i < std::min(tile.first + tile.height, count); ++i)
        for (int value = 0; value < values; ++value) {
          const char* const row =
              reinterpret_cast<const char*>(rows.row(i, value * r_.hidden_size + unit));
          for (int64_t j = 0; j < bytes; j += kCacheLineBytes)
            is_written ? prefetch_to_write(row + j) : prefetch_to_read(row + j);
        }
    };
    if (!streams_output_) ask(step.output, step.rows, published_, true);
    ask(step.saved, step.rows, team_.counts.saved, true);
    ask(step.next_addend, step.rows_after, sums_, false);
    ask(step.next_operand, step.rows_after, team_.counts.operands, false);
  }

  // The epilogue, and the new states to where they are wanted.
  template <class Epilogue>
  void finish(const Step& step, const Region& region, const T* sums) const {
    constexpr int64_t kWidth = Epilogue::kCounts.sums * kLanes<T>;
    const int64_t end = r_.hidden_size - region.column / Epilogue::kCounts.sums;
    for (int64_t j = 0, unit = 0; j < region.width; j += kWidth, unit += kLanes<T>) {
      if (end - unit >= kLanes<T>)
        finish_units<Epilogue>(step, region, j, kLanes<T>, sums);
      else
        finish_units<Epilogue>(step, region, j, end - unit, sums);
    }
  }

  // A vector of units, whose sums begin at `column` of the region, and of which `count` exist.
  template <class Epilogue>
  inline __attribute__((always_inline)) void finish_units(const Step& step, const Region& region,
                                                          int64_t column, int64_t count,
                                                          const T* sums) const {
    constexpr Counts kCounts = Epilogue::kCounts;
    const int64_t n = (region.column + column) / kCounts.sums;
    // Copies: every store could change what lies behind a reference, for all the compiler knows.
    const int64_t height = region.height, width = region.width, H = r_.hidden_size;
    const int64_t operand_stride = step.operand.stride, out_stride = step.output.stride;
    const int64_t saved_stride = step.saved.stride, padded = padded_units_;
    const Storage* operand = step.operand.row(region.first, n);
    Storage* out = step.output.row(region.first, n);
    Storage* saved = step.saved.row(region.first, n);
    E* states[kCounts.published];
    T* values[kCounts.published] = {};
    for (int p = 0; p < kCounts.published; ++p) {
      states[p] = buffers_.states.at(step.row + region.first, p * padded + n);
      if constexpr (kValuesPer<E> > 1)
        if (team_.keeps_states)
          values[p] = buffers_.values.at(step.row + region.first, p * padded + n);
    }
    const T* apart = nullptr;
    if constexpr (kCounts.apart > 0)
      apart = projected(step.input_row + region.first, region.column + column) +
              kCounts.sums * kLanes<T>;
    Unit<Vec<T>, Epilogue> unit;
    unit.functions = r_.functions;
    for (int k = 0; k < kCounts.constants; ++k)
      unit.constants[k] = load_converted(static_cast<const T*>(r_.constants) + k * H + n, count);
    for (int64_t i = 0; i < height; ++i) {
      for (int s = 0; s < kCounts.sums; ++s)
        unit.sums[s] = load(sums + i * width + column + s * kLanes<T>);
      for (int a = 0; a < kCounts.apart; ++a)
        unit.apart[a] = load(apart + i * input_ld_ + a * kLanes<T>);
      for (int e = 0; e < kCounts.operands; ++e)
        unit.operands[e] = load_converted(operand + i * operand_stride + e * H, count);
      for (int c = 0; c < kCounts.carried; ++c)
        unit.carried[c] = load(carried(c, region.first + i) + n);
      Epilogue::template apply<Math<T>>(unit);
      for (int p = 0; p < kCounts.published; ++p) {
        Vec<T> v = unit.published[p];
        if (!kStages && out != nullptr) v = store_converted(out + i * out_stride + p * H, v, count);
        // What stands beside a value in a pair, or between two published values, meets zeros of M.
        if constexpr (kValuesPer<E> > 1 || kCounts.published > 1)
          for (int64_t lane = count; lane < kLanes<T>; ++lane) v[lane] = 0;
        store_operands(states[p] + i * kLanes<E>, v);
        if constexpr (kValuesPer<E> > 1)
          if (values[p] != nullptr) store<T>(values[p] + i * kLanes<T>, v);
      }
      for (int c = 0; c < kCounts.carried; ++c)
        store<T>(carried(c, region.first + i) + n, unit.carried[c]);
      for (int k = 0; k < kCounts.saved; ++k)
        if (saved != nullptr)
          store_converted(saved + i * saved_stride + k * H, unit.saved[k], count);
      if constexpr (kCounts.adjoints > 0)
        if (keeps_adjoints_) keep_adjoints(step, region.first + i, n, count, unit.adjoints);
    }
  }

  // Where their norms are taken, and where the caller wants them.
  template <int kOneMore>
  inline __attribute__((always_inline)) void keep_adjoints(
      const Step& step, int64_t row, int64_t n, int64_t count,
      const Vec<T> (&adjoints)[kOneMore]) const {
    const int64_t first = (step.sequence_row + row * share_.sample_step) * r_.hidden_size + n;
    for (int a = 0; a < kOneMore - 1; ++a) {
      if (step.adjoints.first != nullptr)
        store<T>(step.adjoints.row(row, a * padded_units_ + n), adjoints[a]);
      if (r_.adjoints[a] != nullptr)
        store_converted(static_cast<T*>(r_.adjoints[a]) + first, adjoints[a], count);
    }
  }

  const Team<Storage>& team_;
  const Recurrence& r_;
  const Share share_;
  const WalkBuffers<Storage> buffers_;
  const int64_t sums_, published_;  // of a unit
  const int64_t padded_units_;
  const int64_t depth_;     // of the packed M
  const int64_t input_ld_;  // columns of W x + b
  const int64_t first_column_, end_column_, first_unit_, end_unit_;
  const Finish finish_;  // of the recurrence's epilogue
  const bool keeps_adjoints_;
  const bool streams_output_;
  std::vector<int64_t> rows_, slot_row_, input_row_;  // of the chunk
  std::vector<const Storage*> input_rows_;            // x of each of its rows
  std::vector<Tile> tiles_;                           // of a step of tiled_rows_ rows
  std::vector<size_t> panel_tiles_;                   // where a panel's begin, and the end
  int64_t tiled_rows_ = -1, tiled_multiplied_rows_ = -1;
};

}  // namespace rnn_cuda::cpu

#include "unpacked_steps.h"
