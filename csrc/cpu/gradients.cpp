// All gradients of a layer whose units have one delta, on a CPU, in one walk against time.
//
// When a chunk's deltas are there, still in cache, everything that needs them is done with them:
// the weight gradients grow by the chunk's outer products, and the chunk's part of the input's
// gradient is written. So delta never lives longer than a chunk.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../recurrence.h"
#include "gradient_scratch.h"

namespace rnn_cuda::cpu {
namespace {

// How far ahead of its use a row is asked for.
constexpr int64_t kRowsAhead = 8;

// One thread of a call.
template <class Storage>
class GradientWorker {
  using T = typename ComputeOf<Storage>::type;
  using E = typename OperandOf<Storage>::type;
  using R = typename OperandOf<Storage>::of_rows;

 public:
  GradientWorker(const Gradients& g, const Call<Storage>& call, GradientScratch<Storage>& extra,
                 char* scratch, SpinBarrier& barrier, int thread)
      : g_(g),
        r_(g.backward),
        call_(call),
        extra_(extra),
        scratch_(scratch),
        barrier_(barrier),
        thread_(thread),
        team_(call.team(scratch, barrier)),  // M need not be looked at first: zeros are left out
        share_(call.share(thread)),
        first_column_(call.panels().first_column(share_.first_panel)),
        end_column_(std::min(call.panels().first_column(share_.end_panel), r_.hidden_size)),
        walker_(team_, share_, call.buffers(scratch, thread)),
        previous_(own_row_operands(extra.previous, extra.previous_size)),
        input_(own_row_operands(extra.input, extra.input_size)),
        delta_(own_row_operands(extra.delta, extra.delta_size)),
        bias_(at(extra.bias_at[thread])),
        streams_input_gradient_(std::is_same_v<Storage, T> &&
                                is_better_streamed(static_cast<const Storage*>(g.grad_input),
                                                   call.schedule().total_rows(), g.input_size)) {}

  void run() {
    const int threads = call_.division().threads;
    call_.pack_weights(scratch_, thread_);
    const int64_t panels = extra_.input_panels.count();
    if (extra_.use_of_input == MatrixUse::Packed)
      pack<Storage>(columns_of_w(), {g_.input_size}, r_.hidden_size, extra_.input_panels,
                    panels * thread_ / threads, panels * (thread_ + 1) / threads,
                    operands_at(extra_.packed_input));
    if (!extra_.sums_at_once) {
      weight_hidden().start(at(extra_.weight_hidden_at[thread_]));
      weight_input().start(at(extra_.weight_input_at[thread_]));
    }
    std::fill_n(bias_, call_.panels().padded_columns(), T(0));
    if (thread_ == 0) std::fill_n(at(extra_.zeros), extra_.zeros_size, T(0));
    barrier_.wait(threads);
    walker_.run([&](int64_t start, int64_t steps) { add_chunk(start, steps); });
    if (streams_input_gradient_) finish_streaming();
    barrier_.wait(threads);
    write_sums();
  }

 private:
  T* at(int64_t offset) const { return reinterpret_cast<T*>(scratch_ + offset); }
  E* operands_at(int64_t offset) const { return reinterpret_cast<E*>(scratch_ + offset); }
  // The strips of one thread, of those that all threads have.
  Strips<R> own_row_operands(int64_t offset, int64_t size) const {
    return {reinterpret_cast<R*>(scratch_ + offset) + size * thread_,
            Strips<R>::stride_for(row_operands<R>(extra_.rows))};
  }
  OuterProduct<R>& weight_hidden() { return extra_.weight_hidden[thread_]; }
  OuterProduct<R>& weight_input() { return extra_.weight_input[thread_]; }

  // dL/dx = W^T delta: the product with W's columns.
  Matrix columns_of_w() const {
    return {g_.weight_input.data, g_.weight_input.stride, !g_.weight_input.transposed};
  }

  struct Range {
    int64_t first, end;
  };

