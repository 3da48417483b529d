// The persistent kernel: all time steps of a recurrence in one launch, its matrix on chip.
//
// A team of blocks owns a batch tile, `columns` samples, for the whole sequence. Each block owns
// some row tiles of hidden units, and its warps form a grid: `row_warps` that take different row
// tiles, times `depth_split` that share a row tile and take different terms of its sum. Tiles of
// weights stay where they are for all steps: a warp's first ones in its registers, the others in
// shared memory. A step is: wait for the states, multiply, apply the epilogue, store, publish.
#pragma once

#include "device.h"
#include "engines.cuh"
#include "epilogues.cuh"
#include "exchanges.cuh"
#include "layout.h"

namespace rnn_cuda {
namespace cuda {

struct WalkParameters {
  Walk walk;
  Layout layout;
  int state_words;
  int time_steps, batch, input_size, hidden_size;
  int columns, column_groups;
  int row_warps, depth_split;
  int blocks, first_tile, batch_tiles;
  int row_tiles, block_row_tiles, row_rounds;
  int state_depth, input_depth, state_slice, input_slice, shared_weight_tiles;
  int64_t total_rows;
  // Residency::Grid, for each direction and batch tile: see Workspace
  uint32_t* counters;
  uint32_t* states;
  double* norm_parts[2];  // [row_tiles][total_rows]; null: not wanted
};

// A block's shared memory.
struct BlockMemory {
  device::Mbarrier* barriers;
  device::Word16* weights;
  uint32_t* states;
  uint32_t* outbox;
  uint32_t* inputs;
  float* partials;

  // Cut as Layout says: an array ends where the next one begins.
  __device__ __forceinline__ explicit BlockMemory(const Layout& layout) {
    device::Carver carver(device::shared_memory());
    barriers = carver.take<device::Mbarrier>((layout.weights - layout.barriers) / 8);
    weights = carver.take<device::Word16>((layout.states - layout.weights) / 16);
    states = carver.take<uint32_t>((layout.outbox - layout.states) / 4);
    outbox = carver.take<uint32_t>((layout.inputs - layout.outbox) / 4);
    inputs = carver.take<uint32_t>((layout.partials - layout.inputs) / 4);
    partials = carver.take<float>((layout.bytes - layout.partials) / 4);
  }
};

// The samples of a batch tile as time goes by.
class TileInTime {
 public:
  __device__ __forceinline__ TileInTime(const WalkParameters& p, const Recurrence& r, int tile)
      : batch_sizes_(p.walk.batch_sizes),
        row_starts_(p.walk.row_starts),
        reverse_(r.reverse),
        time_steps_(p.time_steps),
        batch_(p.batch),
        first_(tile * p.columns) {
    steps_ = time_steps_;
    if (batch_sizes_ != nullptr) {  // the longest sample comes first: how many steps has it?
      int low = 0;
      while (low < steps_) {
        const int middle = (low + steps_) / 2;
        if (batch_sizes_[middle] > first_)
          low = middle + 1;
        else
          steps_ = middle;
      }
    }
  }

  __device__ __forceinline__ int steps() const { return steps_; }
  __device__ __forceinline__ int time_of(int step) const {
    return reverse_ ? steps_ - 1 - step : step;
  }
  __device__ __forceinline__ int sample(int column) const { return first_ + column; }
  // How many samples of the whole batch have this step.
  __device__ __forceinline__ int active(int t) const {
    return batch_sizes_ != nullptr ? static_cast<int>(batch_sizes_[t]) : batch_;
  }
  // Of those, the ones that have the step after it too.
  __device__ __forceinline__ int active_after(int t) const {
    return t + 1 == time_steps_ ? 0 : active(t + 1);
  }
  // Row of sample 0 at time t in a contiguous tensor.
  __device__ __forceinline__ int64_t row_of(int t) const {
    return row_starts_ != nullptr ? row_starts_[t] : static_cast<int64_t>(t) * batch_;
  }
  template <class T>
  __device__ __forceinline__ const T* find(const Rows& rows, int t, int64_t row, int sample) const {
    const T* data = static_cast<const T*>(rows.data);
    return row_starts_ != nullptr ? data + (row + sample) * rows.batch_stride
                                  : data + t * rows.time_stride + sample * rows.batch_stride;
  }

