// The persistent kernels for float32 rounded to TF32.
#include "launch.h"
#include "launch_engine.cuh"

namespace rnn_cuda {
namespace cuda {

int launch_tf32(const device::LaunchConfig& config, Residency residency, device::Stream stream,
                const WalkParameters& parameters, int columns) {
  if (columns == 8) return launch_engine<TensorCoreTF32<8>>(config, residency, stream, parameters);
  if (columns == 32)
    return launch_engine<TensorCoreTF32<32>>(config, residency, stream, parameters);
  return kNoSuchKernel;
}

}  // namespace cuda
}  // namespace rnn_cuda
