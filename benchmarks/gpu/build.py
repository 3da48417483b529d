"""The stand-alone checker of the kernels (tests/native/check_cuda.cpp), compiled with nvcc.

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
PLANNER = [f"csrc/plan/{name}.cpp" for name in ("geometry", "cost", "planner", "override")]


def sources() -> list[Path]:
    """Return the program's sources."""
    patterns = ["tests/native/check_cuda.cpp", "csrc/cuda/*.cu", *PLANNER]
    return [path for pattern in patterns for path in sorted(REPOSITORY.glob(pattern))]


def build_checker(folder: Path) -> Path:
    """Return the program, compiled for this machine's cards as far as the folder does not hold it.

    Raises:
        BuildError: there is no nvcc, or the sources do not compile.
    """
    cuda, why = find_cuda()
    if cuda is None:
        raise BuildError(f"checker: {why}")
    nvcc = [str(cuda.nvcc), *cuda.arch_flags(), "-ccbin", str(find_cxx())]
    compile_ = [*nvcc, *FLAGS, *INCLUDES]
    digest = hashlib.sha256(" ".join([*compile_, cuda.version]).encode())
    for top in ("csrc", "tests"):
        for path in sorted((REPOSITORY / top).rglob("*.[ch]*")):
            digest.update(path.read_bytes() if path.is_file() else b"")
    program, objects = folder / "checker", folder / f"objects-{digest.hexdigest()[:12]}"
    objects.mkdir(parents=True, exist_ok=True)
    program.unlink(missing_ok=True)  # a failed build leaves no older program

    def compiled(source: Path) -> str:
        target = objects / f"{source.stem}.o"
        if not target.is_file():
            language = ["-x", "cu"] if source.suffix == ".cu" or "native" in source.parts else []
            unfinished = target.with_suffix(f".{os.getpid()}")
            _run([*compile_, *language, "-c", str(source), "-o", str(unfinished)], source.name)
            os.replace(unfinished, target)
        return str(target)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        pending = [pool.submit(compiled, source) for source in sources()]
    _run([*nvcc, *(job.result() for job in pending), "-o", str(program)], program.name)
    return program


def _run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{what} does not compile:\n{(done.stdout + done.stderr)[-4000:]}")


def find_tool(name: str) -> str:
    """Return a program of the CUDA toolkit, on the PATH or beside nvcc; its name if it is not."""
    cuda, _ = find_cuda()
    beside = str(cuda.nvcc.resolve().parent) if cuda else ""
    return shutil.which(name) or shutil.which(name, path=beside) or name


if __name__ == "__main__":
    try:
        print(f"built: {build_checker(Path(sys.argv[1])).name}", flush=True)
    except (BuildError, OSError) as error:
        sys.exit(str(error))