  // Which of so many rows of the share, or panels, are this thread's. Samples are its own; where
  // all threads have all samples, they share.
  Range own(int64_t count) const {
    return {count * share_.part / share_.parts, count * (share_.part + 1) / share_.parts};
  }

  // Which of so many columns of those rows; whole cache lines.
  Range own_columns(int64_t columns) const {
    constexpr int64_t kLine = kCacheLineBytes / static_cast<int64_t>(sizeof(Storage));
    const Range lines = own((columns + kLine - 1) / kLine);
    return {lines.first * kLine, std::min(columns, lines.end * kLine)};
  }

  // The time step and sample of a row of the chunk; time -1 where the row is empty.
  struct Place {
    int64_t time, sample;
  };

  void add_chunk(int64_t start, int64_t steps) {
    places_.clear();
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t t = call_.schedule().time(start + s), filled = walker_.rows(s);
      // The last slot's empty rows are the next chunk's to fill.
      const int64_t slot_rows =
          s + 1 == steps ? filled : walker_.slot_row(s + 2) - walker_.slot_row(s + 1);
      for (int64_t i = 0; i < slot_rows; ++i)
        places_.push_back(i < filled ? Place{t, walker_.sample(i)} : Place{-1, 0});
    }
    const int64_t rows = static_cast<int64_t>(places_.size());
    const Strips<T> delta = walker_.buffers().values.from_row(walker_.slot_row(1));
    for (int64_t row = 0; row < rows; row += extra_.rows)
      add_rows(delta.from_row(row), row, std::min(extra_.rows, rows - row));
    if (g_.grad_input != nullptr) write_input_gradient();
    if (g_.grad_initial != nullptr)
      for (int64_t s = 0; s < steps; ++s)
        if (walker_.rows(s + 1) < walker_.rows(s))
          write_initial_gradient(s, walker_.rows(s + 1), walker_.rows(s));
    team_.wait_for_state();
  }

  // Outer products of `count` rows of delta, from row `row` of the chunk on.
  void add_rows(const Strips<T>& delta, int64_t row, int64_t count) {
    const bool in_place = extra_.uses_input_in_place;
    Strips<R> left;
    if (g_.grad_weight_hidden != nullptr || (g_.grad_weight_input != nullptr && !in_place))
      left = as_row_operands(delta, count);
    if (g_.grad_weight_hidden != nullptr) {
      read_row_operands<Storage>(count, r_.hidden_size, previous_,
                                 [&](int64_t i) { return previous_state(places_[row + i]); });
      add_product(weight_hidden(), left, previous_, count, g_.grad_weight_hidden, r_.hidden_size,
                  /*is_swapped=*/false,
                  [&](int64_t n, int64_t k, Vec<T> sum) { write_weight_hidden(n, k, sum); });
    }
    if (g_.grad_weight_input != nullptr && in_place) {
      add_input_in_place(delta, row, count);
    } else if (g_.grad_weight_input != nullptr) {
      read_row_operands<Storage>(count, g_.input_size, input_, [&](int64_t i) {
        if (i + kRowsAhead < count)
          prefetch_row(input_row(places_[row + i + kRowsAhead]), 0, g_.input_size,
                       prefetch_to_read);
        return input_row(places_[row + i]);
      });
      const Strips<R> own = {left.at(0, first_column_), left.stride};
      const bool is_swapped = extra_.input_is_left;
      add_product(weight_input(), is_swapped ? input_ : left, is_swapped ? own : input_, count,
                  g_.grad_weight_input, g_.input_size, is_swapped,
                  [&](int64_t i, int64_t j, Vec<T> sum) { write_weight_input(i, j, sum); });
    }
    if (g_.grad_bias != nullptr)
      for (int64_t n = first_column_; n < end_column_; n += kLanes<T>) {
        Vec<T> sum{};
        const T* from = delta.at(0, n);
        for (int64_t i = 0; i < count; ++i, from += kLanes<T>) sum += load(from);
        store<T>(bias_ + n, load(bias_ + n) + sum);
      }
  }

