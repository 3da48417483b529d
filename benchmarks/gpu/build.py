"""Stand-alone programs around the kernels, compiled with nvcc.

    python -m benchmarks.gpu.build FOLDER

Each object is kept in FOLDER, as soon as it is compiled, under a hash of its sources and flags. So
a build that is cut short continues in the next run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.machine import REPOSITORY
from rnn_cuda.build import find_cuda, find_cxx

# -lineinfo: so that a sanitizer names the line. Every wait of a kernel is bounded: a hang becomes
# an error and not the end of the run.
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-DRNN_CUDA_BOUNDED_SPINS")
INCLUDES = ("csrc", "tests")

_PLANNER = tuple(f"csrc/plan/{name}.cpp" for name in ("geometry", "cost", "planner", "override"))
PROGRAMS = {
    "checker": ("tests/native/check_cuda.cpp", "csrc/cuda/*.cu", *_PLANNER),
    "floor": ("benchmarks/gpu/floor.cu", "csrc/plan/geometry.cpp"),
}
"""Sources, as patterns relative to the repository."""


class ProgramError(Exception):
    """A program cannot be built; the message says why."""


def build_program(name: str, folder: Path, archs: Sequence[str] = ()) -> Path:
    """Return a program of `PROGRAMS`, compiled as far as the folder does not hold it.

    Args:
        name: which one; the result has that name in the folder.
        folder: made if need be.
        archs: targets such as ``sm_90``; by default this machine's cards.

    Raises:
        ProgramError: there is no nvcc, or the sources do not compile.
    """
    cuda, why = find_cuda()
    if cuda is None:
        raise ProgramError(f"{name}: {why}")
    arch_flags = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in archs] or cuda.arch_flags()
    nvcc = [str(cuda.nvcc), *FLAGS, *arch_flags, "-ccbin", str(find_cxx())]
    nvcc += [f"-I{REPOSITORY / folder}" for folder in INCLUDES]
    sources = sources_of(name)
    objects = folder / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    (folder / name).unlink(missing_ok=True)  # a failed build leaves no older program
    common = hashlib.sha256(" ".join([*nvcc, cuda.version]).encode())
    for pattern in ("*.h", "*.cuh"):
        for header in sorted(h for i in INCLUDES for h in (REPOSITORY / i).rglob(pattern)):
            common.update(header.read_bytes())

    def compiled(source: Path) -> Path:
        digest = common.copy()
        digest.update(source.read_bytes())
        target = objects / f"{source.stem}-{digest.hexdigest()[:12]}.o"
        if not target.is_file():
            language = ["-x", "cu"] if source.suffix == ".cu" or "native" in source.parts else []
            made = target.with_suffix(f".{os.getpid()}")
            _run([*nvcc, *language, "-c", str(source), "-o", str(made)], source.name)
            os.replace(made, target)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        pending = [pool.submit(compiled, source) for source in sources]
        linked = [str(job.result()) for job in pending]
    _run([*nvcc, *linked, "-o", str(folder / name)], name)
    return folder / name


def sources_of(name: str) -> list[Path]:
    """Return a program's sources; ProgramError where a pattern has none."""
    sources: list[Path] = []
    for pattern in PROGRAMS[name]:
        matches = sorted(REPOSITORY.glob(pattern))
        if not matches:
            raise ProgramError(f"{name}: there is no {pattern} in this checkout")
        sources += matches
    return sources


def _run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise ProgramError(f"{what} does not compile:\n{done.stdout[-4000:]}")


def find_tool(name: str) -> str | None:
    """Return a program of the CUDA toolkit, on the PATH or beside nvcc."""
    cuda, _ = find_cuda()
    beside = [] if cuda is None else [cuda.nvcc.resolve().parent, cuda.include.parent / "bin"]
    places = [shutil.which(name), *(shutil.which(name, path=str(folder)) for folder in beside)]
    return next(filter(None, places), None)


def main() -> int:
    """Build every program, each whatever becomes of the others; return 1 without a checker."""
    built, failed = [], []
    for name in PROGRAMS:
        try:
            build_program(name, Path(sys.argv[1]))
            built.append(name)
        except (ProgramError, OSError) as error:
            failed.append(name)
            print(error, flush=True)
    print(
        f"built: {', '.join(built) or 'nothing'}"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if "checker" in failed else 0


if __name__ == "__main__":
    sys.exit(main())
