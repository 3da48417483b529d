"""C++ compiler, ninja, and what PyTorch needs to be compiled against."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why and what to do about it."""


class CompilerNotFoundError(BuildError):
    """A program that compiling needs is not installed; the message says what to install."""


_ANSWER_SECONDS = 60
"""How long a compiler or a driver may take to print its version."""

_SIMD_FLAGS = {
    "AVX512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
        *("-mavx2", "-mfma", "-mf16c"),
    ),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler, and the processor that it compiles for."""

    cxx: Path
    cxx_version: str
    cpu_capability: str

    @classmethod
    def discover(cls) -> Toolchain:
        """Look at this machine and at the environment.

        Raises:
            CompilerNotFoundError: there is no C++ compiler.
            BuildError: the platform is not supported, or $CXX cannot be started.
        """
        if not sys.platform.startswith("linux"):
            raise BuildError(
                f"rnn_cuda's kernels are compiled on Linux only; this platform is {sys.platform!r}."
            )
        cxx = find_cxx()
        return cls(
            cxx=cxx,
            cxx_version=output_of([cxx, "--version"]).partition("\n")[0],
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
        )

    @property
    def simd_flags(self) -> tuple[str, ...]:
        """Instruction sets that torch finds usable here (ATEN_CPU_CAPABILITY lowers them).

        Never ``-march=native``: a cache folder may be shared by unequal machines, and the cache key
        knows the capability but not the processor.
        """
        flags = _SIMD_FLAGS.get(self.cpu_capability, ())
        # torch names the instruction apart from the capabilities, and not in every version.
        has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        if self.cpu_capability == "AVX512" and has_bf16():
            flags += ("-mavx512bf16",)
        return flags

    @property
    def openmp_link_flags(self) -> list[str]:
        """Flags that link the OpenMP runtime that torch itself has loaded.

        PyTorch's wheels bundle a libgomp, in some releases under a name of their own. A second
        runtime in the process would have its own threads and ignore ``torch.set_num_threads``.
        """
        bundled = sorted(torch_library_dir().glob("libgomp*.so*"))
        # clang calls LLVM's runtime, which libgomp cannot stand in for.
        if bundled and "clang" not in self.cxx_version:
            return [f"-l:{bundled[0].name}"]
        return ["-fopenmp"]


def torch_include_dirs() -> list[Path]:
    """Return the folders of torch's C++ headers.

    ``torch.utils.cpp_extension.include_paths`` says the same, but importing it needs setuptools
    and logs a warning wherever there is a CUDA toolkit without a GPU.
    """
    include = Path(torch.__file__).parent / "include"
    return [include, include / "torch" / "csrc" / "api" / "include"]


def torch_library_dir() -> Path:
    """Return the folder of torch's shared libraries."""
    return Path(torch.__file__).parent / "lib"


def torch_cxx_standard() -> str:
    """Return the C++ standard of torch's headers: C++17 up to torch 2.11, C++20 from 2.12 on."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return "c++20" if (major, minor) >= (2, 12) else "c++17"


def find_cxx() -> Path:
    """Return the C++ compiler: $CXX, else the first of g++, c++ and clang++ on the PATH.

    Raises:
        CompilerNotFoundError: there is none, or $CXX names a program that does not exist.
    """
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["g++", "c++", "clang++"]:
        if path := shutil.which(name):
            return Path(path)
    problem = f"CXX={chosen!r} is not a program" if chosen else "no C++ compiler on the PATH"
    if chosen and " " in chosen.strip():
        problem += ", and it takes no arguments"
    raise CompilerNotFoundError(
        f"{problem}. Install g++ 11 or newer (Debian, Ubuntu: apt install g++; Fedora: dnf install "
        "gcc-c++; conda: conda install gxx), or set CXX to a compiler."
    )


def find_ninja() -> Path:
    """Return the ninja executable, of the ``ninja`` PyPI package if it is installed.

    Raises:
        CompilerNotFoundError: there is none.
    """
    try:
        # The package's own folder comes first: with an environment that was not activated,
        # as in `.venv/bin/python -m pytest`, its scripts are not on the PATH.
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    search_path = os.pathsep.join(filter(None, [BIN_DIR, os.environ.get("PATH", os.defpath)]))
    if path := shutil.which("ninja", path=search_path):
        return Path(path)
    raise CompilerNotFoundError("ninja was not found. Install it: pip install ninja.")


def output_of(command: list[Path | str]) -> str:
    """Return what the command prints on either stream, whatever its exit status.

    Raises:
        BuildError: the program cannot be started, or does not end.
    """
    try:
        done = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            check=False,
            timeout=_ANSWER_SECONDS,
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not answer in {_ANSWER_SECONDS} s") from error
    return done.stdout
