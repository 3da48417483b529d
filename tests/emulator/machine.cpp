#include "machine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "exchange.h"
#include "sanitizers.h"
#include "shared_memory.h"

namespace rnn_cuda::emulator {

Machine* machine = nullptr;
const Place* current_place = nullptr;
Index3 block_size, grid_size;

namespace {

// Far above what a kernel needs between two barriers, and over in a few seconds.
constexpr int64_t kMostSwitchesWithoutProgress = 20'000'000;
constexpr int64_t kMostSpins = 1'000'000;  // of one thread, one after the other

constexpr int kWordBits = 64;

struct Failed {};

int lowest(uint64_t set) { return __builtin_ctzll(set); }
int highest(uint64_t set) { return kWordBits - 1 - __builtin_clzll(set); }
uint32_t rotated(uint32_t set, int by) { return by == 0 ? set : set >> by | set << (kLanes - by); }

}  // namespace

Machine::Machine(const Schedule& schedule, int64_t shared_bytes, std::string kernel,
                 const std::function<void()>& body)
    : schedule_(schedule),
      shared_bytes_(shared_bytes),
      kernel_(std::move(kernel)),
      body_(body),
      random_state_((schedule.seed + 1) * 0x9e3779b97f4a7c15u) {}

uint64_t Machine::random() {  // xorshift*
  random_state_ ^= random_state_ >> 12;
  random_state_ ^= random_state_ << 25;
  random_state_ ^= random_state_ >> 27;
  return random_state_ * 0x2545f4914f6cdd1du >> 32;
}

// ---- which thread goes on -----------------------------------------------------------------------

void Machine::set_ready(const Warp& warp, bool ready) {
  if (&warp == starved_) return;
  const auto number = static_cast<size_t>(warp.number);
  const uint64_t bit = uint64_t{1} << number % kWordBits;
  uint64_t& word = ready_warps_[number / kWordBits];
  word = ready ? word | bit : word & ~bit;
}

Warp* Machine::choose_warp() {
  const size_t words = ready_warps_.size();
  const bool descending = schedule_.kind == Schedule::Descending;
  const bool drawn = schedule_.kind == Schedule::Random || schedule_.kind == Schedule::Starving;
  const size_t start = drawn ? random() % words : 0;
  for (size_t i = 0; i < words; ++i) {
    const size_t word = descending ? words - 1 - i : (start + i) % words;
    uint64_t set = ready_warps_[word];
    if (set == 0) continue;
    if (drawn) {
      const uint64_t from_drawn = set & ~uint64_t{0} << random() % kWordBits;
      if (from_drawn != 0) set = from_drawn;
    }
    return warps_[word * kWordBits + static_cast<size_t>(descending ? highest(set) : lowest(set))];
  }
  return nullptr;
}

Thread& Machine::choose_lane(Warp& warp) {
  int lane = 0;
  switch (schedule_.kind) {
    case Schedule::Ascending: lane = lowest(warp.ready); break;
    case Schedule::Descending: lane = highest(warp.ready); break;
    default: {
      const int turn = static_cast<int>(random() % kLanes);
      lane = (lowest(rotated(warp.ready, turn)) + turn) % kLanes;
    }
  }
  return warp.threads[lane];
}

// Null: nobody can go on. A warp goes on as long as it can, which is easy on the caches; but a
// random schedule lets others in, and the starved one waits for all others at any point.
Thread* Machine::choose(Warp* preferred) {
  const bool lets_others_in =
      preferred == starved_ || (schedule_.kind == Schedule::Random && random() % 8 == 0);
  if (preferred != nullptr && preferred->ready != 0 && !lets_others_in)
    return &choose_lane(*preferred);
  land_some_stores(false);
  for (;;) {
    if (Warp* const warp = choose_warp()) return &choose_lane(*warp);
    if (land_some_stores(true) || poll_spins_again()) continue;
    if (starved_ != nullptr && starved_->ready != 0) return &choose_lane(*starved_);
    return nullptr;
  }
}

void Machine::switch_to_next(Warp* preferred, bool finished) {
  Thread& self = *current_;
  if (++switches_since_progress_ > kMostSwitchesWithoutProgress)
    fail("a livelock: threads run, but nobody gets to a barrier or to its end", self, self.site);
  Thread* const next = choose(preferred);
  if (next == &self) return;
  if (next == nullptr && alive_ > 0) fail(deadlock());
  current_ = next;
  if (next != nullptr) current_place = &next->place;
  Context::switch_between(self.context, next == nullptr ? host_ : next->context, finished);
}

void Machine::wait(Waiting reason, const Site& site) {
  Thread& self = *current_;
  if (reason != Waiting::Spin) self.spins = 0;
  self.waiting = reason;
  self.site = site;
  Warp& warp = *self.warp;
  warp.ready &= ~(1u << self.lane);
  if (warp.ready == 0) set_ready(warp, false);
  switch_to_next(&warp);
}

void Machine::give_way(Warp* preferred) { switch_to_next(preferred); }

void Machine::make_ready(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1)
    warp.threads[lowest(rest)].waiting = Waiting::No;
  set_ready(warp, true);
}

