// Counts that follow from a plan and sizes: how many tiles, words and bytes.
#include <algorithm>

#include "cuda/engine_table.h"
#include "cuda/layout.h"
#include "cuda/walk.h"

namespace rnn_cuda {
namespace cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t aligned(int64_t bytes) {
  return ceil_div(bytes, Workspace::kAlignment) * Workspace::kAlignment;
}

Engine engine_of(const Problem& problem, const Plan& plan) {
  if (plan.residency == Residency::Streamed) return {};
  return cuda::engine_of(problem.dtype, plan.arithmetic, plan.engine_columns);
}

}  // namespace

Engine engine_of(ScalarType dtype, Arithmetic arithmetic, int engine_columns) {
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Float16;
  const bool float32 = dtype == ScalarType::Float32;
  switch (arithmetic) {
    case Arithmetic::FMA:
      if (float32 && (engine_columns == 1 || engine_columns == 4))
        return fma_engine(engine_columns);
      break;
    case Arithmetic::TensorCore:
      if (half && (engine_columns == 8 || engine_columns == 32))
        return tensor_core_engine(engine_columns);
      break;
    case Arithmetic::TensorCoreTF32:
      if (float32 && (engine_columns == 8 || engine_columns == 32))
        return tensor_core_tf32_engine(engine_columns);
      break;
  }
  return {};
}

Geometry Geometry::of(const Problem& problem, const Plan& plan) {
  const Engine engine = engine_of(problem, plan);
  Geometry g;
  if (engine.rows == 0) return g;
  const int64_t hidden = problem.hidden_size;
  const int64_t input = plan.fuse_input ? problem.input_size : 0;
  g.row_tiles = ceil_div(hidden, engine.rows);
  g.block_row_tiles = ceil_div(g.row_tiles, plan.blocks);
  g.blocks = ceil_div(g.row_tiles, g.block_row_tiles);
  g.row_rounds = ceil_div(g.block_row_tiles, plan.row_warps);
  g.state_depth = ceil_div(hidden, engine.depth);
  g.input_depth = ceil_div(input, engine.depth);
  g.state_slice = ceil_div(g.state_depth, plan.depth_split);
  g.input_slice = ceil_div(g.input_depth, plan.depth_split);
  g.state_words = std::max(g.row_tiles * engine.words_per_row_tile,
                           g.state_depth * engine.words_per_depth_tile);
  g.input_words = g.input_depth * engine.words_per_depth_tile;
  g.batch_tiles = ceil_div(problem.batch, plan.columns);
  g.shared_weight_tiles = g.row_rounds * (g.state_slice + g.input_slice) -
                          std::min<int64_t>(engine.held_tiles, g.state_slice);
  return g;
}

int64_t shared_bytes_of(const Problem& problem, const Plan& plan) {
  const Engine engine = engine_of(problem, plan);
  if (engine.rows == 0) return 0;
  return Layout::of(engine, Geometry::of(problem, plan), BlockShape::of(plan)).bytes;
}

Workspace Workspace::of(const Problem& problem, const Plan& plan, int64_t total_rows, bool norms) {
  const Geometry g = Geometry::of(problem, plan);
  Workspace w;
  if (g.row_tiles == 0) return w;
  const int64_t teams = g.batch_tiles * problem.directions;
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = end;
    end += aligned(bytes);
    return begin;
  };
  const bool grid = plan.residency == Residency::Grid;
  w.counters = take(grid ? teams * kCounterBytes : 0);
  w.states = take(grid ? teams * kStateBuffers * plan.columns * g.state_words * 4 : 0);
  const int64_t norm_parts = problem.directions * g.row_tiles * engine_of(problem, plan).norm_parts;
  w.norm_parts = take(norms ? norm_parts * total_rows * 8 : 0);
  w.bytes = end;
  return w;
}

int64_t workspace_of(const Problem& problem, const Plan& plan, int64_t total_rows, bool norms) {
  return Workspace::of(problem, plan, total_rows, norms).bytes;
}

}  // namespace cuda
}  // namespace rnn_cuda
