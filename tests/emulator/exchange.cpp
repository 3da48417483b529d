// Memory barriers with a transaction count, and the asynchronous stores that they count.
#include "exchange.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "cuda/device.h"
#include "emulator.h"
#include "sanitizers.h"
#include "shared_memory.h"

namespace rnn_cuda::emulator {
namespace {

// In the upper half of an initialised device::Mbarrier; the lower half counts those of the block.
constexpr uint64_t kMark = 0xba221e2a;
constexpr int kMostArrivals = (1 << 20) - 1;
constexpr int64_t kMostBytes = (1 << 20) - 1;  // either way from zero: PTX, mbarrier's tx-count

[[noreturn]] void fail_here(const char* what, const Site& site) {
  machine->fail(what, machine->current(), site);
}

MbarrierState& state_of(device::Mbarrier* barrier, Block& block, const Site& site) {
  if (!is_in_shared_memory(block, barrier, sizeof *barrier))
    fail_here("a memory barrier that is not in the block's shared memory", site);
  has_read(barrier, sizeof *barrier);
  const uint64_t number = barrier->state & 0xffffffff;
  if (barrier->state >> 32 != kMark || number >= block.mbarriers.size())
    fail_here("a memory barrier that is not initialised", site);
  return block.mbarriers[number];
}

void complete_phase_if_done(MbarrierState& state) {
  if (state.pending > 0 || state.bytes != 0) return;
  state.pending = state.arrivals;
  ++state.phase;
  machine->progress();
  while (state.waiting != nullptr)
    machine->make_ready(*std::exchange(state.waiting, state.waiting->next_waiting));
}

}  // namespace

void barrier_init(device::Mbarrier* barrier, int arrivals, const Site& site) {
  Block& block = *machine->current().block;
  if (!is_in_shared_memory(block, barrier, sizeof *barrier))
    fail_here("a memory barrier that is not in the block's shared memory", site);
  if (arrivals < 1 || arrivals > kMostArrivals)
    fail_here("a memory barrier for fewer than one arrival, or too many", site);
  has_written(barrier, sizeof *barrier);
  const Unobserved allocation;
  barrier->state = kMark << 32 | block.mbarriers.size();
  block.mbarriers.emplace_back();
  block.mbarriers.back().arrivals = block.mbarriers.back().pending = arrivals;
}

void barrier_expect(device::Mbarrier* barrier, uint32_t bytes, const Site& site) {
  MbarrierState& state = state_of(barrier, *machine->current().block, site);
  if (state.pending == 0)
    fail_here("more arrivals at a memory barrier than it was initialised for", site);
  released(state.tag(state.phase));
  state.bytes += bytes;
  if (state.bytes > kMostBytes)
    fail_here("a memory barrier waits for more bytes than it can count", site);
  --state.pending;
  complete_phase_if_done(state);
}

void barrier_wait(device::Mbarrier* barrier, uint32_t parity, const Site& site) {
  Thread& self = machine->current();
  MbarrierState& state = state_of(barrier, *self.block, site);
  if (parity > 1) fail_here("a parity that is neither 0 nor 1", site);
  // Looks again once it runs: a thread that is two phases late waits for another one.
  while ((state.phase & 1) == parity) {
    self.next_waiting = state.waiting;
    state.waiting = &self;
    machine->wait(Waiting::Mbarrier, site);
  }
  acquired(state.tag(state.phase - 1));
}

void store_async(uint32_t* to, const uint32_t* words, int count, device::Mbarrier* barrier,
                 int rank, const Site& site) {
  Block& mine = *machine->current().block;
  const std::vector<Block*>& blocks = mine.cluster->blocks;
  if (rank < 0 || rank >= static_cast<int>(blocks.size()))
    fail_here("an asynchronous store to a block that the cluster does not have", site);
  Block& theirs = *blocks[static_cast<size_t>(rank)];
  if (theirs.returned == static_cast<int>(theirs.threads.size()))
    fail_here("an asynchronous store to a block that has returned", site);
  const size_t bytes = static_cast<size_t>(count) * sizeof *to;
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0)
    fail_here("an asynchronous store that is not aligned to its size", site);
  const auto there = [&](auto* here) {
    const int64_t offset = reinterpret_cast<char*>(here) - mine.shared;
    return reinterpret_cast<decltype(here)>(theirs.shared + offset);
  };
  if (!is_in_shared_memory(mine, to, static_cast<int64_t>(bytes)))
    fail_here("an asynchronous store to a place outside of the arrays in shared memory", site);
  if (!is_in_shared_memory(theirs, there(to), static_cast<int64_t>(bytes)))
    fail_here("an asynchronous store to a block that has not yet carved its shared memory", site);
  MbarrierState& state = state_of(there(barrier), theirs, site);
  theirs.stored_into |= &theirs != &mine;
  has_written(there(to), bytes);
  released(state.tag(state.phase));
  for (int i = 0; i < count; ++i) machine->issue({there(to) + i, words[i], &state, &theirs});
}

bool waits_for_what_never_comes(const Block& block) {
  return std::any_of(block.mbarriers.begin(), block.mbarriers.end(),
                     [](const MbarrierState& state) {
                       return state.pending != state.arrivals || state.bytes != 0;
                     });
}

void land(const Store& store) {
  *store.word = store.value;
  --store.block->stores_on_their_way;
  MbarrierState& state = *store.barrier;
  state.bytes -= static_cast<int64_t>(sizeof store.value);
  if (state.bytes < -kMostBytes)
    fail_here("a memory barrier counted more bytes than it can",
              {"the landing of an asynchronous store", "", 0});
  complete_phase_if_done(state);
}

}  // namespace rnn_cuda::emulator
