// The persistent kernels for float32 by fused multiply-add.
#include "launch.h"
#include "launch_engine.cuh"

namespace rnn_cuda {
namespace cuda {

int launch_float32(const device::LaunchConfig& config, Residency residency, device::Stream stream,
                   const WalkParameters& parameters, int columns) {
  if (columns == 1) return launch_engine<FMA<1>>(config, residency, stream, parameters);
  if (columns == 4) return launch_engine<FMA<4>>(config, residency, stream, parameters);
  return kNoSuchKernel;
}

}  // namespace cuda
}  // namespace rnn_cuda
