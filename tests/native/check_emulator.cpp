// Small kernels on the emulator. Those that are right are compared with plain computations; those
// that are wrong, each in one way, must be refused (test_emulator.py knows with what words).
//
//   check_emulator CASE       prints "ok", what differs, or the error of the launch
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.h"

using namespace rnn_cuda::device;
namespace emulator = rnn_cuda::emulator;

// Not an anonymous namespace: errors name kernels that have linkage.
namespace check {

constexpr int kFailed = 1;

struct LaunchFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class P>
void run(const LaunchConfig& config, void (*kernel)(P), const P& parameters) {
  const int code = launch(config, nullptr, kernel, parameters);
  if (code != 0) throw LaunchFailed(error_string(code));
}

LaunchConfig threads(int count, size_t shared_bytes = 0) {
  LaunchConfig config;
  config.block = count;
  config.shared_bytes = shared_bytes;
  return config;
}

LaunchConfig cluster(int blocks, int count, size_t shared_bytes) {
  LaunchConfig config = threads(count, shared_bytes);
  config.grid_x = config.cluster = blocks;
  return config;
}

void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// ---- kernels that are right ---------------------------------------------------------------------

struct Numbers {
  float* f;
  double* d;
  uint32_t* u;
  int n;
};

void shuffles(Numbers p) {
  const int i = threadIdx.x;
  for (int mask = 1; mask < 32; mask *= 2) {
    p.f[i] += shuffle_xor(p.f[i], mask);
    p.d[i] += shuffle_xor(p.d[i], mask);
    p.u[i] += shuffle_xor(p.u[i], mask);
  }
}

void check_shuffles() {
  std::vector<float> f(64);
  std::vector<double> d(64);
  std::vector<uint32_t> u(64);
  for (int i = 0; i < 64; ++i) f[i] = i, d[i] = i + 1e-9, u[i] = 1u << 31 | i;
  run(threads(64), shuffles, {f.data(), d.data(), u.data(), 0});
  for (int i = 0; i < 64; ++i) {
    const int sum = i < 32 ? 496 : 496 + 1024;
    expect(f[i] == sum, "float");
    expect(std::abs(d[i] - (sum + 32e-9)) < 1e-12, "double");
    expect(u[i] == static_cast<uint32_t>(sum), "uint32_t");
  }
}

void votes(Numbers p) {
  const int i = threadIdx.x;
  const bool in_warp = any_in_warp(i == p.n);
  const bool in_block = any_in_block(i == p.n);
  const bool in_block_again = any_in_block(false);
  p.u[i] = in_warp + 2 * in_block + 4 * in_block_again;
}

void check_votes() {
  std::vector<uint32_t> u(96);
  run(threads(96), votes, {nullptr, nullptr, u.data(), 40});
  for (int i = 0; i < 96; ++i) expect(u[i] == (i / 32 == 1 ? 3u : 2u), "a vote of 96 threads");
  run(threads(96), votes, {nullptr, nullptr, u.data(), 96});
  for (int i = 0; i < 96; ++i) expect(u[i] == 0, "nobody said true");
}

void reverse_in_block(Numbers p) {
  Carver carver(shared_memory());
  carver.take<float>(3);
  float* const shared = carver.take<float>(blockDim.x);
  const int n = blockDim.x, first = (blockIdx.y * gridDim.x + blockIdx.x) * n, i = threadIdx.x;
  shared[i] = p.f[first + i];
  sync_block();
  const float other = shared[n - 1 - i];
  sync_block();
  shared[i] = other;
  sync_warp();
  p.f[first + i] = shared[i ^ 1];
}

void check_blocks() {
  std::vector<float> f(6 * 100);
  for (size_t i = 0; i < f.size(); ++i) f[i] = i;
  LaunchConfig config = threads(100, 16 + 400);
  config.grid_x = 3, config.grid_y = 2;
  run(config, reverse_in_block, {f.data(), nullptr, nullptr, 0});
  for (int i = 0; i < 600; ++i) expect(f[i] == i / 100 * 100 + (99 - (i % 100 ^ 1)), "reversed");
}

void first_values(Numbers p) {
  Carver carver(shared_memory());
  p.f[0] = carver.take<float>(1)[0];
  p.d[0] = carver.take<double>(1)[0];
  p.f[1] = to_float(carver.take<bfloat16>(1)[0]);
  p.f[2] = to_float(carver.take<float16>(1)[0]);
}

void check_shared_memory_is_nan() {
  std::vector<float> f(3);
  std::vector<double> d(1);
  run(threads(1, 64), first_values, {f.data(), d.data(), nullptr, 0});
  expect(std::isnan(f[0]) && std::isnan(f[1]) && std::isnan(f[2]) && std::isnan(d[0]), "not NaN");
  Carver counting;
  counting.take<float>(1), counting.take<double>(1), counting.take<bfloat16>(3);
  expect(counting.bytes() == 38, "red zones are not counted");
}

struct Products {
  const uint32_t* a;
  const uint32_t* b;
  float* d;
  int type;
};

void products(Products p) {
  const int lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = p.a[lane * 4 + i], d[i] = p.d[lane * 4 + i];
  for (int i = 0; i < 2; ++i) b[i] = p.b[lane * 2 + i];
  if (p.type == 0) mma_bf16(d, a, b);
  if (p.type == 1) mma_f16(d, a, b);
  if (p.type == 2) mma_tf32(d, a, b);
  for (int i = 0; i < 4; ++i) p.d[lane * 4 + i] = d[i];
}

// The tables of fragments in the PTX manual ("Matrix Fragments for mma.m16n8k16", and m16n8k8),
// element by element as they stand there.
void check_products(int type) {
  const int depth = type == 2 ? 8 : 16;
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> a(16 * depth), b(depth * 8), c(16 * 8);
  const auto narrow = [&](float x) {
    return type == 0   ? uint32_t{from_float<bfloat16>(x).bits}
           : type == 1 ? uint32_t{from_float<float16>(x).bits}
                       : round_to_tf32(x);
  };
  const auto wide = [&](uint32_t x) {
    return type == 0   ? to_float(bfloat16{static_cast<uint16_t>(x)})
           : type == 1 ? to_float(float16{static_cast<uint16_t>(x)})
                       : float_of(x);
  };
  for (float& x : a) x = wide(narrow(normal(generator)));
  for (float& x : b) x = wide(narrow(normal(generator)));
  for (float& x : c) x = normal(generator);
  std::vector<uint32_t> a_fragments(128), b_fragments(64);
  std::vector<float> d(128);
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < (type == 2 ? 4 : 8); ++i) {
      int row, column;
      if (type == 2) {
        row = i == 0 || i == 2 ? group : group + 8;
        column = i < 2 ? in_group : in_group + 4;
        a_fragments[lane * 4 + i] = narrow(a[row * depth + column]);
      } else {
        row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
        a_fragments[lane * 4 + i / 2] |= narrow(a[row * depth + column]) << 16 * (i % 2);
      }
    }
    for (int i = 0; i < (type == 2 ? 2 : 4); ++i) {
      if (type == 2)
        b_fragments[lane * 2 + i] = narrow(b[(in_group + (i == 0 ? 0 : 4)) * 8 + group]);
      else
        b_fragments[lane * 2 + i / 2] |=
            narrow(b[(in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)) * 8 + group]) << 16 * (i % 2);
    }
    for (int i = 0; i < 4; ++i)
      d[lane * 4 + i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  }
  run(threads(32), products, {a_fragments.data(), b_fragments.data(), d.data(), type});
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = (i < 2 ? 0 : 8) + (lane >> 2), column = lane % 4 * 2 + (i & 1);
      double sum = c[row * 8 + column];
      for (int k = 0; k < depth; ++k) sum += double(a[row * depth + k]) * b[k * 8 + column];
      expect(std::abs(d[lane * 4 + i] - sum) < 1e-5, "an element of the product");
    }
}

