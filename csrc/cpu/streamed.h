// Products with a matrix that is read once or twice. It is used where it lies, as fast as the
// memory delivers it: packing all of it would read it, write it and read it again.
//
// Every sum goes over k in ascending order by one accumulator, as in register tiles: the same bits.
#pragma once

#include <algorithm>

#include "product.h"

namespace rnn_cuda::cpu {

// Up to so many rows are multiplied with the matrix on its way from the memory. More of them should
// share the work of rearranging it.
constexpr int64_t kStreamedRows = 4;

// Whether rows of such operands are.
template <class E>
constexpr bool can_stream(int64_t rows) {
  return rows <= kStreamedRows && kValuesPer<E> == 1;
}

// How many values ahead a row of the matrix is asked for, where too many rows take turns for the
// processor to notice them.
constexpr int64_t kStreamedAhead = 64;

// sums (Rows, columns) += the sum over k < depth of value_at(row, k) * the row that begins at
// row_at(k), as tensors store it. Vectors of sums lie `spread` vectors apart.
template <int Rows, class T, class ValueAt, class RowAt>
void add_scaled_rows(int64_t depth, int64_t columns, const ValueAt& value_at, const RowAt& row_at,
                     T* sums, int64_t sums_stride, int64_t spread = 1) {
  // `Depth` rows at a time: for as many products, each sum is read and written once.
  const auto add = [&]<int Depth>(int64_t k, std::integral_constant<int, Depth>) {
    decltype(row_at(k)) from[Depth];
    Vec<T> values[Depth][Rows];
    for (int j = 0; j < Depth; ++j) {
      from[j] = row_at(k + j);
      for (int i = 0; i < Rows; ++i) values[j][i] = broadcast(value_at(i, k + j));
    }
    for (int64_t n = 0; n < columns; n += kLanes<T>) {
      Vec<T> sum[Rows];
      for (int i = 0; i < Rows; ++i) sum[i] = load(sums + i * sums_stride + n * spread);
      for (int j = 0; j < Depth; ++j) {
        const Vec<T> b = load_converted(from[j] + n, columns - n);
        for (int i = 0; i < Rows; ++i) sum[i] = multiply_add(sum[i], values[j][i], b);
      }
      for (int i = 0; i < Rows; ++i) store<T>(sums + i * sums_stride + n * spread, sum[i]);
    }
  };
  constexpr int kDepth = kVectorRegisters / 2 / Rows;
  int64_t k = 0;
  for (; k + kDepth <= depth; k += kDepth) add(k, std::integral_constant<int, kDepth>());
  for (; k < depth; ++k) add(k, std::integral_constant<int, 1>());
}

// sums (Rows, columns) += left * a matrix whose columns n lie beside each other.
template <class Storage, int Rows, class T>
void add_streamed_rows(const Strips<T>& left, const Matrix& matrix, int64_t column, int64_t columns,
                       int64_t depth, T* sums, int64_t sums_stride, int64_t spread) {
  const Storage* const data = static_cast<const Storage*>(matrix.data) + column;
  add_scaled_rows<Rows>(
      depth, columns, [&](int64_t i, int64_t k) { return left.at(i, k)[0]; },
      [&](int64_t k) { return data + k * matrix.stride; }, sums, sums_stride, spread);
}

// The same with a matrix whose columns n lie a stride apart: squares of it are transposed in
// registers. All of a cache line is used at once: where the stride is a power of two, few lines of
// that many rows stay in the first-level cache.
template <class Storage, int Rows, class T>
void add_streamed_columns(const Strips<T>& left, const Matrix& matrix, int64_t column,
                          int64_t columns, int64_t depth, T* sums, int64_t sums_stride,
                          int64_t spread) {
  constexpr int64_t kSide = kLanes<T>;
  constexpr int64_t kLine =
      std::max<int64_t>(kCacheLineBytes / static_cast<int64_t>(sizeof(Storage)), kSide);
  const Storage* const data = static_cast<const Storage*>(matrix.data) + column * matrix.stride;
  for (int64_t n = 0; n < columns; n += kSide) {
    const Storage* const from = data + n * matrix.stride;
    const int64_t height = std::min(columns - n, kSide);
    Vec<T> sum[Rows];
    for (int i = 0; i < Rows; ++i) sum[i] = load(sums + i * sums_stride + n * spread);
    const auto add_square = [&](int64_t k, int64_t width) {
      Vec<T> square[kSide];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; ++i)
        square[i] = i < height ? load_converted(from + i * matrix.stride + k, width) : Vec<T>{};
      transpose<T>(square);
      const T* const values = left.at(0, k);
#pragma GCC unroll 16
      for (int64_t j = 0; j < kSide; ++j) {
        if (j >= width) break;
        for (int i = 0; i < Rows; ++i)
          sum[i] = multiply_add(sum[i], square[j], broadcast(values[i * kSide + j]));
      }
    };
    int64_t k = 0;
    if (height == kSide)
      for (; k + kLine <= depth; k += kLine) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < kSide; ++i)
          prefetch_to_read(from + i * matrix.stride + k + kStreamedAhead);
#pragma GCC unroll 4
        for (int64_t j = 0; j < kLine; j += kSide) add_square(k + j, kSide);
      }
    for (; k < depth; k += kSide) add_square(k, depth - k);
    for (int i = 0; i < Rows; ++i) store<T>(sums + i * sums_stride + n * spread, sum[i]);
  }
}

template <class Storage, int Rows, class T>
void add_streamed(const Strips<T>& left, const Matrix& matrix, int64_t column, int64_t columns,
                  int64_t depth, T* sums, int64_t sums_stride, int64_t spread) {
  if (matrix.transposed)
    add_streamed_rows<Storage, Rows>(left, matrix, column, columns, depth, sums, sums_stride,
                                     spread);
  else
    add_streamed_columns<Storage, Rows>(left, matrix, column, columns, depth, sums, sums_stride,
                                        spread);
}

// The sums of kStreamedRows rows of so many columns are worked on at once.
template <class T>
constexpr int64_t kStreamedColumns = kSumsBytes / static_cast<int64_t>(sizeof(T)) / kStreamedRows;

// sums (rows, columns padded to whole vectors) += the first rows of left * columns [column, column
// + columns) of the matrix, if can_stream<E>(rows). Vectors of sums lie `spread` vectors apart.
template <class Storage, class E>
void add_streamed_product(const Strips<E>& left, int64_t rows, const Matrix& matrix, int64_t column,
                          int64_t columns, int64_t depth, SumOf<E>* sums, int64_t sums_stride,
                          int64_t spread = 1) {
  static_assert(kStreamedRows == 4);
  if constexpr (kValuesPer<E> == 1) {
    switch (rows) {
      case 1:
        return add_streamed<Storage, 1>(left, matrix, column, columns, depth, sums, sums_stride,
                                        spread);
      case 2:
        return add_streamed<Storage, 2>(left, matrix, column, columns, depth, sums, sums_stride,
                                        spread);
      case 3:
        return add_streamed<Storage, 3>(left, matrix, column, columns, depth, sums, sums_stride,
                                        spread);
      case 4:
        return add_streamed<Storage, 4>(left, matrix, column, columns, depth, sums, sums_stride,
                                        spread);
    }
  }
}

// More rows: the matrix is packed in blocks of so many of its rows, which are used from the
// first-level cache.
constexpr int64_t kBlockDepth = 256;

// sums (rows, width of panel p) += left * panel p of the matrix. `block` has room for kBlockDepth
// rows of the panel.
template <class Storage, class E>
void add_product_in_blocks(const Strips<E>& left, int64_t rows, const Matrix& matrix,
                           const Gates& gates, int64_t depth, const Panels<SumOf<E>>& panels,
                           int64_t p, E* block, SumOf<E>* sums) {
  const int64_t column = panels.first_column(p);
  const int vectors = panels.vectors(p);
  const int64_t width = vectors * kLanes<E>;
  for (int64_t k = 0; k < depth; k += kBlockDepth) {
    const int64_t block_depth = std::min(kBlockDepth, depth - k);
    const Matrix part = {
        static_cast<const Storage*>(matrix.data) + k * (matrix.transposed ? matrix.stride : 1),
        matrix.stride, matrix.transposed};
    pack<Storage>(part, gates, block_depth, panels, p, p + 1,
                  block - operands<E>(block_depth) * column);
    multiply_panel(Strips<E>{left.at(0, k), left.stride}, rows, block, vectors,
                   operands<E>(block_depth), sums, width, sums, width);
  }
}

}  // namespace rnn_cuda::cpu