 private:
  const int64_t* batch_sizes_;
  const int64_t* row_starts_;
  bool reverse_;
  int time_steps_, batch_, first_, steps_;
};

// One time step of a tile.
struct Moment {
  int t, active, active_after;
  int64_t row;

  __device__ __forceinline__ Moment(const TileInTime& tile, int step)
      : t(tile.time_of(step)),
        active(tile.active(t)),
        active_after(tile.active_after(t)),
        row(tile.row_of(t)) {}

  __device__ __forceinline__ bool is_first(const Recurrence& r, int sample) const {
    return r.reverse ? sample >= active_after : t == 0;
  }
  __device__ __forceinline__ bool is_last(const Recurrence& r, int sample) const {
    return r.reverse ? t == 0 : sample >= active_after;
  }
};

// Brings x of the next step into shared memory: read from device memory as the step begins, into
// registers, and stored as it ends, so that nobody waits for it.
template <class Engine>
class InputStage {
 public:
  using T = typename Engine::Element;

  __device__ __forceinline__ InputStage(const WalkParameters& p, const Recurrence& r,
                                        uint32_t* words)
      : p_(p), r_(r), words_(words) {
    count_ = p.columns * p.input_depth * Engine::kSizes.words_per_depth_tile;
  }

  __device__ __forceinline__ const uint32_t* words(int step) const {
    return words_ + (step & 1) * p_.columns * p_.layout.input_pitch;
  }

  __device__ __forceinline__ void fetch(const TileInTime& tile, int step) {
    const Moment moment(tile, step);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int item = threadIdx.x + i * blockDim.x;
      if (item < count_) held_[i] = read(tile, moment, item);
    }
  }

  __device__ __forceinline__ void store(const TileInTime& tile, int step) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int item = threadIdx.x + i * blockDim.x;
      if (item < count_) write(step, item, held_[i]);
    }
    if (count_ > kHeld * static_cast<int>(blockDim.x)) {  // more than a thread likes to hold
      const Moment moment(tile, step);
      for (int item = threadIdx.x + kHeld * blockDim.x; item < count_; item += blockDim.x)
        write(step, item, read(tile, moment, item));
    }
  }

 private:
  static constexpr int kHeld = 2;

  __device__ __forceinline__ int words_per_sample() const {
    return p_.input_depth * Engine::kSizes.words_per_depth_tile;
  }
  __device__ __forceinline__ uint32_t read(const TileInTime& tile, const Moment& moment,
                                           int item) const {
    const int sample = tile.sample(item / words_per_sample());
    if (sample >= moment.active) return 0;
    const T* x = tile.find<T>(r_.input, moment.t, moment.row, sample);
    return Engine::word_of(FeatureView<T>{x, p_.input_size}, item % words_per_sample());
  }
  __device__ __forceinline__ void write(int step, int item, uint32_t word) {
    uint32_t* to = words_ + (step & 1) * p_.columns * p_.layout.input_pitch;
    to[item / words_per_sample() * p_.layout.input_pitch + item % words_per_sample()] = word;
  }

  const WalkParameters& p_;
  const Recurrence& r_;
  uint32_t* words_;
  int count_;
  uint32_t held_[kHeld];
};

// The tiles of weights of one warp.
template <class Engine>
class WarpWeights {
 public:
  using T = typename Engine::Element;
  using Weights = typename Engine::Weights;
  using Accumulator = typename Engine::Accumulator;

  __device__ __forceinline__ WarpWeights(const WalkParameters& p, device::Word16* vectors, int warp,
                                         int slice, int lane)
      : lane_(lane),
        // Of the slices of the sum, the last may be shorter or empty.
        first_state_(slice * p.state_slice),
        state_count_(max(0, min(p.state_slice, p.state_depth - first_state_))),
        first_input_(slice * p.input_slice),
        input_count_(max(0, min(p.input_slice, p.input_depth - first_input_))),
        state_slice_(p.state_slice),
        per_round_(p.state_slice + p.input_slice),
        vectors_(vectors + warp * p.shared_weight_tiles * Engine::kVectors * 32) {}

