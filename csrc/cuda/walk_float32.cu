// The persistent kernels for float32 by fused multiply-add.
#include "launch.h"
#include "launch_engine.cuh"

namespace rnn_cuda {
namespace cuda {

int launch_float32(const device::LaunchConfig& config, Residency residency, device::Stream stream,
                   const WalkParameters& parameters, int columns) {
  return launch_width<FMA<1>, FMA<4>>(config, residency, stream, parameters, columns);
}

}  // namespace cuda
}  // namespace rnn_cuda
