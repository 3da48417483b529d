// Products of a few rows with a packed matrix, in register tiles.
//
// What changes from step to step (states, inputs) lies in strips of one vector of columns:
//
//   element (row, column)  ->  data[column / L * stride + row * L + column % L]     L = lanes
//
// so that one layout serves as the left side of a product (walk along a row) and of the outer
// products of the weight gradients (walk down a column), at any width.
//
// A matrix (N, K) that stays is packed into panels of a few vectors of columns n; within a panel,
// row k holds its columns side by side, so that the innermost loop reads it from front to back:
//
//   element (n, k) of panel p  ->  packed[K * first_column(p) + k * width(p) + n - first_column(p)]
//
// Every output element is summed over k in ascending order by one accumulator, whatever the tile,
// panel or thread count, so results do not depend on how the work was cut. (`dot`, which is chosen
// by I and H alone, has an order of its own.)
#pragma once

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "../recurrence.h"
#include "cache.h"
#include "vector.h"

namespace rnn_cuda::cpu {

template <class E>
struct Strips {
  E* data = nullptr;
  int64_t stride = 0;

  // An odd number of vectors apart, strips do not crowd into the same cache sets.
  static int64_t stride_for(int64_t rows) { return (rows | 1) * kLanes<E>; }
  // Of so many values.
  static int64_t size_for(int64_t rows, int64_t columns) {
    return (operands<E>(columns) + kLanes<E> - 1) / kLanes<E> * stride_for(rows);
  }

  Strips from_row(int64_t row) const { return {data + row * kLanes<E>, stride}; }

  // `column` is the first of a vector of values.
  E* at(int64_t row, int64_t column) const {
    const auto operand = static_cast<uint64_t>(column) / kValuesPer<E>;  // unsigned: a mere shift
    return data + static_cast<int64_t>(operand / kLanes<E>) * stride + row * kLanes<E> +
           operand % kLanes<E>;
  }
};

// Copies rows as a tensor stores them, or zeros where there are none, to rows of strips: several at
// once, as a strip holds a row in pieces far apart from each other.
template <class Storage, class E, class RowAt>
void read_rows(int64_t rows, int64_t columns, const Strips<E>& to, const RowAt& row_at) {
  constexpr int64_t kRows = 8;
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t count = std::min(kRows, rows - first);
    const Storage* from[kRows];
    for (int64_t i = 0; i < count; ++i) from[i] = row_at(first + i);
    E* strip = to.at(first, 0);
    for (int64_t k = 0; k < columns; k += kValuesPer<E> * kLanes<E>, strip += to.stride)
      for (int64_t i = 0; i < count; ++i)
        store<E>(strip + i * kLanes<E>,
                 from[i] == nullptr ? Vec<E>{} : load_operands<E>(from[i] + k, columns - k));
  }
}

template <class T>
int64_t padded_to_vectors(int64_t columns) {
  return (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

constexpr int kMaxPanelVectors = 8;

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

// How the columns of N units are cut into panels. A vector of units has `sums` vectors of columns,
// side by side and in one panel. A panel has at most `max_vectors` vectors, if not of one vector of
// units; the number of panels is a multiple of `multiple` where there are enough vectors for that.
template <class T>
class Panels {
 public:
  Panels() = default;
  Panels(int64_t units, int max_vectors, int64_t multiple = 1, int sums = 1) {
    const int64_t vectors = (units + kLanes<T> - 1) / kLanes<T>;
    const int64_t most = std::max(max_vectors / sums, 1);  // vectors of units in a panel
    const int64_t least = (vectors + most - 1) / most;
    const int64_t count = std::min(vectors, (least + multiple - 1) / multiple * multiple);
    for (int64_t p = 1; p <= count; ++p)
      first_columns_.push_back(vectors * p / count * sums * kLanes<T>);
  }

  int64_t count() const { return static_cast<int64_t>(first_columns_.size()) - 1; }
  int64_t padded_columns() const { return first_columns_.back(); }
  int64_t first_column(int64_t panel) const { return first_columns_[panel]; }
  int vectors(int64_t panel) const {
    return static_cast<int>((first_columns_[panel + 1] - first_columns_[panel]) / kLanes<T>);
  }

 private:
  std::vector<int64_t> first_columns_ = {0};  // and behind the last panel its end
};

// A row as a tensor stores it times one padded to whole vectors.
template <class Storage, class T>
T dot(const Storage* x, const T* padded, int64_t columns) {
  constexpr int64_t kSums = 4;
  Vec<T> sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums * kLanes<T> <= columns; k += kSums * kLanes<T>)
    for (int64_t j = 0; j < kSums; ++j)
      sums[j] +=
          load_converted(x + k + j * kLanes<T>, kLanes<T>) * load(padded + k + j * kLanes<T>);
  for (; k < columns; k += kLanes<T>)
    sums[0] += load_converted(x + k, columns - k) * load(padded + k);
  const Vec<T> total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  T sum = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) sum += total[lane];
  return sum;
}