  // Of the row tile that this warp has in that round.
  __device__ __forceinline__ void load(const WalkParameters& p, const Recurrence& r, int round,
                                       int row_tile) {
    const MatrixView<T> hidden(r.weight_hidden, p.hidden_size, p.hidden_size);
    const int row = row_tile * Engine::kRows;
    if (round == 0) {
#pragma unroll
      for (int i = 0; i < Engine::kSizes.held_tiles; ++i) {
        if (i < state_count_) held_[i] = Engine::load(hidden, row, depth(first_state_ + i), lane_);
        device::sync_warp();  // one tile at a time, or addresses fill the registers
      }
    }
#pragma unroll 1
    for (int i = round == 0 ? Engine::kSizes.held_tiles : 0; i < state_count_; ++i)
      store(state_tile(round, i), Engine::load(hidden, row, depth(first_state_ + i), lane_));
    if (input_count_ > 0) {
      const MatrixView<T> input(r.weight_input, p.hidden_size, p.input_size);
#pragma unroll 1
      for (int i = 0; i < input_count_; ++i)
        store(input_tile(round, i), Engine::load(input, row, depth(first_input_ + i), lane_));
    }
  }

  // Adds W x and M s of this warp's slice; `state` and `input` are words of the column group.
  __device__ __forceinline__ void multiply(Accumulator& sum, int round, const uint32_t* state,
                                           int state_pitch, const uint32_t* input,
                                           int input_pitch) const {
    input += first_input_ * Engine::kSizes.words_per_depth_tile;
#pragma unroll 1
    for (int i = 0; i < input_count_; ++i)
      Engine::multiply(sum, shared(input_tile(round, i)),
                       input + i * Engine::kSizes.words_per_depth_tile, input_pitch, lane_);
    state += first_state_ * Engine::kSizes.words_per_depth_tile;
    if (round == 0) {
      // Every other tile into sums of its own, where a product would wait for the one before it.
      Accumulator odd;
#pragma unroll
      for (int i = 0; i < Engine::kSizes.held_tiles; ++i)
        if (i < state_count_)
          Engine::multiply(Engine::kChains > 1 && i % 2 == 1 ? odd : sum, held_[i],
                           state + i * Engine::kSizes.words_per_depth_tile, state_pitch, lane_);
      if constexpr (Engine::kChains > 1) Engine::add(sum, odd);
    }
#pragma unroll 1
    for (int i = round == 0 ? Engine::kSizes.held_tiles : 0; i < state_count_; ++i)
      Engine::multiply(sum, shared(state_tile(round, i)),
                       state + i * Engine::kSizes.words_per_depth_tile, state_pitch, lane_);
  }

 private:
  static __device__ __forceinline__ int depth(int tile) { return tile * Engine::kSizes.depth; }

  // Places in shared memory: of each round the state tiles, then the input tiles; those in
  // registers have none.
  __device__ __forceinline__ int held_places() const {
    return min(Engine::kSizes.held_tiles, state_slice_);
  }
  __device__ __forceinline__ int state_tile(int round, int i) const {
    return round * per_round_ + i - held_places();
  }
  __device__ __forceinline__ int input_tile(int round, int i) const {
    return state_tile(round, state_slice_ + i);
  }

  // Vector v of all lanes lies together, for conflict-free access.
  __device__ __forceinline__ void store(int tile, const Weights& w) {
#pragma unroll
    for (int v = 0; v < Engine::kVectors; ++v)
      vectors_[(tile * Engine::kVectors + v) * 32 + lane_] = w.vector[v];
  }
  __device__ __forceinline__ Weights shared(int tile) const {
    Weights w;
#pragma unroll
    for (int v = 0; v < Engine::kVectors; ++v)
      w.vector[v] = vectors_[(tile * Engine::kVectors + v) * 32 + lane_];
    return w;
  }

  int lane_, first_state_, state_count_, first_input_, input_count_, state_slice_, per_round_;
  device::Word16* vectors_;
  Weights held_[Engine::kSizes.held_tiles];
};

// What a lane adds to its sums, and what its epilogue reads. Read from device memory before the sum
// is computed, so that one hides the other.
template <class Engine>
struct Terms {
  using T = typename Engine::Element;
  float addend[Engine::kOutputs];
  float operand[Engine::kOutputs];

