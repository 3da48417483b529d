// When each sample has a step, where its rows lie, and which thread does what.
#pragma once

#include <algorithm>
#include <vector>

#include "streamed.h"

namespace rnn_cuda::cpu {

class Schedule {
 public:
  explicit Schedule(const Recurrence& r) : r_(r) {
    if (r.batch_sizes == nullptr) return;
    first_row_.reserve(r.time_steps);
    int64_t row = 0;
    for (int64_t t = 0; t < r.time_steps; ++t) {
      first_row_.push_back(row);
      row += r.batch_sizes[t];
    }
    total_rows_ = row;
  }

  bool packed() const { return r_.batch_sizes != nullptr; }
  int64_t total_rows() const { return packed() ? total_rows_ : r_.time_steps * r_.batch; }
  int64_t time(int64_t step) const { return r_.reverse ? r_.time_steps - 1 - step : step; }
  // Samples that have time step t; none outside the sequence.
  int64_t samples_at(int64_t t) const {
    if (t < 0 || t >= r_.time_steps) return 0;
    return packed() ? r_.batch_sizes[t] : r_.batch;
  }
  // Samples that have the step-th visited time step.
  int64_t samples(int64_t step) const { return samples_at(time(step)); }
  // Where sample b's features at time t begin in `rows`.
  int64_t offset(const Rows& rows, int64_t t, int64_t b) const {
    return packed() ? (first_row_[t] + b) * rows.batch_stride
                    : t * rows.time_stride + b * rows.batch_stride;
  }
  // The same for a contiguous sequence, in rows.
  int64_t row(int64_t t, int64_t b) const {
    return packed() ? first_row_[t] + b : t * r_.batch + b;
  }

 private:
  const Recurrence& r_;
  std::vector<int64_t> first_row_;
  int64_t total_rows_ = 0;
};

// One thread's part: samples first_sample, first_sample + sample_step, ... below end_sample, and
// some panels of the hidden dimension.
struct Share {
  int64_t first_sample, sample_step, end_sample;
  int64_t first_panel, end_panel;
  int part, parts;  // which part, of how many, of what all threads have: rows, if panels are cut

  // How many of the first `samples` samples are in it.
  int64_t rows(int64_t samples) const {
    samples = std::min(samples, end_sample);
    return samples <= first_sample ? 0 : (samples - first_sample + sample_step - 1) / sample_step;
  }
};

// Columns of M where each published value begins at a whole vector.
template <class T>
int64_t published_columns(const Recurrence& r) {
  return (counts_of(r.epilogue).published - 1) * padded_to_vectors<T>(r.hidden_size) +
         r.hidden_size;
}

// How a matrix is multiplied with.
enum class MatrixUse {
  Packed,            // in panels, which are packed once
  Streamed,          // where it lies, with few rows
  StreamedInBlocks,  // where it lies, with more: a block is packed, used, and forgotten
  Dotted,            // W alone: by dot products, as there are too few columns for tiles
};

// How the work is cut over threads; a pure function of the problem and the number of threads.
struct Division {
  // Multiply-adds under which a thread costs more than it brings, and a barrier than it saves.
  static constexpr int64_t kWorkPerThread = 1 << 16;
  static constexpr int64_t kWorkPerBarrier = 1 << 14;
  // A matrix above this size does not stay in a core's own cache; a part of it may.
  static constexpr int64_t kCachedMatrixBytes = 2 << 20;

  int threads;
  bool cut_hidden;  // else the batch
  int panel_vectors;
  int64_t rows;  // samples of a share, at most

  template <class T>
  static Division make(const Recurrence& r, int64_t total_rows, int64_t input_size, int threads) {
    const Counts counts = counts_of(r.epilogue);
    const int64_t depth = counts.published * r.hidden_size, columns = counts.sums * r.hidden_size;
    const int64_t work = total_rows * columns * (depth + input_size);
    threads = static_cast<int>(std::clamp<int64_t>(work / kWorkPerThread, 1, threads));
    const int64_t vectors = (r.hidden_size + kLanes<T> - 1) / kLanes<T>;
    const int64_t matrix_bytes = columns * depth * static_cast<int64_t>(sizeof(T));
    const int64_t work_per_step = r.batch * columns * depth / threads;
    const bool few_samples = r.batch < 2 * threads && vectors >= threads;
    const bool large_matrix = matrix_bytes > kCachedMatrixBytes && vectors >= 4 * threads;
    // Then each thread should rearrange a part of the matrices, not all of them.
    const bool read_once = products(r) <= 1 && vectors >= threads;
    if (threads > 1 && (few_samples || large_matrix || read_once) &&
        work_per_step >= kWorkPerBarrier)
      return {threads, true, panel_vectors_for_rows(r.batch), r.batch};
    threads = static_cast<int>(std::min<int64_t>(threads, r.batch));
    const int64_t rows = (r.batch + threads - 1) / threads;
    return {threads, false, panel_vectors_for_rows(rows), rows};
  }

  // How often M is multiplied; never by the zeros of no initial state, unless it has an Inf or NaN.
  static int64_t products(const Recurrence& r) {
    return r.time_steps - (r.initial == nullptr ? 1 : 0);
  }

  // What is done with M. Packing pays by being read often: not once, and not twice if there are few
  // rows and the matrix does not stay in the core's own cache. Where a unit publishes several
  // values, each begins at a whole vector of a strip, and only packed columns of M do so too.
  template <class Storage>
  MatrixUse use_of_hidden(const Recurrence& r) const {
    using E = typename OperandOf<Storage>::type;
    const Counts counts = counts_of(r.epilogue);
    const bool may_multiply = products(r) > 0 || r.multiplies_zero_initial;
    if (counts.published > 1 && may_multiply) return MatrixUse::Packed;
    constexpr int64_t kCoreCacheBytes = 256 << 10;
    const int64_t matrix_bytes = counts.sums * r.hidden_size * r.hidden_size *
                                 static_cast<int64_t>(sizeof(Storage)) / (cut_hidden ? threads : 1);
    const bool has_few_rows = can_stream<E>(rows);
    const bool is_quick = has_few_rows && matrix_bytes > kCoreCacheBytes;
    if (products(r) > (is_quick ? 2 : 1)) return MatrixUse::Packed;
    return has_few_rows ? MatrixUse::Streamed : MatrixUse::StreamedInBlocks;
  }

  // Of the sums of the hidden units. One vector of units to a panel, where W x has values apart
  // from these: then the others still lie side by side in W x.
  template <class T>
  Panels<T> panels(const Recurrence& r) const {
    const Counts counts = counts_of(r.epilogue);
    return Panels<T>(r.hidden_size, counts.apart > 0 ? counts.sums : panel_vectors,
                     cut_hidden ? threads : 1, counts.sums);
  }

  Share share(int64_t batch, int64_t panels, bool packed, int thread) const {
    if (cut_hidden)
      return {0,      1,      batch, panels * thread / threads, panels * (thread + 1) / threads,
              thread, threads};
    // Samples of a packed batch are sorted by length: deal them out, so that every thread gets
    // long and short ones.
    if (packed) return {thread, threads, batch, 0, panels, 0, 1};
    return {batch * thread / threads, 1, batch * (thread + 1) / threads, 0, panels, 0, 1};
  }
};

}  // namespace rnn_cuda::cpu
