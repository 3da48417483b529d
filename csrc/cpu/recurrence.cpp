// The recurrence on a CPU: all time steps in one call, the state in cache between them.
//
// The batch is cut over threads, which then never wait for each other. Only where there are too
// few samples for that is the hidden dimension cut instead, with a barrier per step.
#include "../recurrence.h"

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "epilogues.h"
#include "product.h"
#include "team.h"

namespace rnn_cuda::cpu {
namespace {

// States kept between two sweeps over the inputs: enough rows for an efficient input product, few
// enough to stay in the second-level cache beside the weights.
constexpr int64_t kChunkBytes = 128 << 10;
// Multiply-adds under which a thread costs more than it brings.
constexpr int64_t kWorkPerThread = 1 << 16;
constexpr int64_t kWorkPerBarrier = 1 << 14;

// Scratch memory of a call, kept by the calling thread for its next call: the system takes longer
// to hand out fresh pages than a short sequence takes to compute.
class Scratch {
 public:
  // Begins a call that will take at most `bytes`, each piece rounded up by kAlignment.
  explicit Scratch(int64_t bytes) {
    if (bytes > kept_.size) kept_ = Block(bytes);
    next_ = kept_.data.get();
  }
  ~Scratch() {
    if (kept_.size > kMaxKeptBytes) kept_ = Block();
  }

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += rounded<T>(count);
    return piece;
  }

  template <class T>
  static int64_t rounded(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

 private:
  static constexpr int64_t kAlignment = 64;
  static constexpr int64_t kMaxKeptBytes = 64 << 20;

  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
  };
  struct Block {
    Block() = default;
    explicit Block(int64_t bytes)
        : data(static_cast<char*>(::operator new(bytes, std::align_val_t{kAlignment}))),
          size(bytes) {}
    std::unique_ptr<char, Free> data;
    int64_t size = 0;
  };
  static thread_local Block kept_;
  char* next_;
};

thread_local Scratch::Block Scratch::kept_;

// When each sample has a step, and where its rows lie.
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
  // Samples that have the step-th visited time step; none before the first and after the last.
  int64_t samples(int64_t step) const {
    if (step < 0 || step >= r_.time_steps) return 0;
    return packed() ? r_.batch_sizes[time(step)] : r_.batch;
  }
  // Where sample b's features at time t begin in `rows`.
  int64_t offset(const Rows& rows, int64_t t, int64_t b) const {
    return packed() ? (first_row_[t] + b) * rows.batch_stride
                    : t * rows.time_stride + b * rows.batch_stride;
  }
  int64_t output_row(int64_t t, int64_t b) const {
    return packed() ? first_row_[t] + b : t * r_.batch + b;
  }

 private:
  const Recurrence& r_;
  std::vector<int64_t> first_row_;
  int64_t total_rows_ = 0;
};

// One thread's part: samples first_sample, first_sample + sample_step, ..., and some panels.
struct Share {
  int64_t first_sample, sample_step;
  int64_t first_panel, end_panel;

  int64_t rows(int64_t samples) const {
    return samples <= first_sample ? 0 : (samples - first_sample + sample_step - 1) / sample_step;
  }
};

// How the work is cut; a pure function of the problem and the number of threads.
struct Plan {
  int threads;
  bool cut_hidden;  // else the batch
  int panel_vectors;

  template <class T>
  static Plan make(const Recurrence& r, int64_t total_rows, int threads) {
    const int64_t work = total_rows * r.hidden_size * (r.hidden_size + r.input_size);
    threads = static_cast<int>(std::clamp<int64_t>(work / kWorkPerThread, 1, threads));
    const int64_t vectors = (r.hidden_size + kLanes<T> - 1) / kLanes<T>;
    const int64_t work_per_step = r.batch * r.hidden_size * r.hidden_size / threads;
    if (r.batch < 2 * threads && vectors >= threads && work_per_step >= kWorkPerBarrier) {
      const int64_t fitting = (vectors + threads - 1) / threads;
      return {threads, true,
              static_cast<int>(std::min<int64_t>(panel_vectors_for_rows(r.batch), fitting))};
    }
    threads = static_cast<int>(std::min<int64_t>(threads, r.batch));
    return {threads, false, panel_vectors_for_rows((r.batch + threads - 1) / threads)};
  }