void check_conversions() {
  // Exact halves come back; and every float between two of them goes to the nearer, or to the even.
  const auto check = [](auto type, int last) {
    using T = decltype(type);
    for (int bits = 0; bits < last; ++bits) {
      const T low = {static_cast<uint16_t>(bits)}, high = {static_cast<uint16_t>(bits + 1)};
      const float x = to_float(low), y = to_float(high);
      const float middle = x + (y - x) / 2;
      expect(from_float<T>(x).bits == bits, "an exact value");
      expect(from_float<T>(-x).bits == (bits | 0x8000), "a negative value");
      if (std::isinf(y)) continue;
      expect(from_float<T>(middle).bits == bits + bits % 2, "a tie");
      expect(from_float<T>(std::nextafter(middle, 0.0f)).bits == bits, "below a tie");
      expect(from_float<T>(std::nextafter(middle, y)).bits == bits + 1, "above a tie");
    }
    const float infinity = std::numeric_limits<float>::infinity();
    expect(std::isinf(to_float(from_float<T>(infinity))), "infinity");
    expect(std::isnan(to_float(from_float<T>(std::nanf("")))), "NaN");
  };
  check(float16(), 0x7c00);
  check(bfloat16(), 0x7f80);
  expect(to_float(float16{0x0001}) == 0x1p-24f && to_float(float16{0x7bff}) == 65504.0f, "float16");
  expect(from_float<float16>(65519.0f).bits == 0x7bff, "the largest float16");
  expect(from_float<float16>(65520.0f).bits == 0x7c00, "too large for float16");
  expect(to_float(bfloat16{0x3f80}) == 1.0f, "bfloat16");
  expect(pack(bfloat16{0x1234}, bfloat16{0x5678}) == 0x56781234, "pack");
  expect(float_of(round_to_tf32(1 + 0x1p-11f)) == 1 + 0x1p-10f, "a tie goes away from zero");
  expect(float_of(round_to_tf32(-1 - 0x1p-11f)) == -1 - 0x1p-10f, "below zero too");
  expect(float_of(round_to_tf32(1 + 0x0.ffep-11f)) == 1.0f, "below a tie");
  expect(std::isnan(float_of(round_to_tf32(std::nanf("")))), "NaN stays NaN");
}

