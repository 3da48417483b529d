// What the operators ask of torch about the device, without a CUDA header of torch's: the library
// then links and loads beside every build of torch. Emulated, the device is the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "cuda/walk.h"

namespace rnn_cuda {
namespace cuda {

#ifdef RNN_CUDA_EMULATED
constexpr bool kEmulated = true;
constexpr c10::DeviceType kDeviceType = c10::DeviceType::CPU;
#else
constexpr bool kEmulated = false;
constexpr c10::DeviceType kDeviceType = c10::DeviceType::CUDA;
#endif

// The caller's stream on that device, a cudaStream_t.
void* current_stream(c10::Device device);

// Whether torch's settings let float32 products round to TF32.
bool allows_tf32();

// Throws for a code of walk.h's functions that is not 0; the message names the plan.
void check_launch(int code, const Plan& plan);

// Figures of that device, which must be the current one; asked once.
DeviceFigures figures_of(c10::Device device);

}  // namespace cuda
}  // namespace rnn_cuda
