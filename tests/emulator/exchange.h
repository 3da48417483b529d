// Asynchronous stores that land.
#pragma once

#include "machine.h"

namespace rnn_cuda::emulator {

void land(const Store& store);

// Whether a memory barrier of the block has begun a phase that has not ended.
bool waits_for_what_never_comes(const Block& block);

}  // namespace rnn_cuda::emulator