// Each thread adds up what its fellows in all blocks of the cluster have, adds its block's rank,
// and sends them the sum, `n` times.
void sum_over_cluster(Numbers p) {
  const int i = threadIdx.x, n = blockDim.x, blocks = cluster_size(), rank = cluster_rank();
  Carver carver(shared_memory());
  uint32_t* const values = carver.take<uint32_t>(2 * blocks * n);
  Mbarrier* const barriers = carver.take<Mbarrier>(2);
  const uint32_t bytes = 4 * blocks * n;
  if (i < 2) {
    barrier_init(barriers + i, 1);
    barrier_expect(barriers + i, bytes);
  }
  for (int other = 0; other < blocks; ++other) values[other * n + i] = i + other;
  cluster_sync();
  for (int step = 0; step < p.n; ++step) {
    const int from = step % 2, to = 1 - from;
    if (step > 0) {
      barrier_wait(barriers + from, (step - 1) / 2 % 2);
      sync_block();
      if (i == 0 && step + 2 < p.n) barrier_expect(barriers + from, bytes);
    }
    uint32_t sum = rank;
    for (int other = 0; other < blocks; ++other) sum += values[(from * blocks + other) * n + i];
    if (step + 1 < p.n) {
      for (int other = 0; other < blocks; ++other)
        store_async(values + (to * blocks + rank) * n + i, sum, barriers + to, other);
    } else {
      p.u[blockIdx.x * n + i] = sum;
    }
  }
  cluster_sync();
}

void check_clusters() {
  constexpr int kBlocks = 3, kSteps = 6, kThreads = 64;
  std::vector<uint32_t> u(2 * kBlocks * kThreads);
  LaunchConfig config = cluster(kBlocks, kThreads, 2 * 4 * kBlocks * kThreads + 16);
  config.grid_x *= 2;
  run(config, sum_over_cluster, {nullptr, nullptr, u.data(), kSteps});
  for (int i = 0; i < kThreads; ++i) {
    uint32_t values[kBlocks] = {};
    for (int block = 0; block < kBlocks; ++block) values[block] = i + block;
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t sum = values[0] + values[1] + values[2];
      for (int block = 0; block < kBlocks; ++block) values[block] = sum + block;
    }
    for (int block = 0; block < 2 * kBlocks; ++block)
      expect(u[block * kThreads + i] == values[block % kBlocks], "a sum over the cluster");
  }
}

