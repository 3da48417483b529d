// How a recurrence is laid out on a GPU: where U lives, how rows and batch are cut. Plain C++: no
// CUDA and no torch header, so that a plan can be made and tested without either.
#pragma once

#include <cstdint>
#include <string>

#include "../recurrence.h"

namespace rnn_cuda {
namespace cuda {

// Where the recurrent matrix stays for the whole sequence, and so what exchanges the states.
enum class Residency {
  OneSM,     // in one block; states in its shared memory
  Cluster,   // in a cluster of blocks (compute capability 9.0 or later); distributed shared memory
  Grid,      // in all blocks of a cooperative launch; states in L2
  Streamed,  // nowhere: a matrix product and an epilogue for each step
};

// What multiplies. TensorCoreTF32 is float32 rounded to TF32, only where torch's settings allow it.
enum class Arithmetic { FMA, TensorCore, TensorCoreTF32 };

// One card, as far as planning is concerned.
struct DeviceFigures {
  int capability_major = 0, capability_minor = 0;
  int multiprocessors = 0;
  int64_t shared_bytes_per_block = 0;  // the largest that a block may opt in to
  int max_cluster_size = 0;            // blocks; 0 or 1: no clusters. 16 is not portable
  int64_t l2_bytes = 0;
  // Compute capability that the kernels loaded on it were compiled for: an older one than the
  // device's where the driver has compiled them from PTX.
  int kernels_major = 0, kernels_minor = 0;
};

// Major compute capability from which on there are clusters: of the device, and of the target that
// the kernels were compiled for. For an older target the kernels in a cluster are empty.
constexpr int kFirstMajorWithClusters = 9;

struct Problem {
  ScalarType dtype = ScalarType::Float32;
  int64_t time_steps = 0, batch = 0, input_size = 0, hidden_size = 0;  // input_size 0: no input
  int directions = 1;                                                  // run in one launch
  bool allow_tf32 = false;
};

struct Plan {
  Residency residency = Residency::Streamed;
  Arithmetic arithmetic = Arithmetic::FMA;
  bool fuse_input = false;  // W x_t inside the kernel, else one matrix product before it
  int blocks = 1;           // that share a batch tile, each with its own rows of U
  int columns = 1;          // samples in a batch tile; a multiple of the engine's columns
  int engine_columns = 1;  // samples that a warp computes at once: FMA 1 or 4, tensor cores 8 or 32
  int row_warps = 1;       // warps of a block that take different rows of U
  int depth_split = 1;     // warps of a block that share a row, each with a part of the sum over k
  int64_t shared_bytes = 0;
  std::string reason;  // why this residency, in words

  int threads() const { return 32 * row_warps * depth_split; }
};

}  // namespace cuda
}  // namespace rnn_cuda