  __device__ __forceinline__ void read(const WalkParameters& p, const Recurrence& r,
                                       const TileInTime& tile, const Moment& moment, int row_tile,
                                       int group, int lane) {
#pragma unroll
    for (int i = 0; i < Engine::kOutputs; ++i) {
      addend[i] = operand[i] = 0;
      const int unit = row_tile * Engine::kRows + Engine::row(lane, i);
      const int sample = tile.sample(group * Engine::kColumns + Engine::column(lane, i));
      if (unit >= p.hidden_size || sample >= moment.active) continue;
      const auto value = [&](const Rows& rows) {
        return device::to_float(tile.find<T>(rows, moment.t, moment.row, sample)[unit]);
      };
      if (r.addend.data != nullptr) addend[i] = value(r.addend);
      if (r.bias != nullptr) addend[i] += static_cast<const float*>(r.bias)[unit];
      if (r.first_addend != nullptr && moment.is_first(r, sample))
        addend[i] += device::to_float(
            static_cast<const T*>(r.first_addend)[int64_t(sample) * p.hidden_size + unit]);
      if (r.operand.data != nullptr) operand[i] = value(r.operand);
    }
  }
};

template <class Engine, class Exchange>
class Walker {
 public:
  using T = typename Engine::Element;

  __device__ __forceinline__ Walker(const WalkParameters& p, const Recurrence& r, int tile,
                                    int rank, const BlockMemory& memory)
      : p_(p),
        r_(r),
        tile_(p, r, tile),
        exchange_(setup(p, tile, rank, tile_.steps(), memory)),
        input_(p, r, memory.inputs),
        lane_(threadIdx.x % 32),
        row_warp_(static_cast<int>(threadIdx.x) / 32 % p.row_warps),
        slice_(static_cast<int>(threadIdx.x) / 32 / p.row_warps),
        first_row_tile_(rank * p.block_row_tiles),
        my_row_tiles_(min(p.block_row_tiles, p.row_tiles - first_row_tile_)),
        weights_(p, memory.weights, static_cast<int>(threadIdx.x) / 32, slice_, lane_),
        partials_(memory.partials) {}

  __device__ __forceinline__ void run() {
    prepare();
#pragma unroll 1
    for (int step = 0; step < tile_.steps(); ++step) {
      const bool has_next = step + 1 < tile_.steps();
      const Moment moment(tile_, step);
      Terms<Engine> terms;
      if (finishes(0)) terms.read(p_, r_, tile_, moment, row_tile(0), 0, device::opaque(lane_));
      if (p_.input_depth > 0 && has_next) input_.fetch(tile_, step + 1);
      const uint32_t* state = exchange_.wait(step);
#pragma unroll 1
      for (int round = 0; round < p_.row_rounds; ++round) {
#pragma unroll 1
        for (int group = 0; group < p_.column_groups; ++group) {
          if (round + group > 0 && finishes(round))
            terms.read(p_, r_, tile_, moment, row_tile(round), group, device::opaque(lane_));
          float z[Engine::kOutputs];
          multiply(round, group, state, input_.words(step), z);
          if (p_.depth_split > 1) add_slices(z);
          if (finishes(round))
            finish(moment, round, group, terms, z, has_next, device::opaque(lane_));
        }
      }
      if (p_.input_depth > 0 && has_next) input_.store(tile_, step + 1);
      exchange_.published();
    }
    exchange_.end();
  }

 private:
  static __device__ __forceinline__ ExchangeSetup setup(const WalkParameters& p, int tile, int rank,
                                                        int steps, const BlockMemory& memory) {
    const int64_t place = blockIdx.y * p.batch_tiles + tile;
    ExchangeSetup setup;
    setup.shared_states = memory.states;
    setup.barriers = memory.barriers;
    setup.outbox = memory.outbox;
    setup.shared_pitch = static_cast<int>(p.layout.state_pitch);
    setup.outbox_pitch = static_cast<int>(p.layout.outbox_pitch);
    setup.columns = p.columns;
    setup.steps = steps;
    setup.blocks = p.blocks;
    constexpr int kWords = Engine::kSizes.words_per_row_tile;
    const int first_row_tile = rank * p.block_row_tiles;
    setup.first_word = first_row_tile * kWords;
    setup.own_words = min(p.block_row_tiles, p.row_tiles - first_row_tile) * kWords;
    setup.words = p.row_tiles * kWords;
    setup.counter = p.counters + place * (Workspace::kCounterBytes / 4);
    setup.states = p.states + place * Workspace::kStateBuffers * p.columns * p.state_words;
    setup.pitch = p.state_words;
    return setup;
  }

