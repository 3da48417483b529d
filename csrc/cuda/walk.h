// What the binding asks of the persistent kernels, and how a plan cuts the work: plain C++, shared
// by the planner, the kernels and the host code that launches them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan.h"

namespace rnn_cuda {
namespace cuda {

// Up to two recurrences of one shape that run in one launch: the directions of a layer. Their
// pointers are device pointers, but for batch_sizes, which is not used: see below.
struct Walk {
  Recurrence direction[2];
  int directions = 1;

  // Packed sequences: both (T), on the device; null when every sample has every step.
  const int64_t* batch_sizes = nullptr;
  const int64_t* row_starts = nullptr;  // batch_sizes[0] + ... + batch_sizes[t - 1]
  int64_t total_rows = 0;               // and the sum of all

  // Device memory of the sizes that workspace_of() names; the kernels clear what has to be zero.
  void* workspace = nullptr;
  // Backward epilogues, on request: the norm over H of z, in double, one for each row of the
  // output; null: not wanted.
  double* norms[2] = {nullptr, nullptr};
};

// How a kernel's warps multiply: one "tile" is `rows` hidden units by `depth` terms of the sum.
struct Engine {
  int rows = 0, depth = 0;
  int words_per_row_tile = 0;    // 32-bit words that carry the new states of a row tile, a sample
  int words_per_depth_tile = 0;  // and that one depth tile reads
  int weight_bytes = 0;          // of one tile of weights, as held by a warp
  int held_tiles = 0;            // of those a warp keeps in registers
  int norm_parts = 0;            // in which the squares of a row tile are summed
};

// The engine of a plan; rows == 0 where there is none (Residency::Streamed). Sizes: engine_table.h.
Engine engine_of(ScalarType dtype, Arithmetic arithmetic, int engine_columns);

// Counts that follow from a plan and sizes. `blocks` may be fewer than planned: each block owns at
// least one row tile.
struct Geometry {
  int64_t row_tiles = 0;        // over H
  int64_t blocks = 0;           // that share a batch tile
  int64_t block_row_tiles = 0;  // of each, but for the last
  int64_t row_rounds = 0;       // in which a block's row warps take its row tiles
  int64_t state_depth = 0;      // depth tiles over H
  int64_t input_depth = 0;      // and over I; 0 if the input is not fused
  int64_t state_slice = 0;      // of these: each warp's, where the depth is split
  int64_t input_slice = 0;
  // 32-bit words of one sample's state, in whole row tiles and whole depth tiles: those that no row
  // tile writes must be zero from the start.
  int64_t state_words = 0;
  int64_t input_words = 0;
  int64_t batch_tiles = 0;
  int64_t shared_weight_tiles = 0;  // of each warp

  static Geometry of(const Problem& problem, const Plan& plan);
};

// Bytes of shared memory that a block of this plan needs.
int64_t shared_bytes_of(const Problem& problem, const Plan& plan);

// What a launch of this plan needs in device memory beside its tensors: offsets in bytes.
struct Workspace {
  static constexpr int kAlignment = 256, kStateBuffers = 2;
  static constexpr int kCounterBytes = 128;  // one counter in a cache line of its own

  int64_t counters = 0;  // Grid: [directions][batch_tiles] of kCounterBytes; to be cleared
  int64_t states = 0;    // Grid: [directions][batch_tiles][kStateBuffers][columns][state_words]
  // Sums of squares of z over the units of one part of a row tile, double
  // [directions][row_tiles][total_rows]: added up afterwards in a fixed order.
  int64_t norm_parts = 0;
  int64_t bytes = 0;

  static Workspace of(const Problem& problem, const Plan& plan, int64_t total_rows, bool norms);
};

// Its bytes.
int64_t workspace_of(const Problem& problem, const Plan& plan, int64_t total_rows, bool norms);

// Queues the recurrence on the stream (a cudaStream_t) of the current device, whose figures are
// given. Returns 0, or a code for error_string. Residency::Streamed is the binding's own loop, not
// for here.
int launch(const Walk& walk, const Problem& problem, const Plan& plan, const DeviceFigures& figures,
           void* stream);
const char* error_string(int code);

// One time step of Residency::Streamed. Its rows follow one another in the tensors of `recurrence`;
// of those, [begun, rows) belong to samples that begin here, [continued, rows) to samples that end.
struct Step {
  int64_t t = 0;
  int64_t row = 0;   // number of its first row, where rows are counted over all time steps
  int64_t rows = 0;  // of samples [0, rows)
  int64_t begun = 0, continued = 0;
};

// s = epilogue(z + bias + addend (+ first_addend, where a sample begins)), into the output (and
// `last`, where a sample ends). z, the product with M alone, is contiguous (rows, H) in the type
// that halves compute in; null: zero.
int launch_epilogue(const Recurrence& recurrence, const Step& step, const void* z, double* norms,
                    void* stream);

// Figures of the current device; asks the driver each time. Returns 0 or an error code. Clusters
// are no larger than the device has room for, whatever its kind could run.
int figures_of_current_device(DeviceFigures* figures);

}  // namespace cuda
}  // namespace rnn_cuda