// The same from 16 bytes to 16 bytes, once.
void send_16_bytes(Numbers p) {
  Carver carver(shared_memory());
  Word16* const got = carver.take<Word16>(32 * cluster_size());
  Mbarrier* const barrier = carver.take<Mbarrier>(1);
  const uint32_t i = threadIdx.x, rank = cluster_rank();
  if (i == 0) {
    barrier_init(barrier, 1);
    barrier_expect(barrier, 16 * 32 * cluster_size());
  }
  cluster_sync();
  for (int other = 0; other < cluster_size(); ++other) {
    Word16 words = {{rank, i, rank + i, 7}};
    uint32_t* const to = got[rank * 32 + i].word + p.n;
    store_async(reinterpret_cast<Word16*>(to), words, barrier, other);
  }
  barrier_wait(barrier, 0);
  for (int other = 0; other < cluster_size(); ++other)
    for (int w = 0; w < 4; ++w)
      p.u[((rank * cluster_size() + other) * 32 + i) * 4 + w] = got[other * 32 + i].word[w];
  cluster_sync();
}

void check_16_bytes(int misalignment) {
  std::vector<uint32_t> u(2 * 2 * 32 * 4);
  run(cluster(2, 32, 2 * 32 * 16 + 8), send_16_bytes, {nullptr, nullptr, u.data(), misalignment});
  for (uint32_t place = 0; place < 2 * 2 * 32; ++place) {
    const uint32_t i = place % 32, rank = place / 32 % 2;
    const uint32_t expected[4] = {rank, i, rank + i, 7};
    for (int w = 0; w < 4; ++w) expect(u[place * 4 + w] == expected[w], "a word of four");
  }
}

// All blocks add up what all blocks stored, step after step.
void sum_over_grid(Numbers p) {
  const int i = threadIdx.x, blocks = gridDim.x, block = blockIdx.x;
  uint32_t* const counter = p.u + 2 * blocks;
  uint32_t mine = block + 1;
  for (int step = 0; step < p.n; ++step) {
    uint32_t* const row = p.u + step % 2 * blocks;
    if (i == 0) {
      store_shared_by_gpu(row + block, mine);
      add_release(counter, 1);
      RNN_CUDA_SPIN_UNTIL(load_acquire(counter) >= uint32_t((step + 1) * blocks));
    }
    sync_block();
    mine = 0;
    for (int other = 0; other < blocks; ++other) mine += load_shared_by_gpu(row + other);
    sync_block();
  }
  if (i == 0) p.f[block] = mine;
}

void check_grids() {
  constexpr int kBlocks = 5, kSteps = 4;
  std::vector<float> f(kBlocks);
  std::vector<uint32_t> u(2 * kBlocks + 1);
  LaunchConfig config = threads(64);
  config.grid_x = kBlocks;
  config.cooperative = true;
  run(config, sum_over_grid, {f.data(), nullptr, u.data(), kSteps});
  for (const float sum : f) expect(sum == 15 * 125, "the sum over the grid");
}

void order_of_threads(Numbers p) {
  sync_block();
  p.u[p.u[0]++] = threadIdx.x;
}

std::vector<uint32_t> order_under(const char* schedule) {
  emulator::set_schedule(schedule);
  std::vector<uint32_t> u(129);
  u[0] = 1;
  run(threads(128), order_of_threads, {nullptr, nullptr, u.data(), 0});
  return {u.begin() + 1, u.end()};
}

void check_schedules() {
  const auto ascending = order_under("ascending"), descending = order_under("descending");
  for (uint32_t i = 0; i < 128; ++i)
    expect(ascending[i] == i && descending[i] == 127 - i, "an order");
  const auto once = order_under("random:7"), again = order_under("random:7");
  expect(once == again && once != order_under("random:8") && once != ascending, "random orders");
  for (const char* schedule : {"starving:1", "starving:2", "starving:3"}) {
    const auto order = order_under(schedule);
    for (int i = 97; i < 128; ++i) expect(order[i] / 32 == order[96] / 32, "who starves is last");
  }
}

void check_names_of_schedules() {
  for (const char* name : {"", "random", "random:", "random:x", "ascending:1", "upwards"}) try {
      emulator::set_schedule(name);
      expect(*name == '\0', "no schedule");
    } catch (const std::invalid_argument& error) {
      expect(std::string(error.what()).find(name) != std::string::npos, "names what came");
    }
}

void check_made_up_device() {
  rnn_cuda::cuda::DeviceFigures figures;
  expect(figures_of_current_device(&figures) == 0, "the environment's device");
  expect(figures.multiprocessors == 8 && figures.capability_major == 8 &&
             figures.capability_minor == 6 && figures.kernels_major == 8 &&
             figures.kernels_minor == 0 && figures.shared_bytes_per_block == 232448,
         "an H100 but for what the environment says");
  figures.multiprocessors = 3;
  emulator::set_figures(&figures);
  expect(figures_of_current_device(&figures) == 0 && figures.multiprocessors == 3, "was set");
}

