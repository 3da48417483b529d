// The persistent kernels for float16.
#include "launch.h"
#include "launch_engine.cuh"

namespace rnn_cuda {
namespace cuda {

int launch_float16(const device::LaunchConfig& config, Residency residency, device::Stream stream,
                   const WalkParameters& parameters, int columns) {
  return launch_width<TensorCore<device::float16, 8>, TensorCore<device::float16, 32>>(
      config, residency, stream, parameters, columns);
}

}  // namespace cuda
}  // namespace rnn_cuda