  Share share(int64_t panels, int thread, int of) const {
    if (cut_hidden) return {0, 1, panels * thread / of, panels * (thread + 1) / of};
    // Samples of a packed batch are sorted by length: deal them out, so that every thread gets
    // long and short ones.
    return {thread, of, 0, panels};
  }
};

// What the threads of a team share.
template <class T>
struct Team {
  const Recurrence& recurrence;
  const Schedule& schedule;
  const Panels<T>& panels;
  const T* packed_hidden;
  const T* packed_input;
  SpinBarrier& barrier;
  int threads_on_a_state;  // 1, or the whole team where the hidden dimension is cut
};

// Walks one share through time, a chunk of steps at a time. The states of a chunk lie one behind
// the other in `slots`; slot 0 is the state before the chunk. The slots first get all that does not
// depend on a previous state, and are then completed step by step.
template <class Storage, template <class> class EpilogueOf>
class Walker {
  using T = typename ComputeOf<Storage>::type;
  using Epilogue = EpilogueOf<T>;

 public:
  Walker(const Team<T>& team, const Share& share, int64_t steps_per_chunk, T* slots, T* inputs)
      : team_(team),
        r_(team.recurrence),
        share_(share),
        steps_per_chunk_(steps_per_chunk),
        slots_(slots),
        inputs_(inputs),
        ld_(team.panels.padded_columns()),
        first_column_(team.panels.first_column(share.first_panel)),
        end_column_(team.panels.first_column(share.end_panel)),
        slot_row_(steps_per_chunk + 2) {}

  void run() {
    for (int64_t start = 0; start < r_.time_steps; start += steps_per_chunk_) {
      const int64_t steps = std::min(steps_per_chunk_, r_.time_steps - start);
      // Every thread of a team that shares slots has left the last step, which ended in a barrier;
      // the next step reads columns of slot 0 that other threads are preparing.
      prepare_chunk(start, steps);
      team_.barrier.wait(team_.threads_on_a_state);
      for (int64_t s = 0; s < steps; ++s) {
        advance(start + s, slot(s), slot(s + 1));
        team_.barrier.wait(team_.threads_on_a_state);
      }
    }
  }

 private:
  T* slot(int64_t s) const { return slots_ + slot_row_[s] * ld_; }
  int64_t rows(int64_t step) const { return share_.rows(team_.schedule.samples(step)); }
  int64_t sample(int64_t row) const { return share_.first_sample + row * share_.sample_step; }

