"""What is not a time: peak memory, and the machine's best rate."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.problem import Problem


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
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
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


@functools.cache
def multiply_add_rate() -> float | None:
    """Return float32 operations per second of one core, from register to register.

    In vectors that the kernel is compiled for: no product of matrices can be faster. None where
    the program does not compile.
    """
    from rnn_cuda.build import BuildError, Toolchain, default_source_dir, torch_cxx_standard
    from rnn_cuda.build import torch_include_dirs as torch_includes

    source = Path(__file__).with_name("multiply_adds.cpp")
    try:
        toolchain = Toolchain.discover()
        flags = [f"-std={torch_cxx_standard()}", "-O3", "-ffp-contract=fast", *toolchain.simd_flags]
        flags += [f"-I{folder}" for folder in (default_source_dir() / "cpu", *torch_includes())]
        with tempfile.TemporaryDirectory() as folder:
            program = f"{folder}/rate"
            compile_ = [str(toolchain.cxx), *flags, str(source), "-o", program]
            subprocess.run(compile_, check=True, capture_output=True, timeout=60)
            return float(subprocess.check_output([program], timeout=60))
    except (BuildError, OSError, subprocess.SubprocessError, ValueError):
        return None
