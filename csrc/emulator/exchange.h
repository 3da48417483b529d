// Asynchronous stores that land.
#pragma once

#include "machine.h"

namespace rnn_cuda::emulator {

void land(const Store& store);

}  // namespace rnn_cuda::emulator
