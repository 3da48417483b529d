// One call of a kernel: how it is cut, its scratch memory, and the team that walks through time.
#pragma once

#include <algorithm>
#include <atomic>
#include <iterator>
#include <optional>

#include "scratch.h"
#include "walker.h"

namespace rnn_cuda::cpu {

// Rows of a chunk: enough for efficient products over all of them, few enough to stay in the
// second-level cache beside the weights.
constexpr int64_t kRowsPerChunk = 256;
// x is cheaper as one more factor of each step's tiles where there are fewer inputs than this, or
// where W stays in the second-level cache beside M and a step has rows enough to be worth reading
// it.
constexpr int64_t kProjectedInputSize = 64;
constexpr int64_t kFusedWeightBytes = 192 << 10, kFusedRows = 4;

// Whether W has so few rows for its columns that tiles would use few lanes of a vector: then W x is
// a few dot products, and dL/dW a few sums of multiples of rows of x.
constexpr int64_t kFlatHiddenSize = 4;
inline bool is_flat(int64_t hidden_size, int64_t input_size) {
  return input_size >= kProjectedInputSize && hidden_size <= kFlatHiddenSize;
}

// How a recurrence is cut, and where its pieces lie in the scratch memory of the call.
template <class Storage>
class Call {
 public:
  Call(const Call&) = delete;
  using T = typename ComputeOf<Storage>::type;
  using E = typename OperandOf<Storage>::type;

  // Adds its pieces to `layout`; later pieces are the caller's own. `is_rerun` call of the same,
  // as the first `needs_rerun`.
  Call(const Recurrence& r, const Schedule& schedule, const Division& division, bool keeps_states,
       ScratchLayout& layout, bool is_rerun = false)
      : r_(r),
        counts_(counts_of(r.epilogue)),
        schedule_(schedule),
        division_(division),
        panels_(division.template panels<T>(r)),
        own_input_panels_(own_panels_of_input()),
        input_panels_(own_input_panels_ ? *own_input_panels_ : panels_),
        keeps_states_(keeps_states),
        steps_per_chunk_(std::clamp<int64_t>(kRowsPerChunk / division.rows, 1, r.time_steps)),
        use_of_hidden_(division.template use_of_hidden<Storage>(r)),
        looks_at_sums_(leaves_out_zeros() && use_of_hidden_ == MatrixUse::Streamed &&
                       Division::products(r) > 0 && !is_rerun),
        looks_first_(leaves_out_zeros() && !looks_at_sums_),
        projects_input_(counts_.apart > 0 ||
                        (may_project() && (is_dotted() || (r.time_steps > 1 && r.input_size > 0 &&
                                                           !fuses_input())))),
        use_of_input_(choose_use_of_input()) {
    const int64_t units = padded_to_vectors<T>(r.hidden_size);
    const int64_t padded = panels_.padded_columns(), states = counts_.published * units;
    const int64_t rows = division.rows * steps_per_chunk_;
    const int teams = division.cut_hidden ? 1 : division.threads;  // that have states of their own
    hidden_ = layout.add<E>(
        use_of_hidden_ == MatrixUse::Packed ? padded * operands<E>(published_columns<T>(r)) : 0);
    input_ = layout.add<E>(use_of_input_ == MatrixUse::Packed
                               ? input_panels_.padded_columns() * operands<E>(r.input_size)
                               : 0);
    input_rows_ = layout.add<T>(use_of_input_ == MatrixUse::Dotted
                                    ? r.hidden_size * padded_to_vectors<T>(r.input_size)
                                    : 0);
    bias_ = layout.add<T>(input_panels_.padded_columns());
    state_rows_ = keeps_states ? rows + division.rows : 2 * division.rows;
    states_size_ = Strips<E>::size_for(state_rows_, states);
    states_ = layout.add<E>(states_size_ * teams);
    values_size_ = kHasValues && keeps_states ? Strips<T>::size_for(state_rows_, states) : 0;
    values_ = layout.add<T>(values_size_ * teams);
    carried_size_ = counts_.carried * division.rows * units;
    carried_ = layout.add<T>(carried_size_ * teams);
    inputs_size_ = Strips<E>::size_for(rows, r.input_size);
    inputs_ = layout.add<E>(inputs_size_ * teams);
    projected_size_ = projects_input_ ? rows * input_panels_.padded_columns() : 0;
    projected_ = layout.add<T>(projected_size_ * teams);
    // (A panel is wider than asked for where the sums of one vector of units are.)
    const int64_t panel_vectors = std::max(division.panel_vectors, counts_.sums);
    block_size_ =
        use_of_hidden_ == MatrixUse::StreamedInBlocks ? kBlockDepth * panel_vectors * kLanes<T> : 0;
    blocks_ = layout.add<E>(block_size_ * division.threads);
    sums_size_ = std::max<int64_t>(
        std::max<int64_t>(division.rows, kMaxTileRows) * panel_vectors * kLanes<T>,
        kSumsBytes / static_cast<int64_t>(sizeof(T)));
    sums_ = layout.add<T>(sums_size_ * division.threads);
    const bool wants_norms = std::any_of(std::begin(r.adjoint_norms), std::end(r.adjoint_norms),
                                         [](const double* norms) { return norms != nullptr; });
    adjoints_size_ =
        wants_norms ? adjoint_slots(division) * division.rows * counts_.adjoints * units : 0;
    adjoints_ = layout.add<T>(adjoints_size_ * teams);
  }

