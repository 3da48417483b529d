// Weight gradients: sums over many rows of outer products, left (rows, N)^T * right (rows, K).
#pragma once

#include <algorithm>

#include "streamed.h"

namespace rnn_cuda::cpu {

// Rows of strips for sums over rows: each holds kRowsPer<R> of them, and the last maybe a row of
// zeros.
template <class R>
int64_t row_operands(int64_t rows) {
  return (rows + kRowsPer<R> - 1) / kRowsPer<R>;
}

// As `read_rows`, for sums over rows.
template <class Storage, class R, class RowAt>
void read_row_operands(int64_t rows, int64_t columns, const Strips<R>& to, const RowAt& row_at) {
  if constexpr (kRowsPer<R> == 1) {
    read_rows<Storage>(rows, columns, to, row_at);
  } else {
    for (int64_t row = 0; row < rows; row += 2) {
      const Storage* const first = row_at(row);
      const Storage* const second = row + 1 < rows ? row_at(row + 1) : nullptr;
      const auto load_of = [&](const Storage* from, int64_t k) {
        return from == nullptr ? Vec<float>{} : load_converted(from + k, columns - k);
      };
      R* strip = to.at(row / 2, 0);
      for (int64_t k = 0; k < columns; k += kLanes<R>, strip += to.stride)
        store<R>(strip, bit_cast<Vec<R>>(paired(load_of(first, k), load_of(second, k))));
    }
  }
}

// One tile: adds sum_r left[r][i] * right[r][...] to Rows x Vectors elements, or sets them. The sum
// over the rows starts at zero each time and is added at the end: a long sum in pieces rounds less.
template <class R, int Rows, int Vectors>
void outer_tile(const R* left, const R* right, int64_t right_stride, int64_t rows, bool adds,
                SumOf<R>* total) {
  using T = SumOf<R>;
  constexpr int64_t kWidth = Vectors * kLanes<T>;
  Vec<T> sum[Rows][Vectors] = {};
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    Vec<R> b[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) b[j] = load(right + j * right_stride);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const Vec<R> ai = broadcast(left[i]);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[i][j] = multiply_add(sum[i][j], ai, b[j]);
    }
    left += kLanes<R>;
    right += kLanes<R>;
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      T* const to = total + i * kWidth + j * kLanes<T>;
      store(to, adds ? load(to) + sum[i][j] : sum[i][j]);
    }
}

// The sum over all rows added so far, (left columns, right columns). It is kept in panels as packed
// matrices are, so that a tile is contiguous. Left columns are numbered from `first_left` on: a
// thread may keep a part of them only.
template <class R>
class OuterProduct {
  using T = SumOf<R>;

 public:
  OuterProduct() = default;
  OuterProduct(int64_t first_left, int64_t end_left, int64_t right_columns)
      : first_left_(first_left),
        left_(end_left - first_left),
        right_(right_columns),
        panels_(right_columns, kVectors) {}
  // For `compute_in_place` and `add_in_place`, with up to kStreamedRows left columns: all of a row
  // of the sum lies side by side.
  static OuterProduct in_place(int64_t first_left, int64_t end_left, int64_t right_columns) {
    OuterProduct product(first_left, end_left, right_columns);
    const auto vectors = (right_columns + kLanes<T> - 1) / kLanes<T>;
    product.panels_ = Panels<T>(right_columns, static_cast<int>(vectors));
    return product;
  }

  int64_t size() const { return left_ * panels_.padded_columns(); }
  void start(T* total) {
    total_ = total;
    std::fill_n(total, size(), T(0));
  }

  // Adds the first `rows` rows, of operands.
  void add(const Strips<R>& left, const Strips<R>& right, int64_t rows) {
    for_each_tile(left, right, /*row_major=*/false,
                  [&](int64_t p, int64_t n, int height, const Operands& operands) {
                    const int vectors = panels_.vectors(p);
                    add_tile(height, vectors, operands, rows, /*adds=*/true,
                             total_ + left_ * panels_.first_column(p) + n * vectors * kLanes<T>);
                  });
  }

  // Calls f(left column, right column, sum) for every vector of the first `rows` rows' sum, which
  // is kept nowhere.
  template <class F>
  void compute(const Strips<R>& left, const Strips<R>& right, int64_t rows, const F& f) const {
    alignas(kVectorBytes) T sums[kRows * kVectors * kLanes<T>];
    for_each_tile(left, right, /*row_major=*/true,
                  [&](int64_t p, int64_t n, int height, const Operands& operands) {
                    const int vectors = panels_.vectors(p);
                    add_tile(height, vectors, operands, rows, /*adds=*/false, sums);
                    for (int i = 0; i < height; ++i)
                      for (int j = 0; j < vectors; ++j)
                        f(first_left_ + n + i, panels_.first_column(p) + j * kLanes<T>,
                          load(sums + (i * vectors + j) * kLanes<T>));
                  });
  }

