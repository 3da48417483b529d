// What launch() calls: the persistent kernels by data type and arithmetic. `columns` is the
// engine's.
#pragma once

#include "device.h"

namespace rnn_cuda {
namespace cuda {

struct WalkParameters;

// A code beside those of the device: the plan names a kernel that there is not.
constexpr int kNoSuchKernel = -1;

using LaunchEngine = int(const device::LaunchConfig& config, Residency residency,
                         device::Stream stream, const WalkParameters& parameters, int columns);

LaunchEngine launch_float32, launch_tf32, launch_bfloat16, launch_float16;

// How many clusters of a persistent kernel the device runs at once: of one of them for all, since
// they are all compiled for blocks of kMaxThreads threads.
int count_float32_clusters(const device::LaunchConfig& config, int* count);

// The compute capability, times ten, that this kernel was compiled for in the code that the current
// device has loaded. All of them are compiled for the same ones.
int capability_of_float32_clusters(int* capability);

}  // namespace cuda
}  // namespace rnn_cuda
