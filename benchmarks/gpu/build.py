"""Stand-alone programs around the kernels, compiled with nvcc.

    python -m benchmarks.gpu.build FOLDER

Each object is kept in FOLDER, as soon as it is compiled, under a hash of all sources and flags. So
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
from rnn_cuda.build import BuildError, find_cuda, find_cxx

# -lineinfo: so that a sanitizer names the line. Every wait of a kernel is bounded: a hang becomes
# an error and not the end of the run.
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-DRNN_CUDA_BOUNDED_SPINS")
INCLUDES = [f"-I{REPOSITORY / folder}" for folder in ("csrc", "tests")]

_PLANNER = tuple(f"csrc/plan/{name}.cpp" for name in ("geometry", "cost", "planner", "override"))
PROGRAMS = {
    "checker": ("tests/native/check_cuda.cpp", "csrc/cuda/*.cu", *_PLANNER),
    "floor": ("benchmarks/gpu/floor.cu", *_PLANNER),
}
"""Sources, as patterns relative to the repository."""


def sources_of(name: str) -> list[Path]:
    """Return a program's sources."""
    return [path for pattern in PROGRAMS[name] for path in sorted(REPOSITORY.glob(pattern))]


def build_program(name: str, folder: Path, archs: Sequence[str] = ()) -> Path:
    """Return a program of `PROGRAMS`, compiled as far as the folder does not hold it.

    Args:
        name: which one; the result has that name in the folder.
        folder: made if need be.
        archs: targets such as ``sm_90``; by default this machine's cards.

    Raises:
        BuildError: there is no nvcc, or the sources do not compile.
    """
    cuda, why = find_cuda()
    if cuda is None:
        raise BuildError(f"{name}: {why}")
    arch_flags = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in archs] or cuda.arch_flags()
    nvcc = [str(cuda.nvcc), *arch_flags, "-ccbin", str(find_cxx())]
    compile_ = [*nvcc, *FLAGS, *INCLUDES]
    digest = hashlib.sha256(" ".join([*compile_, cuda.version]).encode())
    for top in ("csrc", "tests", "benchmarks"):
        for path in sorted((REPOSITORY / top).rglob("*.[ch]*")):
            digest.update(path.read_bytes() if path.is_file() else b"")
    objects = folder / f"objects-{digest.hexdigest()[:12]}"
    objects.mkdir(parents=True, exist_ok=True)
    (folder / name).unlink(missing_ok=True)  # a failed build leaves no older program

    def compiled(source: Path) -> str:
        target = objects / f"{source.stem}.o"
        if not target.is_file():
            language = ["-x", "cu"] if source.suffix == ".cu" or "native" in source.parts else []
            unfinished = target.with_suffix(f".{os.getpid()}")
            _run([*compile_, *language, "-c", str(source), "-o", str(unfinished)], source.name)
            os.replace(unfinished, target)
        return str(target)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        pending = [pool.submit(compiled, source) for source in sources_of(name)]
    _run([*nvcc, *(job.result() for job in pending), "-o", str(folder / name)], name)
    return folder / name


def _run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{what} does not compile:\n{(done.stdout + done.stderr)[-4000:]}")


def find_tool(name: str) -> str:
    """Return a program of the CUDA toolkit, on the PATH or beside nvcc; its name if it is not."""
    cuda, _ = find_cuda()
    beside = str(cuda.nvcc.resolve().parent) if cuda else ""
    return shutil.which(name) or shutil.which(name, path=beside) or name


def main() -> int:
    """Build every program, each whatever becomes of the others; return 1 without a checker."""
    failed = []
    for name in PROGRAMS:
        try:
            print(f"built: {build_program(name, Path(sys.argv[1])).name}", flush=True)
        except (BuildError, OSError) as error:
            print(error, flush=True)
            failed.append(name)
    return 1 if "checker" in failed else 0


if __name__ == "__main__":
    sys.exit(main())
