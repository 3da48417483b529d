#include "current.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

namespace rnn_cuda {
namespace cuda {
namespace {

std::mutex mutex;
std::optional<std::string> chosen_override;

auto key_of(const Problem& p, const DeviceFigures& d, std::string override) {
  return std::make_tuple(p.dtype, p.time_steps, p.batch, p.input_size, p.hidden_size, p.directions,
                         p.allow_tf32, d.capability_major, d.capability_minor, d.multiprocessors,
                         d.shared_bytes_per_block, d.max_cluster_size, d.l2_bytes, d.kernels_major,
                         d.kernels_minor, std::move(override));
}

int64_t next_power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

}  // namespace

OverrideText current_override() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (chosen_override) return {*chosen_override, false};
  const char* text = std::getenv("RNN_CUDA_PLAN");
  return {text == nullptr ? "" : text, true};
}

std::optional<std::string> exchange_override(std::optional<std::string> text) {
  if (text) Override::parse(*text);
  const std::lock_guard<std::mutex> lock(mutex);
  return std::exchange(chosen_override, std::move(text));
}

Plan current_plan(Problem problem, const DeviceFigures& device) {
  constexpr size_t kMostPlans = 512;
  static auto& plans = *new std::map<decltype(key_of(problem, device, "")), Plan>;
  problem.time_steps = next_power_of_two(problem.time_steps);
  const OverrideText source = current_override();
  const auto key = key_of(problem, device, source.text);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = plans.find(key);
    if (found != plans.end()) return found->second;
  }
  Plan made = with_override(
      source, [&](const Override& override) { return plan(problem, device, override); });
  const std::lock_guard<std::mutex> lock(mutex);
  if (plans.size() >= kMostPlans) plans.clear();
  plans.emplace(key, made);
  return made;
}

}  // namespace cuda
}  // namespace rnn_cuda