  // Adds rows to a weight gradient; or writes it, if these are all, by `write_vector` unless its
  // rows lie as the product's do.
  template <class F>
  void add_product(OuterProduct<R>& product, const Strips<R>& left, const Strips<R>& right,
                   int64_t count, void* gradient, int64_t columns, bool is_swapped,
                   const F& write_vector) {
    if (!extra_.sums_at_once) return product.add(left, right, row_operands<R>(count));
    if (!is_swapped && count <= OuterProduct<R>::kRowsWritten)
      product.write(left, right, row_operands<R>(count), static_cast<Storage*>(gradient), columns);
    else
      product.compute(left, right, row_operands<R>(count), write_vector);
  }

  // This thread's columns of delta, as the outer products take them.
  Strips<R> as_row_operands(const Strips<T>& delta, int64_t count) const {
    if constexpr (kRowsPer<R> == 1) {
      return delta;
    } else {
      const auto rounded = [](Vec<T> v) { return widen(narrow(v, Storage()), Storage()); };
      for (int64_t n = first_column_; n < end_column_; n += kLanes<T>)
        for (int64_t i = 0; i < count; i += 2) {
          const Vec<T> second = i + 1 < count ? load(delta.at(i + 1, n)) : Vec<T>{};
          store<R>(delta_.at(i / 2, n),
                   bit_cast<Vec<R>>(paired(rounded(load(delta.at(i, n))), rounded(second))));
        }
      return delta_;
    }
  }

  void add_input_in_place(const Strips<T>& delta, int64_t row, int64_t count) {
    const auto row_at = [&](int64_t i) {
      const Storage* const x = input_row(places_[row + i]);
      return x == nullptr ? reinterpret_cast<const Storage*>(at(extra_.zeros)) : x;
    };
    T* const sums = walker_.buffers().sums;
    if (extra_.sums_at_once)
      weight_input().compute_in_place(
          delta, row_at, count, sums,
          [&](int64_t n, int64_t k, Vec<T> sum) { write_weight_input(n, k, sum); });
    else
      weight_input().add_in_place(delta, row_at, count, sums);
  }

  // x_t of a place.
  const Storage* input_row(const Place& place) const {
    if (place.time < 0) return nullptr;
    return static_cast<const Storage*>(g_.input.data) +
           call_.schedule().offset(g_.input, place.time, place.sample);
  }

  // dL/dx_t of a place.
  Storage* input_gradient_row(const Place& place) const {
    if (place.time < 0) return nullptr;
    return static_cast<Storage*>(g_.grad_input) +
           call_.schedule().row(place.time, place.sample) * g_.input_size;
  }

  static void prefetch_row(const Storage* row, int64_t first, int64_t end,
                           void (*prefetch)(const void*)) {
    if (row == nullptr) return;
    for (int64_t n = first; n < end; n += kCacheLineBytes / static_cast<int64_t>(sizeof(Storage)))
      prefetch(row + n);
  }

  // h_{t-1} of a place, in the direction of the forward pass.
  const Storage* previous_state(const Place& place) const {
    if (place.time < 0) return nullptr;
    const int64_t before = r_.reverse ? place.time - 1 : place.time + 1;
    if (place.sample < call_.schedule().samples_at(before))
      return static_cast<const Storage*>(g_.states.data) +
             call_.schedule().offset(g_.states, before, place.sample);
    if (g_.initial == nullptr) return nullptr;
    return static_cast<const Storage*>(g_.initial) + place.sample * r_.hidden_size;
  }

  // Calls f(column, width, sums) with all of so few rows of delta times columns [first, end) of a
  // matrix, which is used where it lies, in as many columns at once as there is memory for.
  template <class F>
  void stream(const Strips<E>& delta, int64_t rows, const Matrix& matrix, int64_t first,
              int64_t end, const F& f) const {
    T* const sums = walker_.buffers().sums;
    for (int64_t n = first; n < end; n += kStreamedColumns<T>) {
      const int64_t columns = std::min(kStreamedColumns<T>, end - n),
                    width = padded_to_vectors<T>(columns);
      std::fill_n(sums, rows * width, T(0));
      add_streamed_product<Storage>(delta, rows, matrix, n, columns, r_.hidden_size, sums, width);
      f(n, width, sums);
    }
  }

