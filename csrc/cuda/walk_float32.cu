// The persistent kernels for float32 by fused multiply-add.
#include "launch.h"
#include "launch_engine.cuh"

namespace rnn_cuda {
namespace cuda {

int launch_float32(const device::LaunchConfig& config, Residency residency, device::Stream stream,
                   const WalkParameters& parameters, int columns) {
  return launch_width<FMA<1>, FMA<4>>(config, residency, stream, parameters, columns);
}

int count_float32_clusters(const device::LaunchConfig& config, int* count) {
  return device::count_clusters(config, walk_kernel<FMA<1>, InCluster>, count);
}

int capability_of_float32_clusters(int* capability) {
  return device::compiled_capability(walk_kernel<FMA<1>, InCluster>, capability);
}

}  // namespace cuda
}  // namespace rnn_cuda
