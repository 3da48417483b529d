// The sizes of each engine, in one place for the planner and for the kernels. Plain C++.
#pragma once

#include "walk.h"

namespace rnn_cuda {
namespace cuda {

// So that a thread may have 255 registers: what a warp needs besides its weights is then paid for
// by eight warps of a multiprocessor, not by sixteen.
constexpr int kMaxThreads = 256;

constexpr Engine make_engine(int rows, int depth, int words_per_row_tile, int words_per_depth_tile,
                             int held_tiles, int norm_parts) {
  Engine engine;
  engine.rows = rows;
  engine.depth = depth;
  engine.words_per_row_tile = words_per_row_tile;
  engine.words_per_depth_tile = words_per_depth_tile;
  // A word of 32 bits carries a float32, or two of the half types.
  engine.weight_bytes = 4 * rows * words_per_depth_tile;
  engine.held_tiles = held_tiles;
  engine.norm_parts = norm_parts;
  return engine;
}

// Held tiles: as many as leave no register spilled on any architecture, see
// `python -m rnn_cuda.build --check-cuda`.
constexpr Engine fma_engine(int columns) {
  return make_engine(16, 32, 16, 32, columns == 1 ? 8 : 5, columns == 1 ? 1 : 2);
}
constexpr Engine tensor_core_engine(int columns) {
  return make_engine(32, 16, 16, 8, columns == 8 ? 15 : 6, 2);
}
constexpr Engine tensor_core_tf32_engine(int columns) {
  return make_engine(32, 8, 32, 8, columns == 8 ? 16 : 6, 2);
}

}  // namespace cuda
}  // namespace rnn_cuda