  // Where M is read but once or twice, looking at it first would take as long again. It is taken to
  // be finite, and if it is not, its products are not either: then the call must be made again.
  bool needs_rerun() const { return looks_at_sums_ && found_infinite_; }

  int64_t chunk_rows() const { return division_.rows * steps_per_chunk_; }
  // Whether all steps are one chunk, small enough to be worked on at once.
  bool is_single_chunk() const {
    return steps_per_chunk_ == r_.time_steps && chunk_rows() <= kRowsPerChunk;
  }
  MatrixUse use_of_hidden() const { return use_of_hidden_; }
  const Division& division() const { return division_; }
  const Schedule& schedule() const { return schedule_; }
  const Panels<T>& panels() const { return panels_; }
  Share share(int thread) const {
    return division_.share(r_.batch, panels_.count(), schedule_.packed(), thread);
  }

  // Packs this thread's part of what all threads read; to be followed by a wait, and then by `team`
  // where there is no initial state.
  void pack_weights(char* scratch, int thread) const {
    if (looks_first_) {
      const int64_t columns = counts_.sums * r_.hidden_size,
                    depth = counts_.published * r_.hidden_size;
      const bool transposed = r_.weight_hidden.transposed;
      const int64_t rows = transposed ? depth : columns;
      if (!is_finite<Storage>(r_.weight_hidden, transposed ? columns : depth,
                              rows * thread / division_.threads,
                              rows * (thread + 1) / division_.threads))
        found_infinite_.store(true, std::memory_order_relaxed);
    }
    const int width = counts_.sums + counts_.apart;  // columns of a unit in W x
    const int64_t first = panels_.count() * thread / division_.threads;
    const int64_t end = panels_.count() * (thread + 1) / division_.threads;
    if (use_of_hidden_ == MatrixUse::Packed)
      pack<Storage>(r_.weight_hidden, {r_.hidden_size, counts_.sums}, r_.hidden_size, panels_,
                    first, end, at<E>(scratch, hidden_), counts_.published);
    if (use_of_input_ == MatrixUse::Dotted) {
      if (thread == 0) copy_rows_of_weight_input(at<T>(scratch, input_rows_));
    } else if (use_of_input_ == MatrixUse::Packed) {
      pack<Storage>(r_.weight_input, {r_.hidden_size, width, counts_.apart}, r_.input_size,
                    input_panels_, first, end, at<E>(scratch, input_));
    }
    const T* const bias = static_cast<const T*>(r_.bias);
    for (int64_t n = input_panels_.first_column(first); n < input_panels_.first_column(end);
         n += kLanes<T>) {
      const int64_t vector = n / kLanes<T>, unit = vector / width * kLanes<T>;
      store<T>(at<T>(scratch, bias_) + n,
               bias == nullptr ? Vec<T>{}
                               : load_converted(bias + vector % width * r_.hidden_size + unit,
                                                r_.hidden_size - unit));
    }
  }

  Team<Storage> team(char* scratch, SpinBarrier& barrier) const {
    return {r_,
            counts_,
            schedule_,
            division_,
            panels_,
            input_panels_,
            steps_per_chunk_,
            keeps_states_,
            use_of_hidden_,
            use_of_input_,
            projects_input_,
            r_.initial != nullptr || (looks_first_ && found_infinite_),
            looks_at_sums_ ? &found_infinite_ : nullptr,
            at<E>(scratch, hidden_),
            at<E>(scratch, input_),
            at<T>(scratch, input_rows_),
            at<T>(scratch, bias_),
            barrier};
  }