// ---- kernels that are wrong ---------------------------------------------------------------------

struct Nothing {
  int n;
};

void shuffle_in_a_branch(Nothing) {
  if (threadIdx.x < 16) shuffle_xor(1.0f, 1);
  sync_warp();
}

void barrier_in_a_branch(Nothing) {
  if (threadIdx.x < 32)
    sync_block();
  else
    sync_block();
}

void barrier_for_half_a_warp(Nothing) {
  if (threadIdx.x % 32 < 16)
    sync_block();
  else
    sync_warp();
}

void early_return(Nothing) {
  if (threadIdx.x == 70) return;
  sync_block();
}

void early_return_of_a_lane(Nothing) {
  if (threadIdx.x == 7) return;
  any_in_warp(true);
}

void shuffle_without_partner(Nothing) { shuffle_xor(1.0f, 16); }

void waits_for_ever(Numbers p) {
  if (threadIdx.x == 0) RNN_CUDA_SPIN_UNTIL(load_acquire(p.u) == 1);
  sync_block();
}

// Each waits for what the other one's turn undoes.
void spins_for_ever(Numbers p) {
  const uint32_t parity = threadIdx.x / 32;
  RNN_CUDA_SPIN_UNTIL((add_release(p.u, 2), load_acquire(p.u) % 2 == 1 + parity));
}

void votes_for_ever(Nothing) {
  while (any_in_warp(true)) {
  }
}

struct Exchange {
  Mbarrier* barriers;
  uint32_t* words;
  __device__ Exchange() {
    Carver carver(shared_memory());
    barriers = carver.take<Mbarrier>(2);
    words = carver.take<uint32_t>(64);
  }
  // The first barrier waits for so many bytes.
  __device__ explicit Exchange(uint32_t bytes) : Exchange() {
    if (threadIdx.x > 0) return;
    barrier_init(barriers, 1);
    barrier_expect(barriers, bytes);
  }
  __device__ void send() { store_async(words + threadIdx.x, 1, barriers, 1 - cluster_rank()); }
};
constexpr size_t kExchangeBytes = 16 + 4 * 64;

void no_barrier_init(Nothing) {
  Exchange e;
  barrier_wait(e.barriers, 0);
}

void too_many_arrivals(Nothing) {
  Exchange e;
  if (threadIdx.x == 0) {
    barrier_init(e.barriers, 1);
    barrier_expect(e.barriers, 4);
    barrier_expect(e.barriers, 4);
  }
}

void too_many_bytes(Nothing) {
  Exchange e;
  if (threadIdx.x == 0) {
    barrier_init(e.barriers, 2);
    barrier_expect(e.barriers, 1 << 20);
  }
}

void too_few_bytes_expected(Nothing) {
  Exchange e(4 * 31);
  cluster_sync();
  e.send();
  barrier_wait(e.barriers, 0);
  barrier_wait(e.barriers, 1);
  cluster_sync();
}

void too_many_bytes_expected(Nothing) {
  Exchange e(4 * 33);
  cluster_sync();
  e.send();
  barrier_wait(e.barriers, 0);
  cluster_sync();
}

void wrong_parity(Nothing) {
  Exchange e;
  if (threadIdx.x == 0) barrier_init(e.barriers, 1);
  sync_block();
  if (threadIdx.x == 0) barrier_expect(e.barriers, 0);
  barrier_wait(e.barriers, 1);
  barrier_wait(e.barriers, 1);
}

// A thread that has not yet looked when the next phase is over too.
void two_phases_late(Nothing) {
  Exchange e;
  if (threadIdx.x == 0) barrier_init(e.barriers, 1);
  sync_block();
  if (threadIdx.x == 0) {
    barrier_expect(e.barriers, 0);
    barrier_expect(e.barriers, 0);
  }
  barrier_wait(e.barriers, 0);
}

void send_before_cluster_sync(Nothing) {
  Exchange e(4 * 32);
  sync_block();
  e.send();
  barrier_wait(e.barriers, 0);
  cluster_sync();
}

void return_before_a_store_arrives(Nothing) {
  Exchange e;
  if (threadIdx.x == 0) {
    barrier_init(e.barriers, 1);
    if (cluster_rank() == 1) barrier_expect(e.barriers, 4 * 32);
  }
  cluster_sync();
  if (cluster_rank() == 0) store_async(e.words + threadIdx.x, 1, e.barriers, 1);
}