  // Calls f(row, height, sums) with rows [first, end) of delta times a panel of a matrix, in
  // blocks: of the packed panel, or of the matrix where it lies.
  template <class F>
  void multiply(const Strips<E>& delta, int64_t first, int64_t end, const Matrix& matrix,
                int64_t columns, const Panels<T>& panels, int64_t p, const E* packed, bool streamed,
                const F& f) {
    const int vectors = panels.vectors(p);
    const int64_t width = vectors * kLanes<T>;
    const WalkBuffers<Storage>& buffers = walker_.buffers();
    if (streamed) {
      std::fill_n(buffers.sums, (end - first) * width, T(0));
      add_product_in_blocks<Storage>(delta.from_row(first), end - first, matrix, {columns},
                                     r_.hidden_size, panels, p, buffers.block, buffers.sums);
      f(first, end - first, buffers.sums);
      return;
    }
    const int64_t depth = operands<E>(r_.hidden_size);
    const int64_t at_once =
        std::max<int64_t>(kMaxTileRows, kSumsBytes / (width * static_cast<int64_t>(sizeof(T))));
    for (int64_t row = first; row < end; row += at_once) {
      const int64_t rows = std::min(at_once, end - row);
      multiply_panel(delta.from_row(row), rows, packed + depth * panels.first_column(p), vectors,
                     depth, at(extra_.zeros), 0, buffers.sums, width);
      f(row, rows, buffers.sums);
    }
  }

  void write_input_gradient() {
    const Strips<E> delta = walker_.buffers().states.from_row(walker_.slot_row(1));
    const int64_t chunk_rows = static_cast<int64_t>(places_.size());
    if (extra_.use_of_input == MatrixUse::Streamed) {
      const Range columns = own_columns(g_.input_size);
      for (int64_t row = 0; row < chunk_rows; row += kStreamedRows) {
        const int64_t rows = std::min(kStreamedRows, chunk_rows - row);
        stream(delta.from_row(row), rows, columns_of_w(), columns.first, columns.end,
               [&](int64_t column, int64_t width, const T* sums) {
                 for (int64_t i = 0; i < rows; ++i)
                   write_input_gradient_row(places_[row + i], sums + i * width, column, width);
               });
      }
      return;
    }
    // Threads share the rows; but the panels, where these are packed on the way: once is enough.
    const Panels<T>& panels = extra_.input_panels;
    const bool is_packed = extra_.use_of_input == MatrixUse::Packed;
    const Range rows = is_packed ? own(chunk_rows) : Range{0, chunk_rows};
    const Range its = is_packed ? Range{0, panels.count()} : own(panels.count());
    for (int64_t p = its.first; p < its.end; ++p)
      multiply(
          delta, rows.first, rows.end, columns_of_w(), g_.input_size, panels, p,
          operands_at(extra_.packed_input), !is_packed,
          [&](int64_t row, int64_t height, const T* sums) {
            // The next block's rows can come while its products are summed.
            const int64_t prefetched = streams_input_gradient_ ? 0 : height;
            for (int64_t i = row + height; i < std::min(row + height + prefetched, rows.end); ++i)
              prefetch_row(input_gradient_row(places_[i]), panels.first_column(p),
                           std::min(panels.first_column(p + 1), g_.input_size), prefetch_to_write);
            const int64_t width = panels.vectors(p) * kLanes<T>;
            for (int64_t i = 0; i < height; ++i)
              write_input_gradient_row(places_[row + i], sums + i * width, panels.first_column(p),
                                       width);
          });
  }

