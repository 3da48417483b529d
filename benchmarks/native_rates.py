"""What this machine can do, measured by small programs around the kernel's own headers."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

from rnn_cuda.build import BuildError, Toolchain, torch_cxx_standard, torch_include_dirs

_HEADERS = Path(__file__).resolve().parents[1] / "csrc" / "cpu"

_BARRIER_PROGRAM = """
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
#include "team.h"

int main(int, char** arguments) {
  const int size = std::atoi(arguments[1]), batches = 100, meetings = 4000;
  rnn_cuda::cpu::SpinBarrier barrier;
  const auto meet = [&] { for (int i = 0; i < meetings; ++i) barrier.wait(size); };
  std::vector<std::thread> others;
  for (int i = 1; i < size; ++i)
    others.emplace_back([&] { for (int batch = 0; batch < batches; ++batch) meet(); });
  double fastest = 1e9;
  for (int batch = 0; batch < batches; ++batch) {
    const auto start = std::chrono::steady_clock::now();
    meet();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    fastest = std::min(fastest, elapsed.count() / meetings);
  }
  for (auto& other : others) other.join();
  std::printf("%.9g\\n", fastest);
}
"""

# Everything stays in registers: twelve sums, more than any processor has multiply-adds under way.
_MULTIPLY_ADD_PROGRAM = """
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
  std::printf("%.9g\\n", 2.0 * kLanes<float> * kSums * kRounds / fastest);
}
"""


@functools.cache
def barrier_seconds(threads: int) -> tuple[float | None, str | None]:
    """Return the time that the kernel's own barrier takes, or None and why it was not measured."""
    if threads == 1:
        return 0.0, None
    return _measure(_BARRIER_PROGRAM, str(threads))


@functools.cache
def multiply_add_rate() -> tuple[float | None, str | None]:
    """Return the float32 operations per second that one core's multiply-adds come to at best.

    In the vectors that the kernel is compiled for, from register to register: no product of
    matrices can be faster. Or None, and why it was not measured.
    """
    return _measure(_MULTIPLY_ADD_PROGRAM)


def _measure(program: str, *arguments: str) -> tuple[float | None, str | None]:
    """Compile a program as the kernel is, and return the number it prints."""
    try:
        toolchain = Toolchain.discover()
        includes = [f"-I{folder}" for folder in (_HEADERS, *torch_include_dirs())]
        flags = [f"-std={torch_cxx_standard()}", "-O3", "-ffp-contract=fast", "-pthread"]
        with tempfile.TemporaryDirectory() as folder:
            source, binary = Path(folder) / "measure.cpp", Path(folder) / "measure"
            source.write_text(program)
            _run(
                *(str(toolchain.cxx), *flags, *toolchain.simd_flags, *includes),
                *(str(source), "-o", str(binary)),
            )
            return float(_run(str(binary), *arguments)), None
    except (BuildError, OSError, subprocess.SubprocessError, ValueError) as error:
        return None, f"not measured: {type(error).__name__}"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout
