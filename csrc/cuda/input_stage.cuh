// The input of the next step, where W x is computed inside of the kernel.
#pragma once

#include "engines.cuh"
#include "parameters.cuh"

namespace rnn_cuda {
namespace cuda {

// Brings x into shared memory a step ahead: read from device memory as one step ends, into
// registers, and stored as the next one ends, so that nobody waits for it.
template <class Engine>
class InputStage {
 public:
  using T = typename Engine::Element;

  __device__ __forceinline__ InputStage(const WalkParameters& p, const Recurrence& r,
                                        uint32_t* words)
      : p_(p),
        r_(r),
        words_(words),
        words_per_sample_(p.input_depth * Engine::kSizes.words_per_depth_tile),
        count_(p.columns * words_per_sample_) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int item = threadIdx.x + i * blockDim.x;
      column_[i] = item < count_ ? item / words_per_sample_ : -1;
      word_[i] = item < count_ ? item % words_per_sample_ : 0;
    }
  }

  __device__ __forceinline__ uint32_t* words(int step) const {
    return words_ + (step & 1) * p_.columns * static_cast<int>(p_.layout.input_pitch);
  }

  __device__ __forceinline__ void fetch(const TileInTime& tile, const TimeStep& time_step) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (column_[i] >= 0) held_[i] = read(tile, time_step, column_[i], word_[i]);
  }

  __device__ __forceinline__ void store(const TileInTime& tile, const TimeStep& time_step,
                                        int step) {
    const int pitch = static_cast<int>(p_.layout.input_pitch);
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (column_[i] >= 0) words(step)[column_[i] * pitch + word_[i]] = Engine::word_of(held_[i]);
    // More than a thread likes to hold.
    for (int item = threadIdx.x + kHeld * blockDim.x; item < count_; item += blockDim.x) {
      const int column = item / words_per_sample_, word = item % words_per_sample_;
      words(step)[column * pitch + word] = Engine::word_of(read(tile, time_step, column, word));
    }
  }

 private:
  static constexpr int kHeld = 2;

  using Raw = typename Engine::RawWord;

  __device__ __forceinline__ Raw read(const TileInTime& tile, const TimeStep& time_step, int column,
                                      int word) const {
    const int sample = tile.sample(column);
    if (sample >= time_step.active) return Raw();
    const T* x = tile.find<T>(r_.input, time_step.t, time_step.row, sample);
    return Engine::raw_word(FeatureView<T>{x, p_.input_size}, word);
  }

  const WalkParameters& p_;
  const Recurrence& r_;
  uint32_t* words_;
  int words_per_sample_, count_;
  int column_[kHeld], word_[kHeld];  // of what this thread holds; column -1: nothing
  Raw held_[kHeld];
};

}  // namespace cuda
}  // namespace rnn_cuda
