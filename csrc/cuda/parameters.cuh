// The parameters of a persistent kernel, and where things lie in memory and in time.
#pragma once

#include "device.h"
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
  double* norm_parts[2];  // [row_tiles * norm parts][total_rows]; null: not wanted
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
    const int64_t first = row_starts_ != nullptr ? row * rows.batch_stride : t * rows.time_stride;
    return static_cast<const T*>(rows.data) + first + sample * rows.batch_stride;
  }

 private:
  const int64_t* batch_sizes_;
  const int64_t* row_starts_;
  bool reverse_;
  int time_steps_, batch_, first_, steps_;
};

// One time step of a tile.
struct TimeStep {
  int t, active, active_after;
  int64_t row;

  __device__ __forceinline__ TimeStep(const TileInTime& tile, int step)
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

}  // namespace cuda
}  // namespace rnn_cuda