  // Rows [first, end) of step s of the chunk are their samples' first steps: dL/dh_0 = U^T delta,
  // and what is carried.
  void write_initial_gradient(int64_t s, int64_t first, int64_t end) {
    const Panels<T>& panels = call_.panels();
    const Strips<E> delta = walker_.buffers().states.from_row(walker_.slot_row(s + 1));
    Storage* const grad = static_cast<Storage*>(g_.grad_initial);
    if (call_.use_of_hidden() == MatrixUse::Streamed)
      return stream(delta.from_row(first), end - first, r_.weight_hidden, first_column_,
                    end_column_, [&](int64_t column, int64_t width, const T* sums) {
                      for (int64_t i = first; i < end; ++i)
                        write_row(sums + (i - first) * width, column, width, r_.hidden_size,
                                  grad + walker_.sample(i) * r_.hidden_size, carried(i));
                    });
    for (int64_t p = share_.first_panel; p < share_.end_panel; ++p)
      multiply(delta, first, end, r_.weight_hidden, r_.hidden_size, panels, p, team_.packed_hidden,
               call_.use_of_hidden() != MatrixUse::Packed,
               [&](int64_t row, int64_t height, const T* sums) {
                 const int64_t width = panels.vectors(p) * kLanes<T>;
                 for (int64_t i = 0; i < height; ++i)
                   write_row(sums + i * width, panels.first_column(p), width, r_.hidden_size,
                             grad + walker_.sample(row + i) * r_.hidden_size, carried(row + i));
               });
  }

  // Of the share's i-th sample, or null.
  const T* carried(int64_t i) const {
    return team_.counts.carried == 0 ? nullptr : walker_.carried(0, i);
  }

  // Writes columns [first, first + width) of a row, as far as there are so many: the sums, and what
  // is added to them.
  static void write_row(const T* sums, int64_t first, int64_t width, int64_t columns, Storage* row,
                        const T* added = nullptr) {
    for (int64_t n = 0; n < width; n += kLanes<T>) {
      Vec<T> sum = load(sums + n);
      if (added != nullptr) sum += load(added + first + n);
      store_converted(row + first + n, sum, columns - first - n);
    }
  }

  // The same of dL/dx_t of a place.
  void write_input_gradient_row(const Place& place, const T* sums, int64_t first,
                                int64_t width) const {
    Storage* const row = input_gradient_row(place);
    if (row == nullptr) return;
    if constexpr (std::is_same_v<Storage, T>)
      if (streams_input_gradient_) {
        for (int64_t n = 0; n < width && first + n < g_.input_size; n += kLanes<T>)
          store_streaming<T>(row + first + n, load(sums + n));
        return;
      }
    write_row(sums, first, width, g_.input_size, row);
  }

  void write_weight_hidden(int64_t n, int64_t k, Vec<T> sum) const {
    store_converted(static_cast<Storage*>(g_.grad_weight_hidden) + n * r_.hidden_size + k, sum,
                    r_.hidden_size - k);
  }

  void write_weight_input(int64_t left, int64_t right, Vec<T> sum) const {
    Storage* const grad = static_cast<Storage*>(g_.grad_weight_input);
    if (!extra_.input_is_left) {
      store_converted(grad + left * g_.input_size + right, sum, g_.input_size - right);
      return;
    }
    const int64_t n = first_column_ + right;
    for (int64_t i = 0; i < kLanes<T> && n + i < end_column_; ++i)
      grad[(n + i) * g_.input_size + left] = static_cast<Storage>(sum[i]);
  }