void Machine::make_ready(Thread& thread) { make_ready(*thread.warp, 1u << thread.lane); }

void Machine::progress() {
  ++progress_;
  switches_since_progress_ = 0;
}

void Machine::spin(const Site& site) {
  Thread& self = *current_;
  if (++self.spins > kMostSpins)
    fail("a livelock: a spin goes on and on, while others do things that do not end it", self,
         site);
  self.next_waiting = spinning_;
  spinning_ = &self;
  wait(Waiting::Spin, site);
}

void Machine::wake_spinning() {
  while (spinning_ != nullptr) make_ready(*std::exchange(spinning_, spinning_->next_waiting));
}

// What a spin waits for might have been stored plainly.
bool Machine::poll_spins_again() {
  if (spinning_ == nullptr || progress_when_stuck_ == progress_) return false;
  progress_when_stuck_ = progress_;
  wake_spinning();
  return true;
}

// ---- asynchronous stores ------------------------------------------------------------------------

void Machine::issue(const Store& store) {
  ++store.block->stores_on_their_way;
  if (schedule_.kind == Schedule::Descending || schedule_.kind == Schedule::Starving) {
    land(store);
  } else {
    const Unobserved allocation;
    stores_.push_back(store);
  }
}

// An ascending schedule lets them land as late as possible, a random one at any time in any order.
bool Machine::land_some_stores(bool nothing_else_can_run) {
  if (stores_.empty()) return false;
  size_t count = 0;
  if (nothing_else_can_run)
    count = schedule_.kind == Schedule::Random ? (stores_.size() + 1) / 2 : stores_.size();
  else if (schedule_.kind == Schedule::Random)
    count = random() % (stores_.size() / 4 + 1);
  if (schedule_.kind != Schedule::Random) {
    for (size_t i = 0; i < count; ++i) land(stores_[i]);
    if (count > 0) stores_.clear();
  } else {
    for (size_t i = 0; i < count; ++i) {
      std::swap(stores_[random() % stores_.size()], stores_.back());
      const Store store = stores_.back();
      stores_.pop_back();
      land(store);
    }
  }
  return count > 0;
}

// ---- the life of threads ------------------------------------------------------------------------

void Machine::enter() {
  Context::entered(machine->current_->context);
  acquired(&machine->start_tag_);
  try {
    machine->body_();
    machine->leave();
  } catch (const Failed&) {
  }
  Context::switch_between(machine->current_->context, machine->host_, true);
  std::abort();  // nobody switches back
}

void Machine::leave() {
  Thread& self = *current_;
  Warp& warp = *self.warp;
  Block& block = *self.block;
  Cluster& cluster = *block.cluster;
  const Site site = {"return", "", 0};
  const auto refuse_while = [&](bool others_wait, const Site& where) {
    if (!others_wait) return;
    std::ostringstream message;
    message << "a thread returns while others wait for it at " << where.primitive << ", "
            << where.file << ":" << where.line;
    fail(message.str(), self, site);
  };
  refuse_while(warp.arrived != 0, warp.site);
  refuse_while(block.barrier.arrived != 0, block.barrier.site);
  refuse_while(cluster.barrier.arrived != 0, cluster.barrier.site);

  released(&end_tag_);
  self.waiting = Waiting::Returned;
  self.site = site;
  warp.returned |= 1u << self.lane;
  warp.ready &= ~(1u << self.lane);
  if (warp.ready == 0) set_ready(warp, false);
  ++cluster.returned;
  --alive_;
  progress();
  if (++block.returned == static_cast<int>(block.threads.size())) {
    if (block.stores_on_their_way > 0)
      fail("the last thread of a block returns while stores are on their way to it", self, site);
    // A block may leave once nobody reaches into its memory any more: this barrier is what shows it
    // to all.
    if (block.stored_into)
      fail("the last thread of a block returns with no cluster_sync after a store into it", self,
           site);
    if (waits_for_what_never_comes(block))
      fail("the last thread of a block returns while a memory barrier waits for more", self, site);
    if (const char* const trouble = close_shared_memory(block, shared_bytes_))
      fail(trouble, self, site);
  }
  switch_to_next(&warp, true);
}