  void prepare_chunk(int64_t start, int64_t steps) {
    const int64_t last_slot_before = start == 0 ? 0 : slot_row_[steps_per_chunk_];
    // Slot s + 1 holds the states of the chunk's step s, and behind them the initial states of the
    // samples that enter at the next step (packed, in reverse): both are "previous states" there.
    slot_row_[0] = 0;
    for (int64_t s = 0; s <= steps; ++s)
      slot_row_[s + 1] = slot_row_[s] + std::max(rows(start + s - 1), rows(start + s));
    for (int64_t i = 0; i < rows(start - 1); ++i)
      std::copy(slots_ + (last_slot_before + i) * ld_ + first_column_,
                slots_ + (last_slot_before + i) * ld_ + end_column_,
                slots_ + i * ld_ + first_column_);
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t step = start + s;
      for (int64_t i = 0; i < rows(step); ++i)
        prepare_row(step, i, i >= rows(step - 1), slot(s + 1) + i * ld_);
    }
    if (r_.input_size > 0) add_input_product(start, steps);
    // After the product, which also runs over these rows.
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t i = rows(start + s - 1); i < rows(start + s); ++i)
        read_row<Storage>(r_.initial, sample(i) * r_.hidden_size, slot(s) + i * ld_);
  }

  // z = a + bias, and what a sample gets on its first step.
  void prepare_row(int64_t step, int64_t i, bool first, T* z) {
    const int64_t t = team_.schedule.time(step);
    if (r_.addend.data != nullptr)
      read_row<Storage>(r_.addend.data, team_.schedule.offset(r_.addend, t, sample(i)), z);
    else
      read_row<T>(r_.bias, 0, z);
    if (first && r_.first_addend != nullptr) {
      const Storage* from =
          static_cast<const Storage*>(r_.first_addend) + sample(i) * r_.hidden_size;
      for_columns([&](int64_t n, int64_t count) {
        store<T>(z + n, load(z + n) + load_converted(from + n, count));
      });
    }
  }

  // Copies the share's columns of the row at from + offset, or zeros if there is nothing to read.
  template <class From>
  void read_row(const void* from, int64_t offset, T* to) {
    if (from == nullptr) {
      std::fill(to + first_column_, to + end_column_, T(0));
      return;
    }
    const From* row = static_cast<const From*>(from) + offset;
    for_columns(
        [&](int64_t n, int64_t count) { store<T>(to + n, load_converted(row + n, count)); });
  }

  // W x_t for all steps of the chunk in one product: it does not depend on the state.
  void add_input_product(int64_t start, int64_t steps) {
    const Storage* from = static_cast<const Storage*>(r_.input.data);
    const int64_t first_slot_row = slot_row_[1];
    for (int64_t s = 0; s < steps; ++s) {
      T* to = inputs_ + (slot_row_[s + 1] - first_slot_row) * r_.input_size;
      const int64_t t = team_.schedule.time(start + s);
      for (int64_t i = 0; i < slot_row_[s + 2] - slot_row_[s + 1]; ++i, to += r_.input_size) {
        if (i < rows(start + s)) {
          const Storage* row = from + team_.schedule.offset(r_.input, t, sample(i));
          for (int64_t k = 0; k < r_.input_size; ++k) to[k] = static_cast<T>(row[k]);
        } else {
          std::fill(to, to + r_.input_size, T(0));
        }
      }
    }
    add_product(inputs_, r_.input_size, slot_row_[steps + 1] - first_slot_row, team_.packed_input,
                r_.input_size, team_.panels, share_.first_panel, share_.end_panel, slot(1), ld_);
  }

  // One step: the recurrent product, the epilogue, and the results out.
  void advance(int64_t step, const T* previous, T* state) {
    add_product(previous, ld_, rows(step), team_.packed_hidden, r_.hidden_size, team_.panels,
                share_.first_panel, share_.end_panel, state, ld_);
    const int64_t t = team_.schedule.time(step);
    for (int64_t i = 0; i < rows(step); ++i, state += ld_) {
      const int64_t b = sample(i);
      Storage* out =
          static_cast<Storage*>(r_.output) + team_.schedule.output_row(t, b) * r_.hidden_size;
      const Storage* operand = nullptr;
      if constexpr (Epilogue::kUsesOperand)
        operand =
            static_cast<const Storage*>(r_.operand.data) + team_.schedule.offset(r_.operand, t, b);
      for_columns([&](int64_t n, int64_t count) {
        Vec<T> e{};
        if constexpr (Epilogue::kUsesOperand) e = load_converted(operand + n, count);
        store<T>(state + n, store_converted(out + n, Epilogue::apply(load(state + n), e), count));
      });
      if (r_.last != nullptr && i >= rows(step + 1)) {
        Storage* last = static_cast<Storage*>(r_.last) + b * r_.hidden_size;
        std::copy(out + first_column_, out + std::min(end_column_, r_.hidden_size),
                  last + first_column_);
      }
    }
  }

  // Calls f(first column, columns that exist) for every vector of columns of the share.
  template <class F>
  void for_columns(const F& f) const {
    for (int64_t n = first_column_; n < end_column_; n += kLanes<T>) f(n, r_.hidden_size - n);
  }

  const Team<T>& team_;
  const Recurrence& r_;
  const Share share_;
  const int64_t steps_per_chunk_;
  T* const slots_;
  T* const inputs_;
  const int64_t ld_;
  const int64_t first_column_, end_column_;
  std::vector<int64_t> slot_row_;  // of the chunk: first row of each slot in slots_
};

