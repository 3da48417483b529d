// Prints how many float32 operations a second one core does from register to register: twelve sums,
// more than any processor has multiply-adds under way.
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "vector.h"

using namespace rnn_cuda::cpu;

int main(int count, char**) {
  constexpr int kSums = 12, kRounds = 20000, kBatches = 200;
  const Vec<float> a = broadcast(1.0f / static_cast<float>(count + 1)), b = broadcast(1.0f);
  Vec<float> sums[kSums] = {};
  double fastest = 1e9;
  for (int batch = 0; batch < kBatches; ++batch) {
    const auto start = std::chrono::steady_clock::now();
    for (int round = 0; round < kRounds; ++round)
#pragma GCC unroll 12
      for (int i = 0; i < kSums; ++i) sums[i] = multiply_add(b, sums[i], a);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    fastest = std::min(fastest, elapsed.count());
  }
  float total = 0;
  for (const auto& sum : sums) total += sum[0];
  // Each of them has come to b / (1 - a), or the loop was not what was timed.
  const float expected = kSums / (1 - a[0]);
  if (!(total > 0.999f * expected && total < 1.001f * expected)) return 1;
  std::printf("%.9g\n", 2.0 * kLanes<float> * kSums * kRounds / fastest);
}
