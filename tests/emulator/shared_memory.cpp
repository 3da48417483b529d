#include "shared_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cuda/device.h"
#include "sanitizers.h"

namespace rnn_cuda::emulator {
namespace {

// For the gaps between arrays, which Carver::bytes() does not count.
constexpr int64_t kReserve = 8192;
constexpr size_t kAlignment = 1024;
constexpr unsigned char kPoison = 0xff;  // repeated, it is NaN in every type

size_t size_of(int64_t bytes) { return static_cast<size_t>(bytes + kReserve); }

}  // namespace

void open_shared_memory(Block& block, int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, size_of(bytes)) != 0) throw std::bad_alloc();
  block.shared = static_cast<char*>(memory);
  std::memset(block.shared, kPoison, size_of(bytes));
  forbid(block.shared, size_of(bytes));
}

const char* close_shared_memory(Block& block, int64_t bytes) {
  std::vector<Range>& arrays = block.arrays;
  std::sort(arrays.begin(), arrays.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  char* at = block.shared;
  const auto is_untouched_until = [&](const char* end) {
    for (; at < end; ++at)
      if (static_cast<unsigned char>(*at) != kPoison) return false;
    return true;
  };
  bool untouched = true;
  for (const Range& array : arrays) {
    untouched &= is_untouched_until(array.begin);
    at = std::max(at, array.end);
  }
  untouched &= is_untouched_until(block.shared + size_of(bytes));
  allow(block.shared, size_of(bytes));
  {
    const Unobserved end_of_its_life;
    std::memset(block.shared, kPoison, size_of(bytes));
  }
  forbid(block.shared, size_of(bytes));
  return untouched ? nullptr : "the block wrote outside of the arrays it carved from shared memory";
}

void release_shared_memory(Block& block, int64_t bytes) {
  allow(block.shared, size_of(bytes));
  std::free(block.shared);
  block.shared = nullptr;
}

bool is_in_shared_memory(const Block& block, const void* at, int64_t bytes) {
  const auto* const p = static_cast<const char*>(at);
  for (const Range& array : block.arrays)
    if (p >= array.begin && p + bytes <= array.end) return true;
  return false;
}

char* shared_memory() { return machine->current().block->shared; }

void allow_shared(char* from, char* to, int64_t bytes) {
  Block& block = *machine->current().block;
  for (const Range& array : block.arrays)
    if (array.begin == from && array.end == to) return;
  const int64_t most = machine->shared_bytes();
  const Site site = {"Carver::take", "", 0};
  if (bytes > most)
    fail("shared memory: carved " + std::to_string(bytes) + " bytes, but the launch asked for " +
             std::to_string(most),
         site);
  if (to > block.shared + size_of(most))
    fail("too many arrays in shared memory for the emulator's reserve", site);
  allow(from, static_cast<size_t>(to - from));
  const Unobserved allocation;
  block.arrays.push_back({from, to});
}

}  // namespace rnn_cuda::emulator
