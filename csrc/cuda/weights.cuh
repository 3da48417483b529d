// Where a warp keeps its weights, and the sums that it makes of them.
#pragma once

#include "engines.cuh"
#include "parameters.cuh"

namespace rnn_cuda {
namespace cuda {

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
      const auto add_held = [&](int i) {
        Engine::multiply(Engine::kChains > 1 && i % 2 == 1 ? odd : sum, held_[i],
                         state + i * Engine::kSizes.words_per_depth_tile, state_pitch, lane_);
      };
      // By groups: a branch around each tile would keep its reads from overlapping with the
      // products of the one before.
      constexpr int kGroup = 4;
#pragma unroll
      for (int first = 0; first < Engine::kSizes.held_tiles; first += kGroup) {
        const int end = min(first + kGroup, Engine::kSizes.held_tiles);
        if (end <= state_count_) {
#pragma unroll
          for (int i = first; i < end; ++i) add_held(i);
        } else {
#pragma unroll
          for (int i = first; i < end; ++i)
            if (i < state_count_) add_held(i);
        }
      }
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

}  // namespace cuda
}  // namespace rnn_cuda
