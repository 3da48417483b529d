// What the threads of a warp, a block or a cluster do together.
#include <cstring>
#include <sstream>

#include "emulator.h"
#include "machine.h"
#include "numbers.h"
#include "sanitizers.h"

namespace rnn_cuda::emulator {
namespace {

[[noreturn]] void fail_here(const std::string& what, const Site& site) {
  machine->fail(what, machine->current(), site);
}

[[noreturn]] void fail_divergent(const char* kind, const Site& others, const Site& site) {
  std::ostringstream message;
  message << "a divergent " << kind << ": others wait at " << others.primitive << ", "
          << others.file << ":" << others.line;
  fail_here(message.str(), site);
}

// ---- warps --------------------------------------------------------------------------------------

// Lets the other lanes of the warp arrive. The last one carries the collective out for all.
void join(Collective carry_out, void* argument, const Site& site, bool orders_memory = false) {
  Thread& self = machine->current();
  Warp& warp = *self.warp;
  if (warp.returned != 0) fail_here("a warp collective after a lane of the warp returned", site);
  if (warp.at_barrier != 0) {
    const int waiting = __builtin_ctz(warp.at_barrier);
    fail_divergent("warp collective", warp.threads[waiting].site, site);
  }
  if (warp.arrived == 0)
    warp.site = site;
  else if (!is_same(warp.site, site))
    fail_divergent("warp collective", warp.site, site);

  char* const tag = &warp.tags[warp.generation & 1];
  if (orders_memory) released(tag);
  warp.arguments[self.lane] = argument;
  warp.arrived |= 1u << self.lane;
  if (warp.arrived == warp.members) {
    if (carry_out != nullptr) carry_out(warp.arguments, warp.members);
    warp.arrived = 0;
    ++warp.generation;
    machine->make_ready(warp, warp.members);
    machine->give_way(&warp);
  } else {
    machine->wait(Waiting::Warp, site);
  }
  if (orders_memory) acquired(tag);
}

template <class F>
void for_each_lane(uint32_t lanes, const F& visit) {
  for (; lanes != 0; lanes &= lanes - 1) visit(__builtin_ctz(lanes));
}

struct Vote {
  bool mine, outcome;
};

void carry_out_vote(void* const* arguments, uint32_t lanes) {
  bool any = false;
  for_each_lane(lanes, [&](int lane) { any |= static_cast<Vote*>(arguments[lane])->mine; });
  for_each_lane(lanes, [&](int lane) { static_cast<Vote*>(arguments[lane])->outcome = any; });
}

template <class T>
struct Shuffle {
  T value, result;
  int mask;
};

template <class T>
void carry_out_shuffle(void* const* arguments, uint32_t lanes) {
  for_each_lane(lanes, [&](int lane) {
    auto& to = *static_cast<Shuffle<T>*>(arguments[lane]);
    to.result = static_cast<const Shuffle<T>*>(arguments[lane ^ to.mask])->value;
  });
}

template <class T>
T shuffle(T value, int mask, const Site& site) {
  Shuffle<T> argument = {value, 0, mask};
  const Thread& self = machine->current();
  const int from = self.lane ^ mask;
  if (mask < 0 || from >= kLanes || (self.warp->members >> from & 1) == 0)
    fail_here("a shuffle from lane " + std::to_string(from) + ", which does not exist", site);
  join(carry_out_shuffle<T>, &argument, site);
  return argument.result;
}

// ---- tensor cores -------------------------------------------------------------------------------

struct Product {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

constexpr int kRows = 16, kColumns = 8;
typedef float Row __attribute__((vector_size(kColumns * sizeof(float))));

// Element `place` (low to high) of a register.
template <Fragments type>
float element(uint32_t bits, int place) {
  const auto half = static_cast<uint16_t>(bits >> 16 * place);
  if constexpr (type == Fragments::BFloat16) return float_of_bfloat16(half);
  if constexpr (type == Fragments::Float16) return float_of_float16(half);
  return float_of_tf32(bits);
}

// D (16 x 8) += A (16 x depth) B (depth x 8), as PTX spreads them over lanes for mma.sync: lane
// 4 g + t holds rows g and g + 8 of A and D, and column g of B. Its registers follow one another
// along the depth in runs of four lanes, a pair of halves or one TF32 number in each.
template <Fragments type>
void carry_out_product(void* const* arguments, uint32_t) {
  constexpr int kInRegister = type == Fragments::TF32 ? 1 : 2;
  constexpr int kDepth = 8 * kInRegister;
  float a[kRows][kDepth];
  Row b[kDepth];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& p = *static_cast<Product*>(arguments[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half)
      for (int e = 0; e < kInRegister; ++e) {
        const int k = (4 * half + t) * kInRegister + e;
        a[g][k] = element<type>(p.a[2 * half], e);
        a[g + 8][k] = element<type>(p.a[2 * half + 1], e);
        b[k][g] = element<type>(p.b[half], e);
      }
  }
  for (int row = 0; row < kRows; ++row) {
    Row sums = {};
    for (int k = 0; k < kDepth; ++k) sums += a[row][k] * b[k];
    for (int n = 0; n < kColumns; ++n) {
      const auto& p = *static_cast<Product*>(arguments[row % 8 * 4 + n / 2]);
      p.d[row / 8 * 2 + n % 2] += sums[n];
    }
  }
}

Collective product_of(Fragments type) {
  switch (type) {
    case Fragments::BFloat16: return carry_out_product<Fragments::BFloat16>;
    case Fragments::Float16: return carry_out_product<Fragments::Float16>;
    case Fragments::TF32: return carry_out_product<Fragments::TF32>;
  }
  return nullptr;
}

// ---- blocks and clusters ------------------------------------------------------------------------

// True in the thread that arrives last, which has to wake the others.
bool arrive(Barrier& barrier, int members, bool vote, const Site& site) {
  if (barrier.arrived == 0)
    barrier.site = site;
  else if (!is_same(barrier.site, site))
    fail_divergent("barrier", barrier.site, site);
  released(&barrier.tags[barrier.phase & 1]);
  barrier.vote |= vote;
  if (++barrier.arrived < members) return false;
  barrier.arrived = 0;
  barrier.outcome = barrier.vote;
  barrier.vote = false;
  ++barrier.phase;
  return true;
}

void wake(Block& block) {
  for (Warp& warp : block.warps) {
    warp.at_barrier = 0;
    machine->make_ready(warp, warp.members);
  }
}

bool wait_for_block(bool vote, const Site& site) {
  Thread& self = machine->current();
  Block& block = *self.block;
  if (self.warp->arrived != 0) fail_divergent("barrier", self.warp->site, site);
  if (block.returned > 0) fail_here("a barrier after a thread of the block returned", site);
  Barrier& barrier = block.barrier;
  const unsigned phase = barrier.phase;
  if (arrive(barrier, static_cast<int>(block.threads.size()), vote, site)) {
    wake(block);
    machine->progress();
    machine->give_way();
  } else {
    self.warp->at_barrier |= 1u << self.lane;
    machine->wait(Waiting::Block, site);
  }
  acquired(&barrier.tags[phase & 1]);
  return barrier.outcome;
}

}  // namespace

void sync_warp(const Site& site) { join(nullptr, nullptr, site, true); }

bool any_in_warp(bool mine, const Site& site) {
  Vote vote = {mine, false};
  join(carry_out_vote, &vote, site);
  return vote.outcome;
}

uint32_t shuffle_xor(uint32_t value, int mask, const Site& site) {
  return shuffle(value, mask, site);
}

uint64_t shuffle_xor(uint64_t value, int mask, const Site& site) {
  return shuffle(value, mask, site);
}

void multiply_add(Fragments type, float* d, const uint32_t* a, const uint32_t* b,
                  const Site& site) {
  if (machine->current().warp->members != ~0u) fail_here("a product needs all 32 lanes", site);
  Product product = {d, a, b};
  join(product_of(type), &product, site);
}

void sync_block(const Site& site) { wait_for_block(false, site); }

bool any_in_block(bool mine, const Site& site) { return wait_for_block(mine, site); }

int cluster_rank() { return machine->current().block->rank; }

int cluster_size() { return static_cast<int>(machine->current().block->cluster->blocks.size()); }

void cluster_sync(const Site& site) {
  Thread& self = machine->current();
  Cluster& cluster = *self.block->cluster;
  if (self.warp->arrived != 0) fail_divergent("barrier", self.warp->site, site);
  if (self.block->barrier.arrived != 0) fail_divergent("barrier", self.block->barrier.site, site);
  if (cluster.returned > 0) fail_here("a barrier after a thread of the cluster returned", site);
  Barrier& barrier = cluster.barrier;
  const unsigned phase = barrier.phase;
  if (arrive(barrier, cluster.threads, false, site)) {
    for (Block* const block : cluster.blocks) {
      block->stored_into = false;
      wake(*block);
    }
    machine->progress();
    machine->give_way();
  } else {
    self.warp->at_barrier |= 1u << self.lane;
    machine->wait(Waiting::Cluster, site);
  }
  acquired(&barrier.tags[phase & 1]);
}

void spin(const Site& site) { machine->spin(site); }

void announce() {
  machine->progress();
  machine->wake_spinning();
}

void fail(const std::string& what, const Site& site) {
  machine->fail(what, machine->current(), site);
}

}  // namespace rnn_cuda::emulator
