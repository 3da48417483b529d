// The persistent kernel: all time steps of a recurrence in one launch, its matrix on chip.
//
// A team of blocks owns a batch tile, `columns` samples, for the whole sequence. Each block owns
// some row tiles of hidden units, and its warps form a grid: `row_warps` that take different row
// tiles, times `depth_split` that share a row tile and take different terms of its sum. Tiles of
// weights stay where they are for all steps: a warp's first ones in its registers, the others in
// shared memory. A step is: wait for the states, multiply, apply the epilogue, store, publish.
#pragma once

#include "exchanges.cuh"
#include "input_stage.cuh"
#include "share.cuh"
#include "weights.cuh"

namespace rnn_cuda {
namespace cuda {

template <class Engine, class Exchange>
class Walker {
 public:
  using T = typename Engine::Element;
  using Values = typename Share<Engine>::Values;
  using Terms = typename Share<Engine>::Terms;

  __device__ __forceinline__ Walker(const WalkParameters& p, const Recurrence& r, int tile,
                                    int rank, const BlockMemory& memory)
      : p_(p),
        r_(r),
        tile_(p, r, tile),
        exchange_(exchange_setup(p, Engine::kSizes.words_per_row_tile, tile, rank, tile_.steps(),
                                 memory)),
        input_(p, r, memory.inputs),
        lane_(threadIdx.x % 32),
        row_warp_(static_cast<int>(threadIdx.x) / 32 % p.row_warps),
        slice_(static_cast<int>(threadIdx.x) / 32 / p.row_warps),
        first_row_tile_(rank * p.block_row_tiles),
        my_row_tiles_(min(p.block_row_tiles, p.row_tiles - first_row_tile_)),
        weights_(p, memory.weights, static_cast<int>(threadIdx.x) / 32, slice_, lane_),
        partials_(memory.partials) {
    for (int share = slice_; share < Engine::kShares; share += p.depth_split)
      my_shares_ |= 1u << share;
  }

  __device__ __forceinline__ void run() {
    prepare();
#pragma unroll 1
    for (int step = 0; step < tile_.steps(); ++step) {
      const bool has_next = step + 1 < tile_.steps();
      const TimeStep time_step(tile_, step);
      Terms terms[Engine::kShares];
      if (has_tile(0)) read_terms(time_step, 0, 0, terms);
      const uint32_t* state = exchange_.wait(step);
#pragma unroll 1
      for (int round = 0; round < p_.row_rounds; ++round) {
#pragma unroll 1
        for (int group = 0; group < p_.column_groups; ++group) {
          if (round + group > 0 && has_tile(round)) read_terms(time_step, round, group, terms);
          float z[Engine::kOutputs];
          multiply(round, group, state, input_.words(step), z);
          if (p_.depth_split > 1) add_slices(round, z);
          if (has_tile(round)) finish(time_step, round, group, terms, z, has_next);
        }
      }
      if (p_.input_depth > 0 && has_next) stage_input(step + 1);
      exchange_.published();
    }
    exchange_.end();
  }

 private:
  // Whether this warp has a row tile in that round: the same for all its lanes.
  __device__ __forceinline__ bool has_tile(int round) const {
    return round * p_.row_warps + row_warp_ < my_row_tiles_;
  }
  __device__ __forceinline__ int row_tile(int round) const {
    return first_row_tile_ + round * p_.row_warps + row_warp_;
  }
  // Whether this is the one of the warps with a row tile that finishes that share of its outputs.
  __device__ __forceinline__ bool is_mine(int share) const {
    return (my_shares_ >> share & 1u) != 0;
  }
  __device__ __forceinline__ Share<Engine> share_of(const TimeStep& time_step, int round, int group,
                                                    int share, int lane) const {
    return Share<Engine>(p_, r_, tile_, time_step, row_tile(round), group * Engine::kColumns, share,
                         lane);
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
        value = Engine::word_of(Engine::raw_word(FeatureView<T>{h, p_.hidden_size}, word));
      }
      exchange_.states(0)[item] = value;
      // Words that nobody publishes stay zero for good; zero times zero is no NaN.
      if (exchange_.states(1) != exchange_.states(0)) exchange_.states(1)[item] = 0;
    }
    if (p_.input_depth > 0) {
      input_.fetch(tile_, TimeStep(tile_, 0));
      stage_input(0);
    }
    exchange_.begin();
  }