void return_without_cluster_sync(Nothing) {
  Exchange e(4 * 32);
  cluster_sync();
  e.send();
  barrier_wait(e.barriers, 0);
}

void expect_what_never_comes(Nothing) {
  Exchange e;
  if (threadIdx.x > 0) return;
  barrier_init(e.barriers, 1);
  barrier_expect(e.barriers, 4);
}

void read_before_a_store_arrives(Numbers p) {
  Exchange e(4 * 32);
  const int i = threadIdx.x;
  cluster_sync();
  e.send();
  cluster_sync();  // is no wait for the stores
  p.u[i] = e.words[i];
  barrier_wait(e.barriers, 0);
  cluster_sync();
}

void send_to_nobody(Nothing) {
  Exchange e;
  store_async(e.words, 1, e.barriers, 2);
}

void send_to_red_zone(Nothing) {
  Exchange e;
  cluster_sync();
  store_async(e.words + 64 + threadIdx.x, 1, e.barriers, 1);
  cluster_sync();
}

void write_past_an_array(Numbers p) {
  Carver carver(shared_memory());
  float* const first = carver.take<float>(10);
  carver.take<float>(10);
  first[p.n] = 1;
}

void misaligned(Numbers p) { load_shared_by_gpu(reinterpret_cast<const Word16*>(p.u + 1)); }

void carve_more_than_asked_for(Nothing) {
  Carver carver(shared_memory());
  carver.take<float>(10);
  carver.take<float>(10);
}

void race_in_block(Numbers p) {
  Carver carver(shared_memory());
  float* const shared = carver.take<float>(64);
  const int i = threadIdx.x;
  shared[i] = i;
  if (p.n == 1) sync_warp();
  if (p.n == 2) shuffle_xor(1.0f, 1);  // orders no memory
  if (p.n == 3) sync_block();
  p.f[i] = shared[i ^ 1];
  if (p.n < 4) return;
  sync_block();
  p.f[i] = shared[i];
}

void race_between_blocks(Numbers p) { p.f[threadIdx.x] = blockIdx.x; }

void unused_counter(Numbers p) {
  if (threadIdx.x > 0) return;
  if (blockIdx.x == 0) {
    p.f[0] = 1;
    if (p.n == 1) add_release(p.u, 1);
  } else {
    if (p.n == 1) RNN_CUDA_SPIN_UNTIL(load_acquire(p.u) == 1);
    p.f[1] = p.f[0];
  }
}

void overwrite_before_it_is_read(Numbers p) {
  Exchange e(4 * 32);
  const int i = threadIdx.x;
  e.words[i] = i;
  cluster_sync();
  const uint32_t before = p.n == 0 ? e.words[31 - i] : 0;
  if (p.n == 0) cluster_sync();
  e.send();
  p.u[cluster_rank() * 32 + i] = p.n == 0 ? before : e.words[31 - i];
  barrier_wait(e.barriers, 0);
  cluster_sync();
}

// ---- cases --------------------------------------------------------------------------------------

float some_floats[64];
double some_doubles[64];
alignas(16) uint32_t some_words[64];
const Numbers numbers(int n) { return {some_floats, some_doubles, some_words, n}; }

LaunchConfig grid(int blocks, bool cooperative) {
  LaunchConfig config = threads(32);
  config.grid_x = blocks;
  config.cooperative = cooperative;
  return config;
}

const LaunchConfig kPair = cluster(2, 32, kExchangeBytes);

template <class P = Nothing>
std::function<void()> launching(const LaunchConfig& config, void (*kernel)(P), P parameters = {}) {
  return [=] { run(config, kernel, parameters); };
}

