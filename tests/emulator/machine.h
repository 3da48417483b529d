// The blocks that run together, their threads, and the schedule that says which one goes on.
// Internal to the emulator: one Machine exists at a time, while a launch runs.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "context.h"
#include "emulator.h"

namespace rnn_cuda::emulator {

constexpr int kLanes = 32;

struct Block;
struct Warp;

enum class Waiting { No, Warp, Block, Cluster, Mbarrier, Spin, Returned };

struct Thread {
  Place place;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  int number = 0;  // in its block
  Waiting waiting = Waiting::No;
  Site site = {"start", "", 0};
  Thread* next_waiting = nullptr;  // at the same memory barrier, or spinning too
  int64_t spins = 0;
  std::unique_ptr<Stack> stack;
  Context context;
};

// A collective of a warp is carried out once, by the lane that arrives last, for all lanes.
using Collective = void (*)(void* const* arguments, uint32_t lanes);

struct Warp {
  Block* block = nullptr;
  int number = 0;             // among all warps that run together
  Thread* threads = nullptr;  // one for each lane that exists
  uint32_t members = 0;       // sets of lanes: those that exist,
  uint32_t ready = 0;         // may run,
  uint32_t arrived = 0;       // wait in the collective at `site`,
  uint32_t at_barrier = 0;    // wait at a barrier of the block or the cluster,
  uint32_t returned = 0;      // are done
  Site site = {};
  void* arguments[kLanes] = {};
  unsigned generation = 0;
  char tags[2] = {};
};

struct Barrier {
  int arrived = 0;
  unsigned phase = 0;
  bool vote = false, outcome = false;
  Site site = {};
  const Thread* first = nullptr;
  char tags[2] = {};
};

// The state of a device::Mbarrier, which holds a number that leads here.
struct MbarrierState {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;  // expected, less those that came: below zero if these were first
  unsigned phase = 0;
  Thread* waiting = nullptr;
  char tags[8] = {};  // of the last phases, for ThreadSanitizer

  char* tag(unsigned of_phase) { return &tags[of_phase % sizeof tags]; }
};

struct Range {
  char *begin, *end;
};

struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
  int threads = 0, returned = 0;
};

struct Block {
  Index3 index;
  int rank = 0;
  Cluster* cluster = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int returned = 0;
  Barrier barrier;
  char* shared = nullptr;
  std::vector<Range> arrays;  // what the kernel carved from it
  std::deque<MbarrierState> mbarriers;
  int64_t stores_on_their_way = 0;
  // Whether others stored into it since the last barrier of the cluster.
  bool stored_into = false;
};

struct Schedule {
  enum Kind { Ascending, Descending, Random, Starving } kind = Ascending;
  uint64_t seed = 0;

  // Throws std::invalid_argument.
  static Schedule parse(const std::string& text);
};

// An asynchronous store that was issued and has not yet landed.
struct Store {
  uint32_t* word;
  uint32_t value;
  MbarrierState* barrier;
  Block* block;
};

class Machine {
 public:
  Machine(const Schedule& schedule, int64_t shared_bytes, std::string kernel,
          const std::function<void()>& body);

  // Runs all threads of these clusters until they have returned. False: error() says what failed.
  bool run(const std::vector<Cluster*>& clusters);
  // After the last run: what the threads did has happened before what the host does next.
  void finish();
  const std::string& error() const { return error_; }

  Thread& current() { return *current_; }
  int64_t shared_bytes() const { return shared_bytes_; }

  // The current thread waits until someone else makes it ready.
  void wait(Waiting reason, const Site& site);
  // The current thread may go on, but any other that is ready may go first, preferably of a warp.
  void give_way(Warp* preferred = nullptr);
  void make_ready(Thread& thread);
  void make_ready(Warp& warp, uint32_t lanes);
  // Something happened that another thread may wait for.
  void progress();
  void spin(const Site& site);
  void wake_spinning();

  void issue(const Store& store);

  [[noreturn]] void fail(const std::string& what, const Thread& thread, const Site& site);

 private:
  [[noreturn]] void fail(const std::string& what);
  static void enter();
  void leave();
  void start(const std::vector<Cluster*>& clusters);
  Thread* choose(Warp* preferred);
  Warp* choose_warp();
  Thread& choose_lane(Warp& warp);
  void switch_to_next(Warp* preferred, bool finished = false);
  bool land_some_stores(bool nothing_else_can_run);
  bool poll_spins_again();
  std::string deadlock() const;
  void set_ready(const Warp& warp, bool ready);
  uint64_t random();

  const Schedule schedule_;
  const int64_t shared_bytes_;
  const std::string kernel_;
  const std::function<void()>& body_;

  std::vector<Block*> blocks_;
  std::vector<Warp*> warps_;
  std::vector<uint64_t> ready_warps_;  // a set of numbers of warps
  Warp* starved_ = nullptr;
  Thread* spinning_ = nullptr;
  std::vector<Store> stores_;
  Thread* current_ = nullptr;
  Context host_;
  int64_t alive_ = 0;
  int64_t switches_since_progress_ = 0;
  uint64_t progress_ = 0, progress_when_stuck_ = ~uint64_t{0};
  uint64_t random_state_;
  std::string error_;
  char start_tag_ = 0, end_tag_ = 0;
};

extern Machine* machine;  // of the launch that runs

// "thread 3 ..., at sync_block, file:line"
std::string describe(const Thread& thread, const Site& site);
bool is_same(const Site& a, const Site& b);

}  // namespace rnn_cuda::emulator
