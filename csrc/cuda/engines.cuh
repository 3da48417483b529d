// How a warp multiplies. An engine knows which lane holds which part of a tile of weights, of the
// states, and of the result; the rest of the kernel does not.
//
// One tile of weights is kRows hidden units by kDepth terms of the sum. States travel as 32-bit
// words, so arranged that a lane publishes what it computed without asking another one, and that a
// warp reads what it needs without bank conflicts.
//
//   Weights           a lane's share of a tile, kVectors x 16 bytes
//   Accumulator       a lane's share of the running sums of kRows x kColumns
//   raw_word()        what a word is made of, as it lies in memory; word_of() makes the word of it
//   finish()          sums over lanes; the kOutputs values that a lane has then form kShares of
//                     kShareSamples x kShareUnits, see share.cuh
#pragma once

#include <type_traits>

#include "device.h"
#include "engine_table.h"

namespace rnn_cuda {
namespace cuda {

// A row-major or transposed matrix, zero outside.
template <class T>
struct MatrixView {
  const T* data;
  int64_t row_stride, column_stride;
  int rows, columns;

  __device__ __forceinline__ MatrixView(const Matrix& m, int rows, int columns)
      : data(static_cast<const T*>(m.data)),
        row_stride(m.transposed ? 1 : m.stride),
        column_stride(m.transposed ? m.stride : 1),
        rows(rows),
        columns(columns) {}

  __device__ __forceinline__ T operator()(int row, int column) const {
    const bool inside = row < rows && column < columns;
    return inside ? data[row * row_stride + column * column_stride] : device::from_float<T>(0.0f);
  }
};

// A row of features, zero past its end.
template <class T>
struct FeatureView {
  const T* data;
  int size;

  __device__ __forceinline__ T operator()(int feature) const {
    return feature < size ? data[feature] : device::from_float<T>(0.0f);
  }
};

// ---- float32 by fused multiply-add --------------------------------------------------------------

// Lane l takes the terms k = l of each depth tile, for all rows of the row tile. Each state that it
// reads is thus used kRows times, and each weight kColumns times.
template <int kColumns_>
struct FMA {
  static_assert(kColumns_ == 1 || kColumns_ == 4, "one sum for each lane, or four lanes a sum");
  using Element = float;
  static constexpr Engine kSizes = fma_engine(kColumns_);
  static constexpr int kColumns = kColumns_;
  static constexpr int kRows = kSizes.rows;
  static constexpr int kVectors = kSizes.weight_bytes / 32 / 16;
  static constexpr int kChains = 1;  // the sums of a lane are many enough
  static constexpr int kLanesPerOutput = kColumns == 1 ? 2 : 1;
  static constexpr int kOutputs = kLanesPerOutput * kRows * kColumns / 32;

  struct Weights {
    device::Word16 vector[kVectors];
  };
  struct Accumulator {
    float sum[kColumns * kRows] = {};
  };

  static __device__ __forceinline__ Weights load(const MatrixView<float>& m, int row, int k,
                                                 int lane) {
    Weights w;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      w.vector[i / 4].word[i % 4] = device::bits_of(m(row + i, k + lane));
    return w;
  }

  // `words`: of this depth tile, of the group's first sample.
  static __device__ __forceinline__ void multiply(Accumulator& a, const Weights& w,
                                                  const uint32_t* words, int pitch, int lane) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float state = device::float_of(words[c * pitch + lane]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float weight = device::float_of(w.vector[i / 4].word[i % 4]);
        a.sum[c * kRows + i] = fmaf(weight, state, a.sum[c * kRows + i]);
      }
    }
  }

