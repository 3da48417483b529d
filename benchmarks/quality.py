"""What is not a time: errors against float64, peak memory, and the machine's best rate."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import TABLE_SHAPES, Case, Shape
from benchmarks.machine import REPOSITORY
from benchmarks.problem import Problem, relative_error
from rnn_cuda import FusedRNN

# ---- errors --------------------------------------------------------------------------------------

ERROR_GATE = 2e-6
"""FusedRNN's error may not exceed it wherever torch.nn.RNN's own does not."""

QUANTITIES = ("output", "input", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""The values, and then what the gradient is taken of."""


@dataclass(frozen=True)
class AccuracyCase:
    """Float32 data whose exact answer float64 arithmetic gives."""

    name: str
    T: int
    B: int
    I: int
    H: int
    weight_scale: float = 1.0
    input_scale: float = 1.0
    state_scale: float = 1.0
    bias: bool = True
    nonlinearity: str = "tanh"


_ADVERSARIAL: dict[str, dict[str, Any]] = {
    "saturated: weights x 20": {"weight_scale": 20.0},
    # Without biases and initial state the states themselves are denormal.
    "denormal inputs, 1e-40": {"input_scale": 1e-40, "state_scale": 0.0, "bias": False},
    "denormal inputs beside a bias": {"input_scale": 1e-40},
    "large inputs, 1e30": {"input_scale": 1e30},
    "large inputs, 1e30, relu": {"input_scale": 1e30, "nonlinearity": "relu"},
    "exact zeros": {"input_scale": 0.0, "state_scale": 0.0, "bias": False},
    "weights zero": {"weight_scale": 0.0},
}


def accuracy_cases(*, quick: bool = False) -> list[AccuracyCase]:
    """Return random data on the table's shapes and a longer one, then adversarial inputs."""
    shapes: tuple[Shape, ...] = (*TABLE_SHAPES, (4096, 16, 8, 64))
    adversarial: Shape = (100, 16, 8, 64)
    if quick:
        shapes, adversarial = ((6, 3, 2, 8), (5, 2, 64, 16)), (4, 2, 3, 8)
    random = [AccuracyCase("random", *shape) for shape in shapes]
    return random + [AccuracyCase(name, *adversarial, **o) for name, o in _ADVERSARIAL.items()]


def errors_of(case: AccuracyCase) -> dict[str, Any]:
    """Return the norm-wise relative errors of each contestant, by quantity.

    Returns:
        JSON-ready: ``case``; ``errors``, by contestant and quantity, infinite where the exact value
        is zero or overflows float32, and the result is not the same; ``passed``.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = {"bias": case.bias, "nonlinearity": case.nonlinearity}
    exact = nn.RNN(case.I, case.H, **options)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.mul_(case.weight_scale)
    x = case.input_scale * torch.randn(case.T, case.B, case.I)
    h0 = case.state_scale * torch.tanh(torch.randn(1, case.B, case.H))
    dy = torch.randn(case.T, case.B, case.H)

    def values_and_gradients(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, h0)]
        output = module(*leaves)[0]
        gradients = torch.autograd.grad(output, [*leaves, *module.parameters()], dy.to(dtype))
        # Without biases, the last two names are of nothing.
        return dict(zip(QUANTITIES, [output, *gradients], strict=False))

    errors: dict[str, dict[str, float]] = {}
    modules = {"torch_rnn": nn.RNN, "fused_rnn": FusedRNN}
    weights = exact.state_dict()
    expected = values_and_gradients(exact.double(), torch.float64)
    for name, kind in modules.items():
        module = kind(case.I, case.H, **options)
        module.load_state_dict(weights)
        actual = values_and_gradients(module, torch.float32)
        errors[name] = {q: relative_error(actual[q], exactly) for q, exactly in expected.items()}
    return {"case": asdict(case), "errors": errors, "passed": passes(errors)}


def passes(errors: Mapping[str, Mapping[str, float]]) -> bool:
    """Return whether ours are within the gate wherever torch.nn.RNN's are."""
    pairs = [(errors["fused_rnn"][q], torchs) for q, torchs in errors["torch_rnn"].items()]
    return all(ours <= ERROR_GATE for ours, torchs in pairs if torchs <= ERROR_GATE)


# ---- memory --------------------------------------------------------------------------------------

MEMORY_GATE = 1.2
"""Allowed peak of FusedRNN's training step, in units of T * B * H * 4 bytes."""

MEMORY_GATE_FROM = 32 * 2**20
"""The gate holds where a unit has so many bytes; below, most memory does not grow with T."""


def memory_unit(case: Case) -> int:
    """Return the bytes of one float32 sequence of states, T * B * H * 4."""
    return 4 * case.T * case.B * case.H


def peak_bytes(case: Case, name: str) -> int:
    """Return by how much the resident size of this process grows at its peak, in a fresh process.

    The same work on a tiny problem goes first, so that libraries, kernels and threads are there.
    """
    from benchmarks.contestants import CONTESTANTS

    contestant = CONTESTANTS[name]
    contestant.prepare(Problem(replace(case, T=8, B=max(4, torch.get_num_threads())))).run()
    work = contestant.prepare(Problem(case))
    # A step that reuses what was freed would seem to need less than it does.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present size
    work.run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}, which the memory suite reads")
    return 1024 * int(match[1])


# ---- the best rate -------------------------------------------------------------------------------

# Everything stays in registers: twelve sums, more than any processor has multiply-adds under way.
_MULTIPLY_ADDS = """
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
def multiply_add_rate() -> float | None:
    """Return float32 operations per second of one core, from register to register.

    In vectors that the kernel is compiled for: no product of matrices can be faster. None where
    the program does not compile.
    """
    from rnn_cuda.build import BuildError, Toolchain, torch_cxx_standard, torch_include_dirs

    try:
        toolchain = Toolchain.discover()
        folders = [REPOSITORY / "csrc" / "cpu", *torch_include_dirs()]
        flags = [f"-std={torch_cxx_standard()}", "-O3", "-ffp-contract=fast", *toolchain.simd_flags]
        with tempfile.TemporaryDirectory() as folder:
            source, binary = Path(folder) / "rate.cpp", Path(folder) / "rate"
            source.write_text(_MULTIPLY_ADDS)
            command = [str(toolchain.cxx), *flags, *(f"-I{f}" for f in folders), str(source), "-o"]
            subprocess.run([*command, str(binary)], check=True, capture_output=True, timeout=60)
            done = subprocess.run([str(binary)], check=True, capture_output=True, timeout=60)
        return float(done.stdout)
    except (BuildError, OSError, subprocess.SubprocessError, ValueError):
        return None
