// out += a * packed: the matrix product of a few rows with a packed matrix, held in registers.
//
// A matrix (N, K) is packed into panels of a few vectors of columns n; within a panel, row k holds
// its columns side by side, so that the innermost loop reads it from front to back:
//
//   element (n, k) of panel p  ->  packed[K * first_column(p) + k * width(p) + n - first_column(p)]
//
// Every output element is summed over k in one order, whatever the tile, panel or thread count, so
// results do not depend on how the work was cut.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "../recurrence.h"
#include "vector.h"

namespace rnn_cuda::cpu {

constexpr int kMaxPanelVectors = kVectorRegisters == 32 ? 8 : 4;

constexpr int kMaxTileRows = 12;

// Rows of a tile: its accumulators, the shorter side of the outer product, and one more value fill
// the registers.
constexpr int max_tile_rows(int vectors) {
  int rows = 1;
  while (rows < kMaxTileRows &&
         (rows + 1) * vectors + std::min(rows + 1, vectors) + 1 <= kVectorRegisters)
    ++rows;
  return rows;
}

// How N columns are cut into panels of at most `max_vectors` vectors.
template <class T>
class Panels {
 public:
  Panels(int64_t columns, int max_vectors)
      : vectors_((columns + kLanes<T> - 1) / kLanes<T>),
        count_((vectors_ + max_vectors - 1) / max_vectors) {}

  int64_t count() const { return count_; }
  int64_t padded_columns() const { return vectors_ * kLanes<T>; }
  int64_t first_column(int64_t panel) const { return vectors_ * panel / count_ * kLanes<T>; }
  int vectors(int64_t panel) const {
    return static_cast<int>((first_column(panel + 1) - first_column(panel)) / kLanes<T>);
  }

 private:
  int64_t vectors_;
  int64_t count_;
};

// Few rows leave registers for wide panels; more rows reuse each panel element more often.
inline int panel_vectors_for_rows(int64_t rows) {
  const int narrow = kVectorRegisters == 32 ? 4 : 2;
  return rows < 4 ? kMaxPanelVectors : narrow;
}

// Packs panels [first, end) of the matrix (columns n, depth k).
template <class Storage, class T>
void pack(const Matrix& matrix, int64_t columns, int64_t depth, const Panels<T>& panels,
          int64_t first, int64_t end, T* packed) {
  constexpr int64_t kSide = kLanes<T>;
  const Storage* const from = static_cast<const Storage*>(matrix.data);
  for (int64_t p = first; p < end; ++p) {
    const int64_t n0 = panels.first_column(p), n1 = panels.first_column(p + 1);
    T* const to = packed + depth * n0;
    for (int64_t n = n0; n < n1; n += kSide) {
      T* const block = to + n - n0;
      if (matrix.transposed) {
        for (int64_t k = 0; k < depth; ++k)
          store<T>(block + k * (n1 - n0),
                   load_converted(from + k * matrix.stride + n, columns - n));
        continue;
      }
      for (int64_t k = 0; k < depth; k += kSide) {
        Vec<T> square[kSide];
        for (int64_t i = 0; i < kSide; ++i)
          square[i] = n + i < columns
                          ? load_converted(from + (n + i) * matrix.stride + k, depth - k)
                          : Vec<T>{};
        transpose<T>(square);
        for (int64_t i = 0; i < std::min(kSide, depth - k); ++i)
          store<T>(block + (k + i) * (n1 - n0), square[i]);
      }
    }
  }
}

template <class T, int Rows, int Vectors>
void tile(const T* a, int64_t lda, const T* panel, int64_t depth, T* out, int64_t ldo) {
  Vec<T> sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) sum[i][j] = load(out + i * ldo + j * kLanes<T>);
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    if constexpr (Rows >= Vectors) {
      Vec<T> b[Vectors];
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) b[j] = load(panel + j * kLanes<T>);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const Vec<T> ai = broadcast(a[i * lda + k]);
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) sum[i][j] += ai * b[j];
      }
    } else {
      Vec<T> ak[Rows];
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) ak[i] = broadcast(a[i * lda + k]);
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) {
        const Vec<T> b = load(panel + j * kLanes<T>);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) sum[i][j] += ak[i] * b;
      }
    }
    panel += Vectors * kLanes<T>;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) store(out + i * ldo + j * kLanes<T>, sum[i][j]);
}

template <class T>
using TileFunction = void (*)(const T*, int64_t, const T*, int64_t, T*, int64_t);

template <class T, int Vectors, int... RowsMinusOne>
constexpr std::array<TileFunction<T>, kMaxTileRows> tiles_of_width(
    std::integer_sequence<int, RowsMinusOne...>) {
  return {&tile<T, RowsMinusOne + 1, Vectors>...};
}

template <class T, int... VectorsMinusOne>
constexpr std::array<std::array<TileFunction<T>, kMaxTileRows>, sizeof...(VectorsMinusOne)>
all_tiles(std::integer_sequence<int, VectorsMinusOne...>) {
  return {tiles_of_width<T, VectorsMinusOne + 1>(
      std::make_integer_sequence<int, max_tile_rows(VectorsMinusOne + 1)>{})...};
}

// kTiles<T>[vectors - 1][rows - 1]
template <class T>
constexpr auto kTiles = all_tiles<T>(std::make_integer_sequence<int, kMaxPanelVectors>{});

// out (rows, padded columns) += a (rows, depth) * panels [first, end).
template <class T>
void add_product(const T* a, int64_t lda, int64_t rows, const T* packed, int64_t depth,
                 const Panels<T>& panels, int64_t first, int64_t end, T* out, int64_t ldo) {
  for (int64_t p = first; p < end; ++p) {
    const int64_t column = panels.first_column(p);
    const int vectors = panels.vectors(p);
    const int64_t blocks = (rows + max_tile_rows(vectors) - 1) / max_tile_rows(vectors);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = rows * block / blocks;
      const int64_t height = rows * (block + 1) / blocks - row;
      kTiles<T>[vectors - 1][height - 1](a + row* lda, lda, packed + depth* column, depth,
                                         out + row* ldo + column, ldo);
    }
  }
}

}  // namespace rnn_cuda::cpu