  static __device__ __forceinline__ void finish(Accumulator& a, int lane, float (&z)[kOutputs]) {
    sum_over_lanes<kColumns * kRows, 16>(a.sum, lane);
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) z[i] = a.sum[i];
  }

  // One column: lanes 2 j and 2 j + 1 both have unit j. Four: lane 8 c + j has sample c, units 2 j
  // and 2 j + 1, each a share.
  static constexpr int kShares = kOutputs, kShareSamples = 1, kShareUnits = 1, kUnitStep = 1;
  static __device__ __forceinline__ constexpr int share(int i) { return i; }
  static __device__ __forceinline__ constexpr int output(int share, int, int) { return share; }
  static __device__ __forceinline__ int unit(int lane, int share) {
    return kColumns == 1 ? lane >> 1 : (lane & 7) * 2 + share;
  }
  static __device__ __forceinline__ int column(int lane, int, int) {
    return kColumns == 1 ? 0 : lane >> 3;
  }
  static __device__ __forceinline__ bool owns_outputs(int lane) {
    return lane % kLanesPerOutput == 0;
  }

  template <class Publish>
  static __device__ __forceinline__ void words_of(const float (&s)[1][1], int share, int lane,
                                                  Publish&& publish) {
    publish(column(lane, share, 0), unit(lane, share), device::bits_of(s[0][0]));
  }
  using RawWord = float;
  static __device__ __forceinline__ float raw_word(const FeatureView<float>& features, int word) {
    return features(word);
  }
  static __device__ __forceinline__ uint32_t word_of(float raw) { return device::bits_of(raw); }

  static __device__ __forceinline__ constexpr int norm_part(int share) { return share; }
  static __device__ __forceinline__ double sum_units(double sum) {
#pragma unroll
    for (int distance = kLanesPerOutput; distance < 32 / kColumns; distance *= 2)
      sum += device::shuffle_xor(sum, distance);
    return sum;
  }
  static __device__ __forceinline__ bool has_sum(int lane) { return lane % (32 / kColumns) == 0; }

 private:
  // Each lane has kCount sums, each of which is to be added up over all lanes. By halving: a lane
  // gives away half of its sums and adds what it gets to the other half, 63 exchanges for 64 sums
  // instead of 320. When one is left, the lanes that share it add up theirs.
  template <int kCount, int kDistance>
  static __device__ __forceinline__ void sum_over_lanes(float* sums, int lane) {
    if constexpr (kDistance > 0) {
      if constexpr (kCount == 1) {
        sums[0] += device::shuffle_xor(sums[0], kDistance);
      } else {
        const bool upper = (lane & kDistance) != 0;
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
          const float given = upper ? sums[i] : sums[i + kCount / 2];
          const float kept = upper ? sums[i + kCount / 2] : sums[i];
          sums[i] = kept + device::shuffle_xor(given, kDistance);
        }
      }
      sum_over_lanes<(kCount > 1 ? kCount / 2 : 1), kDistance / 2>(sums, lane);
    }
  }
};

// ---- tensor cores -------------------------------------------------------------------------------

// What the fragments of mma.sync.m16n8 have in common. A row tile is two of its 16 rows, so that
// what a warp reads of the states serves two products. Lane l = 4 g + q holds, of each product's 16
// units by 8 samples: (unit g, sample 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1).
//
// `Derived` has the product, one mma.sync.
template <class Derived, int kColumns_>
struct TensorCoreFragments {
  static_assert(kColumns_ % 8 == 0, "a product takes eight samples");
  static constexpr int kColumns = kColumns_;
  static constexpr int kRows = 32;
  static constexpr int kVectors = 2;
  static constexpr int kOutputs = kColumns;

  struct Weights {
    device::Word16 vector[kVectors];
  };
  struct Accumulator {
    float sum[kColumns / 8][2][4] = {};
  };

  // word(unit, term): what a fragment holds of that unit's terms from that one on.
  template <class Word>
  static __device__ __forceinline__ Weights load(int row, int k, int lane, Word&& word) {
    const int g = lane >> 2, q = lane & 3;
    Weights w;
#pragma unroll
    for (int i = 0; i < 4 * kVectors; ++i) {
      const int unit = row + g + (i & 1) * 8 + (i >> 2) * 16, term = k + q + (i >> 1 & 1) * 4;
      w.vector[i / 4].word[i % 4] = word(unit, term);
    }
    return w;
  }

