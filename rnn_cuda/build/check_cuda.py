"""Compile the CUDA kernels for every supported architecture, look at them, link and load them.

No GPU is needed. A spilled register or an array in local memory turns on-chip traffic into memory
traffic at every time step, so either is a failure. So is a library that does not link, load and
register its operators with the installed torch, even a build without CUDA.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rnn_cuda.build.cache import LOG_NAME, build
from rnn_cuda.build.recipe import Recipe
from rnn_cuda.build.toolchain import BuildError

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
"""Machine targets that the kernels have to compile for."""

_LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
for name in ("layer_forward", "layer_gradients", "linear_recurrence"):
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"rnn_cuda::{name}", "CUDA"):
        sys.exit(f"{name} has no CUDA kernel")
"""


@dataclass(frozen=True)
class KernelUsage:
    """What ptxas reports of one kernel: registers a thread, bytes a thread."""

    kernel: str
    arch: str
    registers: int
    spill_bytes: int
    local_bytes: int

    @property
    def is_clean(self) -> bool:
        """Whether everything that a thread holds stays in registers."""
        return self.spill_bytes == 0 and self.local_bytes == 0


def parse_ptxas(log: str) -> list[KernelUsage]:
    """Read the kernels' usage off the output of ``nvcc -Xptxas -v``.

    ptxas names a kernel ("Compiling entry function ..."), then its stack frame and spills, then its
    registers. The stack frame is the local memory: spills and arrays indexed at run time.
    """
    header = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
    frame = re.compile(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    registers = re.compile(r"Used (\d+) registers")
    usages = []
    for block in re.split(r"(?=Compiling entry function)", log)[1:]:
        kernel, arch = _match(header, block).groups()
        local, stores, loads = map(int, _match(frame, block).groups())
        used = int(_match(registers, block)[1])
        usages.append(KernelUsage(kernel, arch, used, stores + loads, local))
    return usages


def _match(pattern: re.Pattern[str], block: str) -> re.Match[str]:
    match = pattern.search(block)
    if match is None:
        raise ValueError(f"ptxas printed no {pattern.pattern!r} in:\n{block}")
    return match


def check_cuda(source_dir: Path, cache_dir: Path | None = None) -> int:
    """Build the CUDA library for all of :data:`ARCHITECTURES`, look at each kernel, load it.

    Returns:
        0 only if every kernel is clean everywhere and the library registers its operators.

    Raises:
        BuildError: the sources do not compile or do not link.
    """
    if not any(source_dir.glob("cuda/*.cu")):
        raise BuildError(f"There are no CUDA sources in {source_dir / 'cuda'} to check.")
    recipe = Recipe.create(source_dir, cache_dir, kernels="cuda")
    if recipe.cuda is None:
        raise BuildError(f"Cannot check the CUDA kernels: {recipe.cuda_note}.")
    cuda = dataclasses.replace(recipe.cuda, archs=ARCHITECTURES)
    library = build(dataclasses.replace(recipe, cuda=cuda))
    usages = parse_ptxas((library.parent / LOG_NAME).read_text())
    _print_table(usages)
    unclean = [usage for usage in usages if not usage.is_clean]
    for usage in unclean:
        print(
            f"not clean: {usage.kernel} for {usage.arch}: {usage.spill_bytes} bytes spilled, "
            f"{usage.local_bytes} bytes of local memory"
        )
    print(f"{len(usages)} kernels, {len(unclean)} with spills or local memory")
    problem = _load(library)
    print(problem or "the library loads and registers its operators")
    if not usages:
        print("rnn_cuda: no kernel was found in the CUDA sources", file=sys.stderr)
    return 1 if unclean or problem or not usages else 0


def _load(library: Path) -> str:
    """Load the library in a process of its own; return what went wrong, or nothing."""
    result = subprocess.run(
        [sys.executable, "-c", _LOAD, str(library)], capture_output=True, text=True, check=False
    )
    return "" if result.returncode == 0 else f"the library does not load: {result.stderr.strip()}"


def _print_table(usages: list[KernelUsage]) -> None:
    print("arch      kernels  registers at most")
    for arch in ARCHITECTURES:
        registers = [usage.registers for usage in usages if usage.arch == arch]
        print(f"{arch:8}  {len(registers):7}  {max(registers, default=0):17}")