// The width of panels, in vectors, that keeps most accumulators busy: few rows leave registers for
// wide panels; more rows reuse each panel element more often. Not one vector, whose tiles would
// load a value for each multiply-add.
inline int panel_vectors_for_rows(int64_t rows) {
  if (kVectorRegisters == 32) return rows < 4 ? kMaxPanelVectors : 4;
  int best = 2;
  double most = 0;
  for (int vectors = 2; vectors <= kMaxPanelVectors; ++vectors) {
    const int64_t blocks = (rows + max_tile_rows(vectors) - 1) / max_tile_rows(vectors);
    const double accumulators = static_cast<double>(rows * vectors) / static_cast<double>(blocks);
    if (accumulators > most) best = vectors, most = accumulators;
  }
  return best;
}

// How many values ahead a matrix is asked for while it is packed.
constexpr int64_t kPrefetched = 128;

// Packs a vector of `columns` columns of a panel: those of the matrix from column n on, and of
// these `depth` values from k on.
template <class Storage, class E>
inline void pack_columns(const Matrix& matrix, int64_t n, int64_t columns, int64_t first_k,
                         int64_t depth, E* block, int64_t width) {
  constexpr int64_t kSide = kLanes<E>, kValues = kValuesPer<E>;
  const Storage* const from = static_cast<const Storage*>(matrix.data) +
                              (matrix.transposed ? first_k * matrix.stride : first_k);
  if (matrix.transposed) {
    for (int64_t k = 0; k < depth; k += kValues, block += width)
      store<E>(block, load_operands_across<E>(from + k * matrix.stride + n, matrix.stride,
                                              depth - k, columns));
    return;
  }
  for (int64_t k = 0; k < depth; k += kValues * kSide) {
    Vec<E> square[kSide];
    for (int64_t i = 0; i < kSide; ++i) {
      const Storage* const row = from + (n + i) * matrix.stride + k;
      prefetch_to_read(row + kPrefetched);
      square[i] = i < columns ? load_operands<E>(row, depth - k) : Vec<E>{};
    }
    transpose<E>(square);
    for (int64_t i = 0; i < std::min(kSide, operands<E>(depth - k)); ++i, block += width)
      store<E>(block, square[i]);
  }
}

// How the rows of a matrix, value by value of `units` units each, become columns of panels, where a
// vector of units has `sums` vectors of columns. Its last `apart` values are the last of those; the
// ones before them get nothing from this matrix.
struct Gates {
  int64_t units;
  int sums = 1, apart = 0;

  // Which value of a unit a vector of columns is; -1: none.
  int value(int64_t vector) const {
    const int value = static_cast<int>(vector % sums);
    if (value >= sums - apart) return value - apart;
    return value < sums - 2 * apart ? value : -1;
  }
};

// Packs panels [first, end) of the matrix. Its columns k are `published` values of `depth` units;
// each value's begin at a whole vector.
template <class Storage, class E>
void pack(const Matrix& matrix, const Gates& gates, int64_t depth, const Panels<SumOf<E>>& panels,
          int64_t first, int64_t end, E* packed, int published = 1) {
  constexpr int64_t kSide = kLanes<E>;
  const int64_t padded = padded_to_vectors<SumOf<E>>(depth);
  const int64_t panel_depth = operands<E>((published - 1) * padded + depth);
  for (int64_t p = first; p < end; ++p) {
    const int64_t n0 = panels.first_column(p), width = panels.first_column(p + 1) - n0;
    E* const panel = packed + panel_depth * n0;
    if (published > 1 || gates.apart > 0) std::fill_n(panel, panel_depth * width, E(0));
    for (int64_t n = n0; n < n0 + width; n += kSide) {
      const int64_t vector = n / kSide, unit = vector / gates.sums * kSide;
      const int value = gates.value(vector);
      for (int q = 0; q < published && value >= 0; ++q)
        pack_columns<Storage>(matrix, value * gates.units + unit, gates.units - unit, q * depth,
                              depth, panel + operands<E>(q * padded) * width + n - n0, width);
    }
  }
}

// How many rows of a panel, at most, stay in a near cache beside what is multiplied with them: the
// first-level one, or with 32 registers, whose tiles do more with each vector they load, the
// second. Where that is nearly all of them, all.
template <class E>
constexpr int64_t panel_block_depth(int64_t depth, int64_t width) {
  constexpr int64_t kBlockBytes = kVectorRegisters == 32 ? 256 << 10 : 16 << 10;
  const int64_t block =
      kBlockBytes / (width * static_cast<int64_t>(sizeof(E))) / kLanes<E> * kLanes<E>;
  return 2 * depth > 3 * block ? block : std::max<int64_t>(depth, 1);
}