  static __device__ __forceinline__ void multiply(Accumulator& a, const Weights& w,
                                                  const uint32_t* words, int pitch, int lane) {
    const uint32_t* mine = words + (lane >> 2) * pitch + (lane & 3);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const uint32_t state[2] = {mine[n * 8 * pitch], mine[n * 8 * pitch + 4]};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) Derived::product(a.sum[n][v], w.vector[v].word, state);
    }
  }

  // A product takes far longer than it keeps the tensor cores busy.
  static constexpr int kChains = kColumns == 8 ? 2 : 1;
  static __device__ __forceinline__ void add(Accumulator& a, const Accumulator& b) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i)
      a.sum[i / 8][i / 4 % 2][i % 4] += b.sum[i / 8][i / 4 % 2][i % 4];
  }

  static __device__ __forceinline__ void finish(const Accumulator& a, int, float (&z)[kOutputs]) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) z[i] = a.sum[i / 8][i / 4 % 2][i % 4];
  }

  // A share is one product: two units by two samples.
  static constexpr int kShares = kOutputs / 4, kShareSamples = 2, kShareUnits = 2, kUnitStep = 8;
  static __device__ __forceinline__ constexpr int share(int i) { return i / 4; }
  static __device__ __forceinline__ constexpr int output(int share, int j, int u) {
    return share * 4 + u * 2 + j;
  }
  static __device__ __forceinline__ int unit(int lane, int share) {
    return (lane >> 2) + share % 2 * 16;
  }
  static __device__ __forceinline__ int column(int lane, int share, int j) {
    return share / 2 * 8 + 2 * (lane & 3) + j;
  }
  static __device__ __forceinline__ bool owns_outputs(int) { return true; }

  static __device__ __forceinline__ constexpr int norm_part(int share) { return share % 2; }
  static __device__ __forceinline__ double sum_units(double sum) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) sum += device::shuffle_xor(sum, distance);
    return sum;
  }
  static __device__ __forceinline__ bool has_sum(int lane) { return lane < 4; }
};

// bfloat16 or float16, sums in float32. A word holds two units of a depth tile, p and p + 8, since
// those are what one lane computes; the product sums over k in any order, so its fragments take
// k = 2p, 2p + 1 to mean just these.
template <class T, int kColumns_>
struct TensorCore : TensorCoreFragments<TensorCore<T, kColumns_>, kColumns_> {
  using Base = TensorCoreFragments<TensorCore<T, kColumns_>, kColumns_>;
  using Element = T;
  using Base::kColumns;
  using Base::kOutputs;
  using Base::kVectors;
  using typename Base::Accumulator;
  using typename Base::Weights;
  static constexpr Engine kSizes = tensor_core_engine(kColumns_);

  static __device__ __forceinline__ Weights load(const MatrixView<T>& m, int row, int k, int lane) {
    return Base::load(row, k, lane, [&](int unit, int term) {
      return device::pack(m(unit, term), m(unit, term + 8));
    });
  }

  static __device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, device::bfloat16>)
      device::mma_bf16(d, a, b);
    else
      device::mma_f16(d, a, b);
  }

  template <class Publish>
  static __device__ __forceinline__ void words_of(const float (&s)[2][2], int share, int lane,
                                                  Publish&& publish) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
      publish(Base::column(lane, share, j), (lane >> 2) + share % 2 * 8,
              device::pack(device::from_float<T>(s[j][0]), device::from_float<T>(s[j][1])));
  }
  struct RawWord {
    T low = {}, high = {};
  };
  static __device__ __forceinline__ RawWord raw_word(const FeatureView<T>& features, int word) {
    const int first = word / 8 * 16 + word % 8;
    return {features(first), features(first + 8)};
  }
  static __device__ __forceinline__ uint32_t word_of(RawWord raw) {
    return device::pack(raw.low, raw.high);
  }
};

// float32 rounded to TF32 before each product.
template <int kColumns_>
struct TensorCoreTF32 : TensorCoreFragments<TensorCoreTF32<kColumns_>, kColumns_> {
  using Base = TensorCoreFragments<TensorCoreTF32<kColumns_>, kColumns_>;
  using Element = float;
  using Base::kColumns;
  using Base::kOutputs;
  using Base::kVectors;
  using typename Base::Accumulator;
  using typename Base::Weights;
  static constexpr Engine kSizes = tensor_core_tf32_engine(kColumns_);

  static __device__ __forceinline__ Weights load(const MatrixView<float>& m, int row, int k,
                                                 int lane) {
    return Base::load(row, k, lane,
                      [&](int unit, int term) { return device::round_to_tf32(m(unit, term)); });
  }

  static __device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
    device::mma_tf32(d, a, b);
  }

  template <class Publish>
  static __device__ __forceinline__ void words_of(const float (&s)[2][2], int share, int lane,
                                                  Publish&& publish) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int u = 0; u < 2; ++u)
        publish(Base::column(lane, share, j), Base::unit(lane, share) + u * Base::kUnitStep,
                device::round_to_tf32(s[j][u]));
    }
  }
  using RawWord = float;
  static __device__ __forceinline__ float raw_word(const FeatureView<float>& features, int word) {
    return features(word);
  }
  static __device__ __forceinline__ uint32_t word_of(float raw) {
    return device::round_to_tf32(raw);
  }
};

}  // namespace cuda
}  // namespace rnn_cuda
