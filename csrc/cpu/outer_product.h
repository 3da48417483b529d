// Weight gradients: sums over many rows of outer products, left (rows, N)^T * right (rows, K).
#pragma once

#include <algorithm>

#include "product.h"

namespace rnn_cuda::cpu {

// One tile: adds sum_r left[r][i] * right[r][...] to Rows x Vectors elements. The sum over the rows
// starts at zero each time and is added at the end: a long sum in pieces rounds less.
template <class T, int Rows, int Vectors>
void outer_tile(const T* left, const T* right, int64_t right_stride, int64_t rows, T* total) {
  constexpr int64_t kWidth = Vectors * kLanes<T>;
  Vec<T> sum[Rows][Vectors] = {};
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    Vec<T> b[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) b[j] = load(right + j * right_stride);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const Vec<T> ai = broadcast(left[i]);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[i][j] += ai * b[j];
    }
    left += kLanes<T>;
    right += kLanes<T>;
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      T* const to = total + i * kWidth + j * kLanes<T>;
      store(to, load(to) + sum[i][j]);
    }
}

// The sum over all rows added so far, (left columns, right columns). It is kept in panels as packed
// matrices are, so that a tile is contiguous. Left columns are numbered from `first_left` on: a
// thread may keep a part of them only.
template <class T>
class OuterProduct {
 public:
  OuterProduct() = default;
  OuterProduct(int64_t first_left, int64_t end_left, int64_t right_columns)
      : first_left_(first_left), left_(end_left - first_left), panels_(right_columns, kVectors) {}

  int64_t size() const { return left_ * panels_.padded_columns(); }
  void start(T* total) {
    total_ = total;
    std::fill_n(total, size(), T(0));
  }

  // Adds the first `rows` rows.
  void add(const Strips<T>& left, const Strips<T>& right, int64_t rows) {
    for (int64_t p = 0; p < panels_.count(); ++p) {
      const int64_t column = panels_.first_column(p);
      const int vectors = panels_.vectors(p);
      const T* const b = right.at(0, column);
      T* const total = total_ + left_ * column;
      for (int64_t n = 0; n < left_;) {
        const int64_t lane = (first_left_ + n) % kLanes<T>;
        const int rows_of_tile = fitting(std::min(left_ - n, kLanes<T> - lane));
        const T* const a = left.at(0, first_left_ + n - lane) + lane;
        add_tile(rows_of_tile, vectors, a, b, right.stride, rows, total + n * vectors * kLanes<T>);
        n += rows_of_tile;
      }
    }
  }

  // Calls f(left column, right column, where in `total`) for the vectors of left columns
  // [first, end), which lie beside each other along the right columns.
  template <class F>
  void for_each(int64_t first, int64_t end, const F& f) const {
    for (int64_t p = 0; p < panels_.count(); ++p) {
      const int64_t column = panels_.first_column(p);
      const int64_t width = panels_.vectors(p) * kLanes<T>;
      for (int64_t n = first; n < end; ++n)
        for (int64_t j = 0; j < width; j += kLanes<T>)
          f(n, column + j, left_ * column + (n - first_left_) * width + j);
    }
  }

  const T* total() const { return total_; }
  int64_t first_left() const { return first_left_; }
  int64_t end_left() const { return first_left_ + left_; }

 private:
  static constexpr int kVectors = 3;
  static constexpr int kRows = kVectorRegisters == 32 ? 8 : 4;

  // Tiles have 1, 2, 4 or 8 rows.
  static int fitting(int64_t rows) {
    int fit = kRows;
    while (fit > rows) fit /= 2;
    return fit;
  }

  template <int Vectors>
  static void add_tile_of_width(int rows_of_tile, const T* a, const T* b, int64_t stride,
                                int64_t rows, T* total) {
    switch (rows_of_tile) {
      case 1: return outer_tile<T, 1, Vectors>(a, b, stride, rows, total);
      case 2: return outer_tile<T, 2, Vectors>(a, b, stride, rows, total);
      case 4: return outer_tile<T, 4, Vectors>(a, b, stride, rows, total);
      default: return outer_tile<T, kRows, Vectors>(a, b, stride, rows, total);
    }
  }

  static void add_tile(int rows_of_tile, int vectors, const T* a, const T* b, int64_t stride,
                       int64_t rows, T* total) {
    switch (vectors) {
      case 1: return add_tile_of_width<1>(rows_of_tile, a, b, stride, rows, total);
      case 2: return add_tile_of_width<2>(rows_of_tile, a, b, stride, rows, total);
      default: return add_tile_of_width<3>(rows_of_tile, a, b, stride, rows, total);
    }
  }

  int64_t first_left_ = 0, left_ = 0;
  Panels<T> panels_;
  T* total_ = nullptr;
};

}  // namespace rnn_cuda::cpu