const std::map<std::string, std::function<void()>> cases = {
    {"shuffles", check_shuffles},
    {"votes", check_votes},
    {"blocks", check_blocks},
    {"shared memory is NaN", check_shared_memory_is_nan},
    {"products of bfloat16", [] { check_products(0); }},
    {"products of float16", [] { check_products(1); }},
    {"products of TF32", [] { check_products(2); }},
    {"conversions", check_conversions},
    {"clusters", check_clusters},
    {"16 bytes to a cluster", [] { check_16_bytes(0); }},
    {"grids", check_grids},
    {"orders", check_schedules},
    {"names of schedules", check_names_of_schedules},
    {"a made-up device", check_made_up_device},

    {"shuffle in a branch", launching(threads(32), shuffle_in_a_branch)},
    {"barrier in a branch", launching(threads(64), barrier_in_a_branch)},
    {"barrier for half a warp", launching(threads(32), barrier_for_half_a_warp)},
    {"early return", launching(threads(96), early_return)},
    {"early return of a lane", launching(threads(32), early_return_of_a_lane)},
    {"shuffle without partner", launching(threads(8), shuffle_without_partner)},
    {"waits for ever", launching(threads(64), waits_for_ever, numbers(0))},
    {"spins for ever", launching(threads(64), spins_for_ever, numbers(0))},
    {"votes for ever", launching(threads(32), votes_for_ever)},
    {"no barrier_init", launching(threads(32, kExchangeBytes), no_barrier_init)},
    {"too many arrivals", launching(threads(32, kExchangeBytes), too_many_arrivals)},
    {"too many bytes", launching(threads(32, kExchangeBytes), too_many_bytes)},
    {"too few bytes expected", launching(kPair, too_few_bytes_expected)},
    {"too many bytes expected", launching(kPair, too_many_bytes_expected)},
    {"wrong parity", launching(threads(64, kExchangeBytes), wrong_parity)},
    {"two phases late", launching(threads(64, kExchangeBytes), two_phases_late)},
    {"send before cluster_sync", launching(kPair, send_before_cluster_sync)},
    {"return without cluster_sync", launching(kPair, return_without_cluster_sync)},
    {"expect what never comes", launching(threads(64, kExchangeBytes), expect_what_never_comes)},
    {"return before a store arrives", launching(kPair, return_before_a_store_arrives)},
    {"read before a store arrives",
     [] {
       run(kPair, read_before_a_store_arrives, numbers(0));
       expect(some_words[0] == 1, "what was read had not arrived");
     }},
    {"send to nobody", launching(kPair, send_to_nobody)},
    {"send to a red zone", launching(kPair, send_to_red_zone)},
    {"send 16 misaligned bytes", [] { check_16_bytes(1); }},
    {"write within an array", launching(threads(1, 96), write_past_an_array, numbers(9))},
    {"write past an array", launching(threads(1, 96), write_past_an_array, numbers(10))},
    {"misaligned", launching(threads(1), misaligned, numbers(0))},
    {"carve more than asked for", launching(threads(32, 87), carve_more_than_asked_for)},
    {"race in a block", launching(threads(64, 256), race_in_block, numbers(0))},
    {"no race after sync_warp", launching(threads(64, 256), race_in_block, numbers(1))},
    {"race after a shuffle", launching(threads(64, 256), race_in_block, numbers(2))},
    {"no race after sync_block", launching(threads(64, 256), race_in_block, numbers(3))},
    {"race between blocks", launching(grid(2, false), race_between_blocks, numbers(0))},
    {"race in a grid", launching(grid(2, true), unused_counter, numbers(0))},
    {"no race after a counter", launching(grid(2, true), unused_counter, numbers(1))},
    {"read before overwritten", launching(kPair, overwrite_before_it_is_read, numbers(0))},
    {"overwritten before read", launching(kPair, overwrite_before_it_is_read, numbers(1))},

    {"too many threads", launching(threads(1025), votes_for_ever)},
    {"too much shared memory", launching(threads(32, 232449), votes_for_ever)},
    {"too large a cluster", launching(cluster(17, 32, 0), votes_for_ever)},
    {"half a cluster",
     [] {
       LaunchConfig config = cluster(4, 32, 0);
       config.grid_x = 6;
       run<Nothing>(config, votes_for_ever, {});
     }},
    {"too large a grid", launching(grid(133, true), votes_for_ever)},
};

}  // namespace check

int main(int argc, char** argv) {
  using namespace check;
  const auto found = cases.find(argc > 1 ? argv[1] : "");
  if (found == cases.end()) {
    for (const auto& [name, _] : cases) std::printf("%s\n", name.c_str());
    return kFailed;
  }
  try {
    found->second();
  } catch (const LaunchFailed& error) {
    std::printf("launch failed: %s\n", error.what());
    return kFailed;
  } catch (const std::exception& error) {
    std::printf("differs: %s\n", error.what());
    return kFailed;
  }
  std::printf("ok\n");
  return 0;
}
