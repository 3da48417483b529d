// What the host asks for: launches, the made-up card, the schedule.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "cuda/device.h"
#include "emulator.h"
#include "machine.h"
#include "sanitizers.h"

namespace rnn_cuda::emulator {
namespace {

std::mutex mutex;  // one launch at a time
int64_t launches = 0;

// ---- errors: a code for each text, the last ones are kept ---------------------------------------

constexpr int kFirstCode = 1000;
constexpr size_t kKept = 64;
std::string messages[kKept];
size_t message_count = 0;

int code_of(const std::string& message) {
  messages[message_count % kKept] = message;
  return kFirstCode + static_cast<int>(message_count++);
}

// ---- settings -----------------------------------------------------------------------------------

std::string chosen_schedule;
std::optional<cuda::DeviceFigures> chosen_figures;

std::string environment(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

Schedule current_schedule() {
  if (!chosen_schedule.empty()) return Schedule::parse(chosen_schedule);
  const std::string text = environment("RNN_CUDA_EMULATOR_SCHEDULE");
  return text.empty() ? Schedule() : Schedule::parse(text);
}

cuda::DeviceFigures h100() {
  cuda::DeviceFigures f;
  f.capability_major = 9;
  f.multiprocessors = 132;
  f.shared_bytes_per_block = 232448;
  f.max_cluster_size = 16;
  f.l2_bytes = 50 << 20;
  return f;
}

cuda::DeviceFigures current_figures() {
  if (chosen_figures) return *chosen_figures;
  cuda::DeviceFigures f = h100();
  std::istringstream list(environment("RNN_CUDA_EMULATOR_DEVICE"));
  for (std::string item; std::getline(list, item, ',');) {
    const size_t equals = item.find('=');
    const std::string name = item.substr(0, equals);
    std::istringstream value(equals == std::string::npos ? "" : item.substr(equals + 1));
    bool known = true;
    char dot = 0;
    if (name == "capability")
      value >> f.capability_major >> dot >> f.capability_minor;
    else if (name == "kernels")
      value >> f.kernels_major >> dot >> f.kernels_minor;
    else if (name == "multiprocessors")
      value >> f.multiprocessors;
    else if (name == "shared_bytes_per_block")
      value >> f.shared_bytes_per_block;
    else if (name == "max_cluster_size")
      value >> f.max_cluster_size;
    else if (name == "l2_bytes")
      value >> f.l2_bytes;
    else
      known = false;
    if (!known || !value || value.peek() != EOF)
      throw std::invalid_argument(
          "RNN_CUDA_EMULATOR_DEVICE: cannot read '" + item +
          "'; it is a list like multiprocessors=8,capability=9.0,kernels=9.0,"
          "shared_bytes_per_block=232448,max_cluster_size=16,l2_bytes=0");
  }
  if (f.kernels_major == 0) {  // not named: they were compiled for this device
    f.kernels_major = f.capability_major;
    f.kernels_minor = f.capability_minor;
  }
  return f;
}

// ---- launches -----------------------------------------------------------------------------------

std::string name_of(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel)
    return "a kernel";
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> readable(
      abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status), std::free);
  return readable == nullptr ? info.dli_sname : readable.get();
}

// Empty, or why no card would run this.
std::string refusal(const device::LaunchConfig& c, const cuda::DeviceFigures& f) {
  std::ostringstream why;
  const int64_t blocks = int64_t{c.grid_x} * c.grid_y;
  constexpr int kMostThreads = 1024, kMostRows = 65535;
  if (c.grid_x < 1 || c.grid_y < 1 || c.grid_y > kMostRows)
    why << "a grid of " << c.grid_x << " x " << c.grid_y << " blocks";
  else if (c.block < 1 || c.block > kMostThreads)
    why << c.block << " threads in a block, not 1 to " << kMostThreads;
  else if (static_cast<int64_t>(c.shared_bytes) > f.shared_bytes_per_block)
    why << c.shared_bytes << " bytes of shared memory in a block, but this device has "
        << f.shared_bytes_per_block;
  else if (c.cluster < 1 || (c.cluster > 1 && c.cluster > f.max_cluster_size))
    why << "clusters of " << c.cluster << " blocks, but this device has at most "
        << f.max_cluster_size;
  else if (c.cluster > 1 && f.kernels_major < cuda::kFirstMajorWithClusters)
    why << "clusters of " << c.cluster << " blocks, but the kernels loaded are for compute "
        << "capability " << f.kernels_major << "." << f.kernels_minor << " and have none";
  else if (c.cluster > 1 && c.cluster > f.multiprocessors)
    why << "clusters of " << c.cluster << " blocks, but this device has " << f.multiprocessors
        << " multiprocessors";
  else if (c.grid_x % c.cluster != 0)
    why << "a grid of " << c.grid_x << " blocks in clusters of " << c.cluster;
  else if (c.cooperative && blocks > f.multiprocessors)
    why << "a cooperative launch of " << blocks << " blocks, but this device has "
        << f.multiprocessors << " multiprocessors";
  return why.str();
}

// The blocks of one cluster, as they are before their first thread runs.
class ClusterOfBlocks {
 public:
  ClusterOfBlocks(const device::LaunchConfig& config, int x, int y)
      : blocks_(static_cast<size_t>(config.cluster)) {
    for (int rank = 0; rank < config.cluster; ++rank) {
      Block& block = blocks_[static_cast<size_t>(rank)];
      block.index = {static_cast<unsigned>(x * config.cluster + rank), static_cast<unsigned>(y), 0};
      block.rank = rank;
      block.cluster = &cluster_;
      add_threads(block, config.block);
      cluster_.blocks.push_back(&block);
      cluster_.threads += config.block;
    }
  }

