// The persistent kernels for float16.
#include "launch.h"
#include "launch_engine.cuh"

namespace rnn_cuda {
namespace cuda {

int launch_float16(const device::LaunchConfig& config, Residency residency, device::Stream stream,
                   const WalkParameters& parameters, int columns) {
  if (columns == 8)
    return launch_engine<TensorCore<device::float16, 8>>(config, residency, stream, parameters);
  if (columns == 32)
    return launch_engine<TensorCore<device::float16, 32>>(config, residency, stream, parameters);
  return kNoSuchKernel;
}

}  // namespace cuda
}  // namespace rnn_cuda
