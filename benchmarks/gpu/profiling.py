"""One training step under a profiler: the first of ncu, nsys and torch's own that works here.

python -m benchmarks.gpu.profiling DEVICE     what the first two look at
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.cases import OURS, GpuCase, all_cases, rehearsal_cases
from benchmarks.gpu.context import Context, SkippedError
from benchmarks.gpu.native import find_tool
from benchmarks.gpu.problems import CONTENDERS, DeviceProblem, Work
from benchmarks.results import write_text

STEPS = 3

_KERNELS = "regex:walk_kernel|step_kernel"


def profile(context: Context) -> None:
    """Write ``profile.txt``; the last line says which profiler it was.

    Raises:
        SkippedError: none of them works here.
    """
    end = time.monotonic() + context.seconds - 3
    failures = []
    for name, command in commands(context):
        left = end - time.monotonic()
        if left < 5:
            failures.append(f"{name}: no time left")
            continue
        text, why = _output_of(command, left if name == "torch" else 0.7 * left)
        if why is None:
            write_text(context.work / "profile.txt", f"{name}\n{readable(text)}\n")
            print(readable(text))
            tried = f" ({'; '.join(failures)})" if failures else ""
            print(f"{name}: {profiled_case(context.rehearsal).label}{tried}")
            return
        failures.append(f"{name}: {why}")
    raise SkippedError("; ".join(failures))


def profiled_case(rehearsal: bool) -> GpuCase:
    """Return the case that is looked at: the one that matters most."""
    return (rehearsal_cases() if rehearsal else all_cases())[0]


def commands(context: Context) -> list[tuple[str, list[str]]]:
    """Return the profilers found here, the one that says most first, with their commands."""
    step = [sys.executable, "-m", "benchmarks.gpu.profiling", context.device]
    found = []
    ncu, nsys = (None, None) if context.rehearsal else (find_tool("ncu"), find_tool("nsys"))
    if ncu is not None:
        sections = ["--section", "WarpStateStats", "--section", "MemoryWorkloadAnalysis"]
        # The card's clocks are as they are: it is not ours to change them.
        options = ["--clock-control", "none", "--set", "basic", *sections]
        found.append(("ncu", [ncu, *options, "-k", _KERNELS, "-c", "2", *step]))
    if nsys is not None:
        report = str(context.work / "nsys")
        options = ["--trace", "cuda", "--stats", "true", "--force-overwrite", "true", "-o", report]
        found.append(("nsys", [nsys, "profile", *options, *step]))
    found.append(("torch", [*step, "--torch-profiler"]))
    return found


def _output_of(command: Sequence[str], seconds: float) -> tuple[str, str | None]:
    """Return what it printed, and why that is no profile, or None."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return "", f"ended after {seconds:.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    complaint = next((line for line in lines if "==ERROR==" in line or "No kernels" in line), None)
    if done.returncode != 0 or complaint is not None:
        return done.stdout, (complaint or (lines[-1] if lines else "said nothing"))[:150]
    return done.stdout, None


def readable(text: str) -> str:
    """Return a profile without the profiler's progress and the paths in it."""
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line and not line.startswith("=="))


# ---- what is looked at ---------------------------------------------------------------------------


def _work(device: str) -> Work:
    problem = DeviceProblem(profiled_case(device == "cpu"), device)
    work = CONTENDERS[OURS].work(problem)
    work()  # compiled, planned, allocated
    return work


def _run(work: Work, device: str) -> None:
    for _ in range(STEPS):
        work()
    if device != "cpu":
        torch.cuda.synchronize()


def _under_torch(work: Work, device: str) -> str:
    kinds = torch.profiler.ProfilerActivity
    activities: list[Any] = [kinds.CPU] if device == "cpu" else [kinds.CPU, kinds.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        _run(work, device)
    order = "self_cpu_time_total" if device == "cpu" else "self_cuda_time_total"
    return recorded.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60)


def main(arguments: Sequence[str]) -> None:
    """Do the steps; with ``--torch-profiler`` print where their time went."""
    device = arguments[0]
    work = _work(device)
    if "--torch-profiler" in arguments:
        print(_under_torch(work, device))
    else:
        _run(work, device)


if __name__ == "__main__":
    main(sys.argv[1:])