  WalkBuffers<Storage> buffers(char* scratch, int thread) const {
    const int team = division_.cut_hidden ? 0 : thread;
    const Strips<E> states = {at<E>(scratch, states_) + states_size_ * team,
                              Strips<E>::stride_for(state_rows_)};
    Strips<T> values;
    if constexpr (kHasValues)
      values = {at<T>(scratch, values_) + values_size_ * team, Strips<T>::stride_for(state_rows_)};
    else
      values = states;
    return {states,
            values,
            {at<E>(scratch, inputs_) + inputs_size_ * team, Strips<E>::stride_for(chunk_rows())},
            at<T>(scratch, carried_) + carried_size_ * team,
            at<T>(scratch, projected_) + projected_size_ * team,
            at<T>(scratch, sums_) + sums_size_ * thread,
            at<E>(scratch, blocks_) + block_size_ * thread,
            adjoints_size_ == 0 ? nullptr : at<T>(scratch, adjoints_) + adjoints_size_ * team};
  }

 private:
  // Operands are not the values themselves.
  static constexpr bool kHasValues = kValuesPer<E> > 1;

  // Products of M with the zeros of no initial state, which are zeros if M is finite.
  bool leaves_out_zeros() const { return r_.initial == nullptr && r_.multiplies_zero_initial; }

  bool is_dotted() const { return counts_.sums == 1 && is_flat(r_.hidden_size, r_.input_size); }

  // Each unit's columns of W x + b: those of M, and behind them what stays apart.
  std::optional<Panels<T>> own_panels_of_input() const {
    if (counts_.apart == 0) return std::nullopt;
    return Panels<T>(r_.hidden_size, 1, division_.cut_hidden ? division_.threads : 1,
                     counts_.sums + counts_.apart);
  }

  bool fuses_input() const {
    if (use_of_hidden_ != MatrixUse::Packed) return false;
    if (r_.input_size < kProjectedInputSize) return true;
    const int64_t bytes = counts_.sums * r_.hidden_size *
                          (counts_.published * r_.hidden_size + r_.input_size) *
                          static_cast<int64_t>(sizeof(Storage));
    return division_.rows >= kFusedRows && bytes <= kFusedWeightBytes;
  }

  // The projection begins with the bias, and knows no addend.
  bool may_project() const { return r_.addend.data == nullptr && r_.first_addend == nullptr; }

  void copy_rows_of_weight_input(T* to) const {
    const Storage* const from = static_cast<const Storage*>(r_.weight_input.data);
    const int64_t padded = padded_to_vectors<T>(r_.input_size), stride = r_.weight_input.stride;
    std::fill_n(to, r_.hidden_size * padded, T(0));
    for (int64_t n = 0; n < r_.hidden_size; ++n)
      for (int64_t k = 0; k < r_.input_size; ++k)
        to[n * padded + k] = static_cast<T>(r_.weight_input.transposed ? from[k * stride + n]
                                                                       : from[n * stride + k]);
  }

  // As M, but that a whole chunk's rows are worth the packing.
  MatrixUse choose_use_of_input() const {
    if (projects_input_ && is_dotted()) return MatrixUse::Dotted;
    if (projects_input_ && use_of_hidden_ == MatrixUse::StreamedInBlocks) return MatrixUse::Packed;
    return use_of_hidden_;
  }

  template <class Value>
  static Value* at(char* scratch, int64_t offset) {
    return reinterpret_cast<Value*>(scratch + offset);
  }

  const Recurrence& r_;
  const Counts counts_;
  const Schedule& schedule_;
  const Division division_;
  const Panels<T> panels_;
  const std::optional<Panels<T>> own_input_panels_;  // where they differ
  const Panels<T>& input_panels_;
  const bool keeps_states_;
  const int64_t steps_per_chunk_;
  const MatrixUse use_of_hidden_;
  // For an Inf or a NaN, if `leaves_out_zeros`: at the sums of the products with M, or at M first.
  const bool looks_at_sums_, looks_first_;
  const bool projects_input_;
  const MatrixUse use_of_input_;
  mutable std::atomic<bool> found_infinite_{false};  // an Inf or a NaN, in M or in its products
  int64_t hidden_, input_, input_rows_, bias_;
  int64_t states_, values_, carried_, inputs_, projected_, blocks_, sums_, adjoints_;
  int64_t state_rows_, states_size_, values_size_, carried_size_, inputs_size_, projected_size_,
      block_size_, sums_size_, adjoints_size_;
};

}  // namespace rnn_cuda::cpu
