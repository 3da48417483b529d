// The dynamic shared memory of a block: NaN until written, guarded between what a kernel carves.
#pragma once

#include <cstdint>

#include "machine.h"

namespace rnn_cuda::emulator {

// Before the first thread of a block runs.
void open_shared_memory(Block& block, int64_t bytes);

// When the last one has returned: a peer that still reads it finds NaN. Says what is wrong, or
// null.
const char* close_shared_memory(Block& block, int64_t bytes);

void release_shared_memory(Block& block, int64_t bytes);

// Whether all of [at, at + bytes) lies in it.
bool is_in_shared_memory(const Block& block, const void* at, int64_t bytes);

}  // namespace rnn_cuda::emulator
