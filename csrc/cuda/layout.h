// Where a block's arrays lie in its shared memory: one function for the host, which asks for the
// bytes, and for the kernels, which ask for the places, so that the two cannot disagree.
//
//   barriers | weight tiles of each warp | states | outbox | inputs | partial sums of split depth
#pragma once

#include <cstdint>

#include "walk.h"

namespace rnn_cuda {
namespace cuda {

// The numbers of a plan that a layout needs, without the words.
struct BlockShape {
  int columns = 1, engine_columns = 1, row_warps = 1, depth_split = 1;
  int state_buffers = 2;    // Residency::Grid stages the states into one
  bool has_outbox = false;  // Residency::Cluster

  static BlockShape of(const Plan& plan) {
    return {plan.columns,
            plan.engine_columns,
            plan.row_warps,
            plan.depth_split,
            plan.residency == Residency::Grid ? 1 : 2,
            plan.residency == Residency::Cluster};
  }
};

struct Layout {
  static constexpr int kBarriers = 2, kBarrierBytes = 8, kInputBuffers = 2, kPartialBuffers = 2;
  static constexpr int kLanes = 32;
  static constexpr int kAlignment = 16;  // of every array, in bytes

  // Offsets in bytes.
  uint32_t barriers = 0;
  uint32_t weights = 0;   // [row_warps * depth_split][shared_weight_tiles] tiles
  uint32_t states = 0;    // [state_buffers][columns][state_pitch] words
  uint32_t outbox = 0;    // [columns][outbox_pitch] words: a block's own new states, to be sent
  uint32_t inputs = 0;    // [kInputBuffers][columns][input_pitch] words
  uint32_t partials = 0;  // [kPartialBuffers][row_warps][depth_split][sums_per_lane][kLanes] floats
  uint32_t bytes = 0;     // of all
  // In 32-bit words.
  uint32_t state_pitch = 0;
  uint32_t outbox_pitch = 0;
  uint32_t input_pitch = 0;
  uint32_t sums_per_lane = 0;  // of a warp's tile of rows by engine_columns

  // Samples follow one another at 4 words modulo 8. Then the eight samples and four words of a
  // sample that a warp reads at once for a tensor-core product lie in 32 different banks.
  static constexpr uint32_t pitch_of(int64_t words) {
    return static_cast<uint32_t>((words + 7) / 8 * 8 + 4);
  }

  static constexpr Layout of(const Engine& engine, const Geometry& geometry,
                             const BlockShape& shape) {
    Layout layout;
    const int64_t warps = shape.row_warps * shape.depth_split;
    layout.state_pitch = pitch_of(geometry.state_words);
    layout.input_pitch = geometry.input_depth == 0 ? 0 : pitch_of(geometry.input_words);
    const int sums = engine.rows * shape.engine_columns;
    layout.sums_per_lane = static_cast<uint32_t>((sums + kLanes - 1) / kLanes);
    int64_t end = 0;
    layout.barriers = take(end, kBarriers * kBarrierBytes);
    layout.weights = take(end, warps * geometry.shared_weight_tiles * engine.weight_bytes);
    layout.states =
        take(end, int64_t{4} * shape.state_buffers * shape.columns * layout.state_pitch);
    layout.outbox_pitch =
        shape.has_outbox ? pitch_of(geometry.block_row_tiles * engine.words_per_row_tile) : 0;
    layout.outbox = take(end, int64_t{4} * shape.columns * layout.outbox_pitch);
    layout.inputs = take(end, int64_t{4} * kInputBuffers * shape.columns * layout.input_pitch);
    layout.partials = take(end, int64_t{4} * kPartialBuffers * shape.row_warps *
                                    (shape.depth_split > 1 ? shape.depth_split : 0) * kLanes *
                                    layout.sums_per_lane);
    // What does not fit 32 bits fits no block either.
    layout.bytes = static_cast<uint32_t>(end < UINT32_MAX ? end : UINT32_MAX);
    return layout;
  }

 private:
  static constexpr uint32_t take(int64_t& end, int64_t bytes) {
    const int64_t begin = end;
    if (bytes > 0) end += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return static_cast<uint32_t>(begin);
  }
};

// Whether the eight samples and four words of each that a warp reads at once lie in 32 banks.
constexpr bool uses_every_bank(uint32_t pitch) {
  uint32_t banks = 0;
  for (uint32_t sample = 0; sample < 8; ++sample)
    for (uint32_t word = 0; word < 4; ++word) banks |= 1u << (sample * pitch + word) % 32;
  return banks == ~0u;
}
static_assert(uses_every_bank(Layout::pitch_of(1)) && uses_every_bank(Layout::pitch_of(8)) &&
                  uses_every_bank(Layout::pitch_of(20)) && uses_every_bank(Layout::pitch_of(512)),
              "a warp's reads of the states conflict");

}  // namespace cuda
}  // namespace rnn_cuda
