// The persistent kernels for bfloat16.
#include "launch.h"
#include "launch_engine.cuh"

namespace rnn_cuda {
namespace cuda {

int launch_bfloat16(const device::LaunchConfig& config, Residency residency, device::Stream stream,
                    const WalkParameters& parameters, int columns) {
  return launch_width<TensorCore<device::bfloat16, 8>, TensorCore<device::bfloat16, 32>>(
      config, residency, stream, parameters, columns);
}

}  // namespace cuda
}  // namespace rnn_cuda
