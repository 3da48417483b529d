// Memory of output tensors, kept for the next ones when a tensor is freed.
//
// The system takes about as long to hand out fresh pages as a short recurrence takes to fill them,
// and malloc gives large blocks back to it at once.
#pragma once

#include <c10/core/Allocator.h>

namespace rnn_cuda::cpu {

// An allocator that keeps up to RNN_CUDA_CPU_POOL_MB mebibytes (128 unless set; 0 keeps nothing) of
// freed blocks. Small blocks are left to PyTorch's own allocator. Throws c10::ValueError if the
// variable is no number.
c10::Allocator* output_allocator();

}  // namespace rnn_cuda::cpu
