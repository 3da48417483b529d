"""Compile the CUDA kernels for every supported architecture and report what ptxas says of them.

No GPU is needed. A spilled register or an array in local memory turns on-chip traffic into memory
traffic at every time step, so either counts as a failure.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rnn_cuda._toolchain import CudaToolchain, find_cuda, find_cxx

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
"""Machine targets that the kernels have to compile for."""


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


def check_cuda(source_dir: Path) -> int:
    """Compile ``cuda/*.cu``, print a table; return 0 only if every kernel is clean everywhere."""
    sources = sorted(source_dir.glob("cuda/*.cu"))
    if not sources:
        print(f"There are no CUDA sources in {source_dir / 'cuda'} yet: nothing to check.")
        return 0
    cuda, note = find_cuda()
    if cuda is None:
        print(f"rnn_cuda: cannot check the CUDA kernels: {note}", file=sys.stderr)
        return 1
    usages: list[KernelUsage] = []
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            for arch in ARCHITECTURES:
                done = _compile(cuda, source, arch, Path(folder) / "kernel.cubin")
                if done.returncode == 0:
                    usages += parse_ptxas(done.stdout)
                else:
                    failures += 1
                    print(f"{source.name} does not compile for {arch}:\n{done.stdout}")
    _print_table(usages)
    unclean = sum(not usage.is_clean for usage in usages)
    print(f"{len(usages)} kernels, {unclean} with spills or local memory, {failures} not compiled")
    if not usages:
        print("rnn_cuda: no kernel was found in the CUDA sources", file=sys.stderr)
    return 1 if failures or unclean or not usages else 0


def _compile(
    cuda: CudaToolchain, source: Path, arch: str, output: Path
) -> subprocess.CompletedProcess[str]:
    command = [
        *(str(cuda.nvcc), "-cubin", f"-arch={arch}", "-std=c++17", "-O3"),
        *("-ccbin", str(find_cxx()), "-I", str(source.parent.parent)),
        *("-Xptxas", "-v,-warn-spills,-warn-lmem-usage"),
        *(str(source), "-o", str(output)),
    ]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def _print_table(usages: list[KernelUsage]) -> None:
    width = max([len("kernel"), *(len(usage.kernel) for usage in usages)])
    print(f"{'kernel':{width}}  {'arch':8}  registers  spilled bytes  local bytes")
    for usage in usages:
        mark = "" if usage.is_clean else "  <-- not clean"
        print(
            f"{usage.kernel:{width}}  {usage.arch:8}  {usage.registers:9}  {usage.spill_bytes:13}"
            f"  {usage.local_bytes:11}{mark}"
        )
