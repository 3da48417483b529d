"""Stand-alone programs around the kernels, compiled with nvcc and kept until a source changes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.context import StageError
from benchmarks.machine import REPOSITORY
from rnn_cuda.build import CudaToolchain, find_cuda, find_cxx

_SOURCES = REPOSITORY / "csrc"

# -lineinfo: so that a sanitizer names the line. Every wait of a kernel is bounded: a hang becomes
# an error and not the end of the run.
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-DRNN_CUDA_BOUNDED_SPINS", "-I", str(_SOURCES))

PLANNER = tuple(f"csrc/plan/{name}.cpp" for name in ("geometry", "cost", "planner", "override"))


@dataclass(frozen=True)
class Program:
    """Sources, as patterns relative to the repository, that make a program."""

    name: str
    sources: tuple[str, ...]


CHECKER = Program("checker", ("tests/native/check_cuda.cpp", "csrc/cuda/*.cu", *PLANNER))
FLOOR = Program("floor", ("benchmarks/gpu/floor.cu", "csrc/plan/geometry.cpp"))


def build_program(program: Program, folder: Path, archs: Sequence[str] | None = None) -> Path:
    """Return the program, compiled first if the folder does not hold it.

    Args:
        program: what to compile.
        folder: where programs are kept; made if need be.
        archs: targets such as ``sm_90``; by default this machine's cards.

    Raises:
        StageError: there is no nvcc, or the sources do not compile; the message says which.
    """
    cuda, why = find_cuda()
    if cuda is None:
        raise StageError(f"{program.name}: {why}")
    sources = sources_of(program)
    arch_flags = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in archs or []]
    flags = [*FLAGS, "-ccbin", str(find_cxx()), *(arch_flags or cuda.arch_flags())]
    executable = folder / f"{program.name}-{_key(sources, [*flags, cuda.version])}"
    if not executable.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / program.name
            _compile_and_link(cuda, sources, flags, built)
            os.replace(built, executable)
    return executable


def sources_of(program: Program) -> list[Path]:
    """Return the program's sources.

    Raises:
        StageError: there is none for one of the patterns.
    """
    found: list[Path] = []
    for pattern in program.sources:
        matches = sorted(REPOSITORY.glob(pattern))
        if not matches:
            raise StageError(f"{program.name}: there is no {pattern} in this checkout")
        found += matches
    return found


def _key(sources: Sequence[Path], flags: Sequence[str]) -> str:
    headers = [path for pattern in ("*.h", "*.cuh") for path in _SOURCES.rglob(pattern)]
    headers += (REPOSITORY / "tests").glob("*/*.h")
    digest = hashlib.sha256("\n".join(flags).encode())
    for path in [*sources, *sorted(headers)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _compile_and_link(
    cuda: CudaToolchain, sources: Sequence[Path], flags: Sequence[str], program: Path
) -> None:
    objects = [program.with_name(f"{i}-{source.name}.o") for i, source in enumerate(sources)]
    nvcc = str(cuda.nvcc)

    def compile_one(source: Path, output: Path) -> str | None:
        language = ["-x", "cu"] if source.suffix == ".cu" or "native" in source.parts else []
        return _failure([nvcc, *flags, *language, "-c", str(source), "-o", str(output)])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        failures = list(pool.map(compile_one, sources, objects))
    for source, failure in zip(sources, failures, strict=True):
        if failure is not None:
            raise StageError(f"{source.name} does not compile:\n{failure}")
    failure = _failure([nvcc, *flags, *map(str, objects), "-o", str(program)])
    if failure is not None:
        raise StageError(f"{program.name} does not link:\n{failure}")


def _failure(command: Sequence[str]) -> str | None:
    """Return what a failed command had to say, None if it did not fail."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return None if done.returncode == 0 else done.stdout[-4000:]


def find_tool(name: str) -> str | None:
    """Return a program of the CUDA toolkit, on the PATH or beside nvcc."""
    cuda, _ = find_cuda()
    beside = [] if cuda is None else [cuda.nvcc.resolve().parent, cuda.include.parent / "bin"]
    return shutil.which(name) or next(
        (found for folder in beside if (found := shutil.which(name, path=str(folder)))), None
    )