  // The sums of all threads: each adds up, over the threads, a part of the elements. Where the
  // hidden dimension is cut, a thread's own part is complete.
  void write_sums() {
    const bool complete = call_.division().cut_hidden;
    const int first_of = complete ? thread_ : 0;
    const int end_of = complete ? thread_ + 1 : call_.division().threads;
    const auto part = [&](const OuterProduct<R>& product, const auto& f) {
      const int64_t left = product.end_left() - product.first_left();
      const int64_t pieces = complete ? 1 : call_.division().threads;
      const int64_t piece = complete ? 0 : thread_;
      product.for_each(product.first_left() + left * piece / pieces,
                       product.first_left() + left * (piece + 1) / pieces, f);
    };
    const auto sum_of = [&](const std::vector<int64_t>& totals, int64_t offset) {
      Vec<T> sum = load(at(totals[first_of]) + offset);
      for (int other = first_of + 1; other < end_of; ++other)
        sum += load(at(totals[other]) + offset);
      return sum;
    };
    if (!extra_.sums_at_once) {
      part(weight_hidden(), [&](int64_t n, int64_t k, int64_t offset) {
        write_weight_hidden(n, k, sum_of(extra_.weight_hidden_at, offset));
      });
      part(weight_input(), [&](int64_t left, int64_t right, int64_t offset) {
        write_weight_input(left, right, sum_of(extra_.weight_input_at, offset));
      });
    }
    if (g_.grad_bias == nullptr || (!complete && thread_ > 0)) return;
    for (int64_t n = first_column_; n < end_column_; n += kLanes<T>)
      store_converted(static_cast<T*>(g_.grad_bias) + n, sum_of(extra_.bias_at, n),
                      end_column_ - n);
  }

  const Gradients& g_;
  const Recurrence& r_;
  const Call<Storage>& call_;
  GradientScratch<Storage>& extra_;
  char* const scratch_;
  SpinBarrier& barrier_;
  const int thread_;
  const Team<Storage> team_;
  const Share share_;
  const int64_t first_column_, end_column_;  // that this thread computes
  Walker<Storage, /*kOneDelta=*/true> walker_;
  const Strips<R> previous_, input_;  // h_{t-1} and x_t of the rows worked on
  const Strips<R> delta_;             // of those rows, if a row operand is not the value itself
  T* const bias_;
  const bool streams_input_gradient_;
  std::vector<Place> places_;  // of the chunk's rows
};

template <class Storage>
void run_typed(const Gradients& g, int threads) {
  using T = typename ComputeOf<Storage>::type;
  const Schedule schedule(g.backward);
  for (;;) {
    const Division division =
        Division::make<T>(g.backward, schedule.total_rows(), g.input_size, threads);
    ScratchLayout layout;
    const Call<Storage> call(g.backward, schedule, division, /*keeps_states=*/true, layout);
    GradientScratch<Storage> extra(g, call, layout);
    const Scratch memory(layout);
    SpinBarrier barrier;
    threads = run_team(division.threads, [&](int thread) {
      GradientWorker<Storage>(g, call, extra, memory.data(), barrier, thread).run();
    });
    if (threads == division.threads) return;
  }
}

// The gradients of a pass over nothing.
void write_zeros(const Gradients& g) {
  const int64_t H = g.backward.hidden_size;
  int64_t bytes = 4, bias_bytes = 4;
  if (g.backward.dtype == ScalarType::Float64) bytes = bias_bytes = 8;
  if (g.backward.dtype == ScalarType::BFloat16 || g.backward.dtype == ScalarType::Float16)
    bytes = 2;
  const auto clear = [](void* to, int64_t size) {
    if (to != nullptr) std::memset(to, 0, size);
  };
  clear(g.grad_initial, g.backward.batch * H * bytes);
  clear(g.grad_weight_input, H * g.input_size * bytes);
  clear(g.grad_weight_hidden, H * H * bytes);
  clear(g.grad_bias, H * bias_bytes);
}

}  // namespace

void run(const Gradients& g, int threads) {
  if (!has_one_delta(counts_of(g.backward.epilogue)))
    throw std::invalid_argument("rnn_cuda: no sums of gradients for an epilogue of several values");
  if (g.backward.time_steps == 0 || g.backward.batch == 0) return write_zeros(g);
  switch (g.backward.dtype) {
    case ScalarType::Float32: return run_typed<float>(g, threads);
    case ScalarType::Float64: return run_typed<double>(g, threads);
    case ScalarType::BFloat16: return run_typed<c10::BFloat16>(g, threads);
    case ScalarType::Float16: return run_typed<c10::Half>(g, threads);
  }
  throw std::invalid_argument("rnn_cuda: unknown scalar type");
}

}  // namespace rnn_cuda::cpu