  // Whether this warp has a row tile in that round, and whether it is the one of the warps that
  // share it which applies the epilogue. The same for all lanes.
  __device__ __forceinline__ bool has_tile(int round) const {
    return round * p_.row_warps + row_warp_ < my_row_tiles_;
  }
  __device__ __forceinline__ bool finishes(int round) const {
    return slice_ == 0 && has_tile(round);
  }
  __device__ __forceinline__ int row_tile(int round) const {
    return first_row_tile_ + round * p_.row_warps + row_warp_;
  }

  // Weights, the initial state and the first input onto the chip.
  __device__ __forceinline__ void prepare() {
#pragma unroll 1
    for (int round = 0; round < p_.row_rounds; ++round)
      if (has_tile(round)) weights_.load(p_, r_, round, row_tile(round));
    const int pitch = static_cast<int>(p_.layout.state_pitch);
    for (int item = threadIdx.x; item < p_.columns * pitch; item += blockDim.x) {
      const int column = item / pitch, word = item % pitch, sample = tile_.sample(column);
      uint32_t value = 0;
      if (r_.initial != nullptr && sample < p_.batch) {
        const T* h = static_cast<const T*>(r_.initial) + int64_t(sample) * p_.hidden_size;
        value = Engine::word_of(FeatureView<T>{h, p_.hidden_size}, word);
      }
      exchange_.states(0)[item] = value;
      // Words that nobody publishes stay zero for good; zero times zero is no NaN.
      if (exchange_.states(1) != exchange_.states(0)) exchange_.states(1)[item] = 0;
    }
    if (p_.input_depth > 0) {
      input_.fetch(tile_, 0);
      input_.store(tile_, 0);
    }
    exchange_.begin();
  }

  __device__ __forceinline__ void multiply(int round, int group, const uint32_t* state,
                                           const uint32_t* input, float (&z)[Engine::kOutputs]) {
    typename Engine::Accumulator sum;
    if (has_tile(round)) {
      const int column = group * Engine::kColumns;
      weights_.multiply(sum, round, state + column * p_.layout.state_pitch, p_.layout.state_pitch,
                        input + column * p_.layout.input_pitch, p_.layout.input_pitch);
    }
    Engine::finish(sum, lane_, z);
  }

  // The warps that share a row tile hand their sums to the first of them. Two buffers in turn: one
  // barrier then also keeps the writers of the next sums apart from the reader of these.
  __device__ __forceinline__ void add_slices(float (&z)[Engine::kOutputs]) {
    const int slices = p_.depth_split - 1;
    float* buffer = partials_ + (turn_ * p_.row_warps + row_warp_) * slices * Engine::kOutputs * 32;
    turn_ ^= 1;
    if (slice_ > 0) {
#pragma unroll
      for (int i = 0; i < Engine::kOutputs; ++i)
        buffer[((slice_ - 1) * Engine::kOutputs + i) * 32 + lane_] = z[i];
    }
    device::sync_block();
    if (slice_ == 0) {
#pragma unroll 1
      for (int slice = 0; slice < slices; ++slice) {
#pragma unroll
        for (int i = 0; i < Engine::kOutputs; ++i)
          z[i] += buffer[(slice * Engine::kOutputs + i) * 32 + lane_];
      }
    }
  }