// Whether rows [first, end) of a matrix as it lies, of `size` values each, have neither an Inf nor
// a NaN. Goes along several rows at once: the memory delivers several streams faster than one.
template <class Storage>
bool is_finite(const Matrix& matrix, int64_t size, int64_t first, int64_t end) {
  using T = typename ComputeOf<Storage>::type;
  constexpr int64_t kRows = 4;
  const int64_t stride = matrix.stride;
  Vec<T> sums[kRows] = {};
  for (int64_t row = first; row < end; row += kRows) {
    const Storage* from[kRows];
    for (int64_t i = 0; i < kRows; ++i)
      from[i] = static_cast<const Storage*>(matrix.data) + std::min(row + i, end - 1) * stride;
    const auto add = [&](int64_t k, int64_t count) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRows; ++i) sums[i] += load_converted(from[i] + k, count) * T(0);
    };
    int64_t k = 0;
    for (; k + 2 * kLanes<T> <= size; k += 2 * kLanes<T>) {
      add(k, kLanes<T>);
      add(k + kLanes<T>, kLanes<T>);
    }
    for (; k < size; k += kLanes<T>) add(k, size - k);
  }
  Vec<T> sum{};
  for (int64_t i = 0; i < kRows; ++i) sum += sums[i];
  const auto is_zero = sum == T(0);
  for (int lane = 0; lane < kLanes<T>; ++lane)
    if (!is_zero[lane]) return false;
  return true;
}

// Sums of so many bytes are finished together, from the first-level cache.
constexpr int64_t kSumsBytes = 8 << 10;

// A product inside a tile: rows of strips from `rows` on, times a panel.
template <class E>
struct Factors {
  const E* rows;
  int64_t strip_stride;
  const E* panel;
  int64_t depth;  // in operands
};

// out = init + the sum of the products, of which there is at least one.
template <class E>
struct TileArguments {
  const SumOf<E>* init;
  int64_t init_stride;
  Factors<E> products[2];
  int product_count;
  SumOf<E>* out;
  int64_t out_stride;
};

// One step of the innermost loop: sum += (column of a) * (row k of the panel).
template <class E, int Rows, int Vectors>
inline __attribute__((always_inline)) void add_outer(Vec<SumOf<E>> (&sum)[Rows][Vectors],
                                                     const E* a, const E* panel) {
  if constexpr (Rows >= Vectors) {
    Vec<E> b[Vectors];
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) b[j] = load(panel + j * kLanes<E>);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec<E> ai = broadcast(a[i * kLanes<E>]);
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) sum[i][j] = multiply_add(sum[i][j], ai, b[j]);
    }
  } else {
    Vec<E> ai[Rows];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) ai[i] = broadcast(a[i * kLanes<E>]);
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) {
      const Vec<E> b = load(panel + j * kLanes<E>);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) sum[i][j] = multiply_add(sum[i][j], ai[i], b);
    }
  }
}

template <class E, int Rows, int Vectors>
void tile(const TileArguments<E>& arguments) {
  using T = SumOf<E>;
  constexpr int64_t kWidth = Vectors * kLanes<E>;
  Vec<T> sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j)
      sum[i][j] = load(arguments.init + i * arguments.init_stride + j * kLanes<T>);
  int p = 0;
  do {
    const auto [rows, strip_stride, first_row, depth] = arguments.products[p];
    const E* a = rows;
    const E* panel = first_row;
    for (int64_t strip = depth / kLanes<E>; strip > 0; --strip, a += strip_stride)
#pragma GCC unroll 4
      for (int64_t k = 0; k < kLanes<E>; ++k, panel += kWidth)
        add_outer<E, Rows, Vectors>(sum, a + k, panel);
    for (int64_t k = 0; k < depth % kLanes<E>; ++k, panel += kWidth)
      add_outer<E, Rows, Vectors>(sum, a + k, panel);
  } while (++p < arguments.product_count);
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j)
      store(arguments.out + i * arguments.out_stride + j * kLanes<T>, sum[i][j]);
}

template <class T>
using TileFunction = void (*)(const TileArguments<T>&);

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

// Calls f(first row, rows) for blocks of rows as even as they can be, none above a tile's height.
template <class F>
void for_row_blocks(int64_t rows, int vectors, const F& f) {
  if (rows <= 0) return;
  const int64_t blocks = (rows + max_tile_rows(vectors) - 1) / max_tile_rows(vectors);
  const int64_t least = rows / blocks, higher = rows % blocks;
  int64_t row = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t height = least + (block < higher);
    f(row, height);
    row += height;
  }
}

// out (rows, width of a panel) = init + left * panel. A panel that is larger than the first-level
// cache is used in blocks of its rows.
template <class E>
void multiply_panel(const Strips<E>& left, int64_t rows, const E* panel, int vectors, int64_t depth,
                    const SumOf<E>* init, int64_t init_stride, SumOf<E>* out, int64_t out_stride) {
  const int64_t width = vectors * kLanes<E>;
  const int64_t block = rows > max_tile_rows(vectors) ? panel_block_depth<E>(depth, width) : depth;
  int64_t k = 0;
  do {
    for_row_blocks(rows, vectors, [&](int64_t row, int64_t height) {
      kTiles<E>[vectors - 1][height - 1](
          {k == 0 ? init + row * init_stride : out + row * out_stride,
           k == 0 ? init_stride : out_stride,
           {{left.data + row * kLanes<E> + k / kLanes<E> * left.stride, left.stride,
             panel + k * width, std::min(block, depth - k)}},
           1,
           out + row * out_stride,
           out_stride});
    });
    k += block;
  } while (k < depth);
}

}  // namespace rnn_cuda::cpu
