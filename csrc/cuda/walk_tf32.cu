// The persistent kernels for float32 rounded to TF32.
#include "launch.h"
#include "launch_engine.cuh"

namespace rnn_cuda {
namespace cuda {

int launch_tf32(const device::LaunchConfig& config, Residency residency, device::Stream stream,
                const WalkParameters& parameters, int columns) {
  return launch_width<TensorCoreTF32<8>, TensorCoreTF32<32>>(config, residency, stream, parameters,
                                                             columns);
}

}  // namespace cuda
}  // namespace rnn_cuda