  __device__ __forceinline__ void finish(const Moment& moment, int round, int group,
                                         const Terms<Engine>& terms, float (&z)[Engine::kOutputs],
                                         bool has_next, int lane) {
    const int first_unit = row_tile(round) * Engine::kRows, first_column = group * Engine::kColumns;
    const bool skips_zero = r_.initial == nullptr && !r_.multiplies_zero_initial;
#pragma unroll
    for (int i = 0; i < Engine::kOutputs; ++i) {
      const int sample = tile_.sample(first_column + Engine::column(lane, i));
      // Only recurrences without input product skip M times nothing, so all of z is that.
      if (skips_zero && moment.is_first(r_, sample)) z[i] = 0;
      z[i] += terms.addend[i];
    }
    double* partials = p_.norm_parts[blockIdx.y];
    if (partials != nullptr)
      add_squares(partials + row_tile(round) * p_.total_rows, moment, first_unit, first_column, z,
                  lane);
    float s[Engine::kOutputs];
#pragma unroll
    for (int i = 0; i < Engine::kOutputs; ++i) {
      const int unit = first_unit + Engine::row(lane, i);
      const int sample = tile_.sample(first_column + Engine::column(lane, i));
      s[i] = new_state(moment, unit, sample, z[i], terms.operand[i], lane);
    }
    if (has_next && Engine::owns_outputs(lane)) {
      const int first_word = row_tile(round) * Engine::kSizes.words_per_row_tile;
      Engine::words_of(s, lane, [&](int column, int word, uint32_t value) {
        exchange_.publish(first_column + column, first_word + word, value);
      });
    }
  }

  // Applies the epilogue and stores. Of what is no sample or unit, the state is zero; a sample that
  // has not begun, in reverse, keeps its initial state, and one that has ended is read by nobody.
  __device__ __forceinline__ float new_state(const Moment& moment, int unit, int sample, float z,
                                             float operand, int lane) {
    if (unit >= p_.hidden_size || sample >= p_.batch) return 0;
    const int64_t place = int64_t(sample) * p_.hidden_size + unit;
    if (sample >= moment.active) {
      const bool begins_later = r_.reverse && r_.initial != nullptr;
      return begins_later ? device::to_float(static_cast<const T*>(r_.initial)[place]) : 0;
    }
    const T s = device::from_float<T>(apply_epilogue(r_.epilogue, z, operand));
    if (Engine::owns_outputs(lane)) {
      static_cast<T*>(r_.output)[(moment.row + sample) * p_.hidden_size + unit] = s;
      if (r_.last != nullptr && moment.is_last(r_, sample)) static_cast<T*>(r_.last)[place] = s;
    }
    return device::to_float(s);
  }

  __device__ __forceinline__ void add_squares(double* partials, const Moment& moment,
                                              int first_unit, int first_column,
                                              const float (&z)[Engine::kOutputs], int lane) {
    double square[Engine::kOutputs];
#pragma unroll
    for (int i = 0; i < Engine::kOutputs; ++i) {
      const bool inside = first_unit + Engine::row(lane, i) < p_.hidden_size;
      square[i] = inside ? double(z[i]) * double(z[i]) : 0.0;
    }
#pragma unroll
    for (int j = 0; j < Engine::kSums; ++j) {
      const double sum = Engine::sum_rows(square, j);
      const int sample = tile_.sample(first_column + Engine::sum_column(lane, j));
      if (Engine::writes_sum(lane) && sample < moment.active) partials[moment.row + sample] = sum;
    }
  }

  const WalkParameters& p_;
  const Recurrence& r_;
  TileInTime tile_;
  Exchange exchange_;
  InputStage<Engine> input_;
  int lane_, row_warp_, slice_, first_row_tile_, my_row_tiles_;
  WarpWeights<Engine> weights_;
  float* partials_;
  int turn_ = 0;
};

// Grid: x = batch tiles times blocks of a team, y = directions.
template <class Engine, class Exchange>
__global__ void __launch_bounds__(kMaxThreads, 1)
    walk_kernel(__grid_constant__ const WalkParameters p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (!Exchange::kCluster)
#endif
  {
    const Recurrence& r = p.walk.direction[blockIdx.y];
    const int tile = p.first_tile + static_cast<int>(blockIdx.x) / p.blocks;
    const int rank = static_cast<int>(blockIdx.x) % p.blocks;
    Walker<Engine, Exchange>(p, r, tile, rank, BlockMemory(p.layout)).run();
  }
}

}  // namespace cuda
}  // namespace rnn_cuda
