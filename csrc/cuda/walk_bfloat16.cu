// The persistent kernels for bfloat16.
#include "launch.h"
#include "launch_engine.cuh"

namespace rnn_cuda {
namespace cuda {

int launch_bfloat16(const device::LaunchConfig& config, Residency residency, device::Stream stream,
                    const WalkParameters& parameters, int columns) {
  if (columns == 8)
    return launch_engine<TensorCore<device::bfloat16, 8>>(config, residency, stream, parameters);
  if (columns == 32)
    return launch_engine<TensorCore<device::bfloat16, 32>>(config, residency, stream, parameters);
  return kNoSuchKernel;
}

}  // namespace cuda
}  // namespace rnn_cuda