  Cluster* get() { return &cluster_; }

 private:
  static void add_threads(Block& block, int count) {
    block.threads = std::vector<Thread>(static_cast<size_t>(count));
    block.warps = std::vector<Warp>(static_cast<size_t>((count + kLanes - 1) / kLanes));
    for (int number = 0; number < count; ++number) {
      Thread& thread = block.threads[static_cast<size_t>(number)];
      Warp& warp = block.warps[static_cast<size_t>(number / kLanes)];
      thread.place = {{static_cast<unsigned>(number), 0, 0}, block.index};
      thread.block = &block;
      thread.warp = &warp;
      thread.lane = number % kLanes;
      thread.number = number;
      warp.block = &block;
      warp.members |= 1u << thread.lane;
      if (thread.lane == 0) warp.threads = &thread;
    }
  }

  Cluster cluster_;
  std::vector<Block> blocks_;
};

// The order in which clusters that need not run together do: all are possible on a card.
std::vector<int> order_of(int clusters, const Schedule& schedule) {
  std::vector<int> order;
  for (int i = 0; i < clusters; ++i) order.push_back(i);
  if (schedule.kind == Schedule::Descending) std::reverse(order.begin(), order.end());
  if (schedule.kind == Schedule::Random || schedule.kind == Schedule::Starving)
    std::shuffle(order.begin(), order.end(),
                 std::minstd_rand(static_cast<unsigned>(schedule.seed)));
  return order;
}

std::string run(const device::LaunchConfig& config, const Schedule& schedule,
                const std::string& kernel, const std::function<void()>& body) {
  block_size = {static_cast<unsigned>(config.block), 1, 1};
  grid_size = {static_cast<unsigned>(config.grid_x), static_cast<unsigned>(config.grid_y), 1};
  const int in_a_row = config.grid_x / config.cluster;
  const auto cluster_number = [&](int i) {
    return std::make_unique<ClusterOfBlocks>(config, i % in_a_row, i / in_a_row);
  };
  Machine this_machine(schedule, static_cast<int64_t>(config.shared_bytes), kernel, body);
  machine = &this_machine;
  std::vector<std::unique_ptr<ClusterOfBlocks>> together;
  for (const int i : order_of(in_a_row * config.grid_y, schedule)) {
    together.push_back(cluster_number(i));
    if (config.cooperative) continue;
    if (!this_machine.run({together.back()->get()})) break;
    together.clear();
  }
  if (config.cooperative) {
    std::vector<Cluster*> all;
    for (const auto& cluster : together) all.push_back(cluster->get());
    this_machine.run(all);
  }
  this_machine.finish();
  machine = nullptr;
  return this_machine.error();
}

}  // namespace

int launch(const device::LaunchConfig& config, const void* kernel,
           const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Unobserved bookkeeping;
  ++launches;
  try {
    const std::string name = name_of(kernel);
    const std::string refused = refusal(config, current_figures());
    if (!refused.empty()) return code_of(name + ": cannot be launched: " + refused);
    const std::string error = run(config, current_schedule(), name, body);
    return error.empty() ? 0 : code_of(error);
  } catch (const std::exception& error) {
    machine = nullptr;
    return code_of(error.what());
  }
}

const char* error_string(int code) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (code == 0) return "no error";
  const auto number = static_cast<size_t>(code - kFirstCode);
  const bool known =
      code >= kFirstCode && number < message_count && number + kKept >= message_count;
  return known ? messages[number % kKept].c_str() : "an unknown error of the emulator";
}

int64_t launch_count() {
  const std::lock_guard<std::mutex> lock(mutex);
  return launches;
}

void set_schedule(const std::string& schedule) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!schedule.empty()) Schedule::parse(schedule);
  chosen_schedule = schedule;
}

void set_figures(const cuda::DeviceFigures* figures) {
  const std::lock_guard<std::mutex> lock(mutex);
  chosen_figures = figures == nullptr ? std::nullopt : std::optional(*figures);
}

int get_figures(cuda::DeviceFigures* figures) {
  const std::lock_guard<std::mutex> lock(mutex);
  try {
    *figures = current_figures();
    return 0;
  } catch (const std::exception& error) {
    return code_of(error.what());
  }
}

int count_clusters(int size, int* count) {
  cuda::DeviceFigures figures;
  const int error = get_figures(&figures);
  *count = size > figures.max_cluster_size ? 0 : figures.multiprocessors / size;
  return error;
}

}  // namespace rnn_cuda::emulator
