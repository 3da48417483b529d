// The Euclidean norm of a row, in double, down to where the row's own values vanish.
//
// Squares vanish at half the range of their type: of floats as floats below 1e-23, of doubles below
// 1e-162. So floats are squared as doubles, and doubles, where the squares come near their limits,
// in units of the row's largest value.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "vector.h"

namespace rnn_cuda::cpu {

// A vector of doubles from as many values.
inline Vec<double> load_wide(const float* from) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm256_loadu_ps(from));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm_loadu_ps(from));
#else
  Vec<double> v;
  for (int i = 0; i < kLanes<double>; ++i) v[i] = from[i];
  return v;
#endif
}
inline Vec<double> load_wide(const double* from) { return load(from); }

// The sum of f(values) over a row, in an order that depends on nothing but `count`. f(0) must be 0.
template <class T, class F>
inline double sum_over_row(const T* row, int64_t count, const F& f) {
  constexpr int64_t kSums = 4, kWidth = kLanes<double>;
  Vec<double> sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums * kWidth <= count; k += kSums * kWidth)
    for (int64_t j = 0; j < kSums; ++j) sums[j] += f(load_wide(row + k + j * kWidth));
  for (; k < count; k += kWidth) {
    // What lies behind the row is not read: 0 * Inf makes a NaN of a product's padding.
    T rest[kWidth] = {};
    std::copy_n(row + k, std::min(kWidth, count - k), rest);
    sums[0] += f(load_wide(rest));
  }
  const Vec<double> total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0;
  for (int lane = 0; lane < kLanes<double>; ++lane) sum += total[lane];
  return sum;
}

template <class T>
double row_norm(const T* row, int64_t count) {
  const double squares = sum_over_row(row, count, [](Vec<double> v) { return v * v; });
  if constexpr (std::is_same_v<T, double>) {
    // Above this, what squares lost at the lower end is far below an ulp of their sum.
    constexpr double kSmallest = 0x1p-900;
    if (squares < kSmallest || squares == std::numeric_limits<double>::infinity()) {
      double largest = 0;
      for (int64_t k = 0; k < count; ++k) largest = std::max(largest, std::abs(row[k]));
      if (largest == 0 || largest == std::numeric_limits<double>::infinity()) return largest;
      const double scaled = sum_over_row(row, count, [&](Vec<double> v) {
        v /= largest;
        return v * v;
      });
      return largest * std::sqrt(scaled);
    }
  }
  return std::sqrt(squares);
}

}  // namespace rnn_cuda::cpu