  // Writes the sum of so few rows that writing takes longest, in the order of memory: left column n
  // to matrix + n * columns, where `columns` are the right ones.
  static constexpr int64_t kRowsWritten = 2;
  template <class Storage>
  void write(const Strips<R>& left, const Strips<R>& right, int64_t rows, Storage* matrix,
             int64_t columns) const {
    for (int64_t n = first_left_; n < end_left(); ++n) {
      const Vec<R> first = broadcast(left.at(0, n)[0]);
      const Vec<R> second = rows > 1 ? broadcast(left.at(1, n)[0]) : Vec<R>{};
      Storage* const to = matrix + n * columns;
      const R* from = right.at(0, 0);
      for (int64_t k = 0; k < columns; k += kLanes<T>, from += right.stride) {
        Vec<T> sum = multiply_add(Vec<T>{}, first, load(from));
        if (rows > 1) sum = multiply_add(sum, second, load(from + kLanes<T>));
        store_converted(to + k, sum, columns - k);
      }
    }
  }

  // As `compute`, but the right rows are used as a tensor stores them, row r at right_row(r):
  // copying them to strips would take longest. `sums` has kSumsBytes.
  template <class RightRow, class F>
  void compute_in_place(const Strips<T>& left, const RightRow& right_row, int64_t rows, T* sums,
                        const F& f) const {
    for (int64_t k = 0; k < right_; k += kStreamedColumns<T>) {
      const int64_t columns = std::min(kStreamedColumns<T>, right_ - k),
                    width = padded_to_vectors<T>(columns);
      std::fill_n(sums, left_ * width, T(0));
      const auto add = [&]<int Left>(std::integral_constant<int, Left>) {
        add_scaled_rows<Left>(
            rows, columns, [&](int64_t i, int64_t r) { return left.at(r, first_left_ + i)[0]; },
            [&](int64_t r) { return right_row(r) + k; }, sums, width);
      };
      static_assert(kStreamedRows == 4);
      switch (left_) {
        case 1: add(std::integral_constant<int, 1>()); break;
        case 2: add(std::integral_constant<int, 2>()); break;
        case 3: add(std::integral_constant<int, 3>()); break;
        case 4: add(std::integral_constant<int, 4>()); break;
      }
      for (int64_t n = 0; n < left_; ++n)
        for (int64_t j = 0; j < width; j += kLanes<T>)
          f(first_left_ + n, k + j, load(sums + n * width + j));
    }
  }

  template <class RightRow>
  void add_in_place(const Strips<T>& left, const RightRow& right_row, int64_t rows, T* sums) {
    compute_in_place(left, right_row, rows, sums, [&](int64_t n, int64_t k, Vec<T> sum) {
      T* const to = total_ + (n - first_left_) * panels_.padded_columns() + k;
      store<T>(to, load(to) + sum);
    });
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

  struct Operands {
    const R* left;
    const R* right;
    int64_t right_stride;
  };

  // Calls f(right panel, first left column - first_left, left columns, operands) for all tiles:
  // panel by panel as the totals lie in memory, or as a row-major matrix does.
  template <class F>
  void for_each_tile(const Strips<R>& left, const Strips<R>& right, bool row_major,
                     const F& f) const {
    const auto tile_at = [&](int64_t p, int64_t n) {
      const int64_t lane = (first_left_ + n) % kLanes<T>;
      const int height = fitting(std::min(left_ - n, kLanes<T> - lane));
      f(p, n, height,
        Operands{left.at(0, first_left_ + n - lane) + lane, right.at(0, panels_.first_column(p)),
                 right.stride});
      return height;
    };
    if (panels_.count() == 0) return;
    if (row_major) {
      for (int64_t n = 0, height = 0; n < left_; n += height)
        for (int64_t p = 0; p < panels_.count(); ++p) height = tile_at(p, n);
    } else {
      for (int64_t p = 0; p < panels_.count(); ++p)
        for (int64_t n = 0; n < left_;) n += tile_at(p, n);
    }
  }

  // Tiles have 1, 2, 4 or 8 rows.
  static int fitting(int64_t rows) {
    int fit = kRows;
    while (fit > rows) fit /= 2;
    return fit;
  }

  template <int Vectors>
  static void add_tile_of_width(int height, const Operands& o, int64_t rows, bool adds, T* total) {
    switch (height) {
      case 1: return outer_tile<R, 1, Vectors>(o.left, o.right, o.right_stride, rows, adds, total);
      case 2: return outer_tile<R, 2, Vectors>(o.left, o.right, o.right_stride, rows, adds, total);
      case 4: return outer_tile<R, 4, Vectors>(o.left, o.right, o.right_stride, rows, adds, total);
      default:
        return outer_tile<R, kRows, Vectors>(o.left, o.right, o.right_stride, rows, adds, total);
    }
  }

  static void add_tile(int height, int vectors, const Operands& operands, int64_t rows, bool adds,
                       T* total) {
    switch (vectors) {
      case 1: return add_tile_of_width<1>(height, operands, rows, adds, total);
      case 2: return add_tile_of_width<2>(height, operands, rows, adds, total);
      default: return add_tile_of_width<3>(height, operands, rows, adds, total);
    }
  }

  int64_t first_left_ = 0, left_ = 0, right_ = 0;
  Panels<T> panels_;
  T* total_ = nullptr;
};

}  // namespace rnn_cuda::cpu