  // Stores the input of that step, and asks for the one after it: it has a whole step to come.
  __device__ __forceinline__ void stage_input(int step) {
    input_.store(tile_, TimeStep(tile_, step), step);
    if (step + 1 < tile_.steps()) input_.fetch(tile_, TimeStep(tile_, step + 1));
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

  // Of the sums of a row tile, each warp that has a slice hands on those that others finish, and
  // adds theirs to its own in a fixed order. Two buffers in turn: one barrier then also keeps the
  // writers of the next sums apart from the readers of these.
  __device__ __forceinline__ void add_slices(int round, float (&z)[Engine::kOutputs]) {
    constexpr int kSliceSize = Engine::kOutputs * 32;
    float* const buffer =
        partials_ + (turn_ * p_.row_warps + row_warp_) * p_.depth_split * kSliceSize + lane_;
    turn_ ^= 1;
    if (has_tile(round)) {
#pragma unroll
      for (int i = 0; i < Engine::kOutputs; ++i)
        if (!is_mine(Engine::share(i))) buffer[slice_ * kSliceSize + i * 32] = z[i];
    }
    device::sync_block();
    if (!has_tile(round)) return;
#pragma unroll 1
    for (int slice = 0; slice < p_.depth_split; ++slice) {
      if (slice == slice_) continue;
#pragma unroll
      for (int i = 0; i < Engine::kOutputs; ++i)
        if (is_mine(Engine::share(i))) z[i] += buffer[slice * kSliceSize + i * 32];
    }
  }

  // What the epilogue needs besides the sums. Read before they are computed, so that one hides the
  // other. (The lane is opaque here and below: addresses that were kept for all steps would fill
  // the registers, which are for weights.)
  __device__ __forceinline__ void read_terms(const TimeStep& time_step, int round, int group,
                                             Terms (&terms)[Engine::kShares]) const {
    const int lane = device::opaque(lane_);
#pragma unroll
    for (int share = 0; share < Engine::kShares; ++share)
      if (is_mine(share)) share_of(time_step, round, group, share, lane).read(terms[share]);
  }

  __device__ __forceinline__ void finish(const TimeStep& time_step, int round, int group,
                                         const Terms (&terms)[Engine::kShares],
                                         const float (&sums)[Engine::kOutputs], bool has_next) {
    const int lane = device::opaque(lane_);
    double* const parts = p_.norm_parts[blockIdx.y];
#pragma unroll
    for (int share = 0; share < Engine::kShares; ++share) {
      if (!is_mine(share)) continue;
      const Share<Engine> mine = share_of(time_step, round, group, share, lane);
      Values z;
#pragma unroll
      for (int j = 0; j < Engine::kShareSamples; ++j) {
#pragma unroll
        for (int u = 0; u < Engine::kShareUnits; ++u) z[j][u] = sums[Engine::output(share, j, u)];
      }
      mine.add_terms(z, terms[share]);
      if (parts != nullptr) {
        const int part = row_tile(round) * Engine::kSizes.norm_parts + Engine::norm_part(share);
        mine.write_squares(parts + part * p_.total_rows, z);
      }
      mine.finish(z, terms[share]);
      if (has_next && Engine::owns_outputs(lane)) {
        const int first_word = row_tile(round) * Engine::kSizes.words_per_row_tile;
        Engine::words_of(z, share, lane, [&](int column, int word, uint32_t value) {
          exchange_.publish(group * Engine::kColumns + column, first_word + word, value);
        });
      }
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
  unsigned my_shares_ = 0;
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