template <class Storage, template <class> class EpilogueOf>
void run_typed(const Recurrence& r, int wanted_threads) {
  using T = typename ComputeOf<Storage>::type;
  const Schedule schedule(r);
  const Plan plan = Plan::make<T>(r, schedule.total_rows(), wanted_threads);
  const Panels<T> panels(r.hidden_size, plan.panel_vectors);
  const int64_t padded = panels.padded_columns();

  const int64_t rows = plan.cut_hidden ? r.batch : (r.batch + plan.threads - 1) / plan.threads;
  const int64_t steps_per_chunk = std::clamp<int64_t>(
      kChunkBytes / (rows * (padded + r.input_size) * static_cast<int64_t>(sizeof(T))), 1,
      r.time_steps);
  const int64_t slots_per_sample = (steps_per_chunk + 1) * padded;
  const int64_t inputs_per_sample = steps_per_chunk * r.input_size;
  // Where the batch is cut: room also for a team that turns out smaller, its parts then larger.
  // Where the hidden dimension is cut: slots that all share, inputs for each thread.
  const int64_t slot_samples = plan.cut_hidden ? r.batch : r.batch + plan.threads;
  const int64_t input_samples = plan.cut_hidden ? r.batch * plan.threads : slot_samples;

  const int64_t counts[] = {padded * r.hidden_size, padded * r.input_size,
                            slots_per_sample * slot_samples, inputs_per_sample * input_samples};
  int64_t bytes = 0;
  for (const int64_t count : counts) bytes += Scratch::rounded<T>(count);
  Scratch scratch(bytes);
  T* const packed_hidden = scratch.take<T>(counts[0]);
  T* const packed_input = scratch.take<T>(counts[1]);
  T* const slots = scratch.take<T>(counts[2]);
  T* const inputs = scratch.take<T>(counts[3]);

  SpinBarrier barrier;
  run_team(plan.threads, [&](int thread, int threads) {
    const int64_t first = panels.count() * thread / threads;
    const int64_t end = panels.count() * (thread + 1) / threads;
    pack<Storage>(r.weight_hidden, r.hidden_size, r.hidden_size, panels, first, end, packed_hidden);
    pack<Storage>(r.weight_input, r.hidden_size, r.input_size, panels, first, end, packed_input);
    barrier.wait(threads);

    const Team<T> team{
        r, schedule, panels, packed_hidden, packed_input, barrier, plan.cut_hidden ? threads : 1};
    const Share share = plan.share(panels.count(), thread, threads);
    T* own_slots =
        slots + (plan.cut_hidden ? 0 : slots_per_sample * (slot_samples / threads) * thread);
    T* own_inputs = inputs + inputs_per_sample * (input_samples / threads) * thread;
    Walker<Storage, EpilogueOf>(team, share, steps_per_chunk, own_slots, own_inputs).run();
  });
}

template <class Storage>
void run_stored(const Recurrence& r, int threads) {
  switch (r.epilogue) {
    case Epilogue::Tanh: return run_typed<Storage, Tanh>(r, threads);
    case Epilogue::Relu: return run_typed<Storage, Relu>(r, threads);
    case Epilogue::Sigmoid: return run_typed<Storage, Sigmoid>(r, threads);
    case Epilogue::Identity:
    case Epilogue::IdentityBackward: return run_typed<Storage, Identity>(r, threads);
    case Epilogue::TanhBackward: return run_typed<Storage, TanhBackward>(r, threads);
    case Epilogue::ReluBackward: return run_typed<Storage, ReluBackward>(r, threads);
    case Epilogue::SigmoidBackward: return run_typed<Storage, SigmoidBackward>(r, threads);
    case Epilogue::Modulate: return run_typed<Storage, Modulate>(r, threads);
  }
  throw std::invalid_argument("rnn_cuda: unknown epilogue");
}

}  // namespace

void run(const Recurrence& r, int threads) {
  if (r.time_steps == 0 || r.batch == 0 || r.hidden_size == 0) return;
  switch (r.dtype) {
    case ScalarType::Float32: return run_stored<float>(r, threads);
    case ScalarType::Float64: return run_stored<double>(r, threads);
    case ScalarType::BFloat16: return run_stored<c10::BFloat16>(r, threads);
    case ScalarType::Float16: return run_stored<c10::Half>(r, threads);
  }
  throw std::invalid_argument("rnn_cuda: unknown scalar type");
}

}  // namespace rnn_cuda::cpu