void Machine::start(const std::vector<Cluster*>& clusters) {
  blocks_.clear();
  warps_.clear();
  for (Cluster* const cluster : clusters)
    for (Block* const block : cluster->blocks) {
      open_shared_memory(*block, shared_bytes_);
      blocks_.push_back(block);
      for (Warp& warp : block->warps) {
        warp.number = static_cast<int>(warps_.size());
        warps_.push_back(&warp);
      }
    }
  ready_warps_.assign((warps_.size() + kWordBits - 1) / kWordBits, 0);
  starved_ = schedule_.kind == Schedule::Starving ? warps_[random() % warps_.size()] : nullptr;
  int number = 0;
  for (Warp* const warp : warps_) {
    for (uint32_t rest = warp->members; rest != 0; rest &= rest - 1) {
      Thread& thread = warp->threads[lowest(rest)];
      thread.stack = std::make_unique<Stack>();
      thread.context.prepare(*thread.stack, number++, &Machine::enter);
    }
    make_ready(*warp, warp->members);
  }
  alive_ = number;
}

bool Machine::run(const std::vector<Cluster*>& clusters) {
  start(clusters);
  released(&start_tag_);
  host_.adopt();
  progress();
  current_ = choose(nullptr);
  current_place = &current_->place;
  Context::switch_between(host_, current_->context);
  for (Block* const block : blocks_) release_shared_memory(*block, shared_bytes_);
  return error_.empty();
}

void Machine::finish() {
  acquired(&end_tag_);
  Stack::end_launch();
}

// ---- errors -------------------------------------------------------------------------------------

// Unwinds the thread that found out; those that wait are given up.
void Machine::fail(const std::string& what) {
  const Unobserved allocation;
  error_ = kernel_ + ": " + what;
  throw Failed();
}

void Machine::fail(const std::string& what, const Thread& thread, const Site& site) {
  const Unobserved allocation;
  fail(what + "\n  " + describe(thread, site));
}

std::string describe(const Thread& thread, const Site& site) {
  std::ostringstream text;
  text << "thread " << thread.number << " (warp " << thread.number / kLanes << ", lane "
       << thread.lane << ") of block (" << thread.place.block.x << ", " << thread.place.block.y
       << "), at " << site.primitive;
  if (site.line > 0) text << ", " << site.file << ":" << site.line;
  return text.str();
}

bool is_same(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

std::string Machine::deadlock() const {
  const Unobserved allocation;
  struct Group {
    int threads = 0;
    const Thread* example = nullptr;
  };
  std::map<std::tuple<std::string, std::string, int>, Group> groups;
  for (const Block* const block : blocks_)
    for (const Thread& thread : block->threads) {
      if (thread.waiting == Waiting::Returned) continue;
      Group& group = groups[{thread.site.primitive, thread.site.file, thread.site.line}];
      if (group.threads++ == 0) group.example = &thread;
    }
  std::ostringstream text;
  text << "a deadlock: nobody can go on";
  for (const auto& [site, group] : groups)
    text << "\n  " << group.threads
         << (group.threads == 1 ? " thread waits: " : " threads wait, for instance ")
         << describe(*group.example, group.example->site);
  return text.str();
}

// ---- schedules ----------------------------------------------------------------------------------

Schedule Schedule::parse(const std::string& text) {
  const size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  Schedule schedule;
  bool has_seed = false;
  if (colon != std::string::npos) {
    const std::string seed = text.substr(colon + 1);
    char* end = nullptr;
    schedule.seed = std::strtoull(seed.c_str(), &end, 10);
    has_seed = !seed.empty() && *end == '\0';
  }
  if (name == "ascending" && colon == std::string::npos) return schedule;
  schedule.kind = Schedule::Descending;
  if (name == "descending" && colon == std::string::npos) return schedule;
  schedule.kind = name == "random" ? Schedule::Random : Schedule::Starving;
  if ((name == "random" || name == "starving") && has_seed) return schedule;
  throw std::invalid_argument(
      "a schedule is ascending, descending, random:SEED or starving:SEED, not '" + text + "'");
}

}  // namespace rnn_cuda::emulator
