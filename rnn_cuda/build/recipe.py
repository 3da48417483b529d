"""What to compile, with which flags, and the key under which the result is cached."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rnn_cuda.build.cuda_toolchain import CudaToolchain, find_cuda, listed_archs
from rnn_cuda.build.toolchain import (
    BuildError,
    Toolchain,
    torch_cxx_standard,
    torch_include_dirs,
    torch_library_dir,
)

LIBRARY_NAME = "librnn_cuda.so"

Kernels = Literal["auto", "cpu", "cuda", "emulated"]
"""What a library holds.

    auto      CPU kernels, and CUDA kernels where there is an nvcc and this torch has CUDA or
              TORCH_CUDA_ARCH_LIST is set
    cpu       CPU kernels alone
    cuda      CUDA kernels alone, wherever there is an nvcc (to check them)
    emulated  the CUDA kernels, compiled to run on CPU tensors (for tests of the CUDA path)
"""


EMULATION_FLAGS = ("-DRNN_CUDA_EMULATED", "-O1", "-g1", "-Wno-unknown-pragmas")
"""Of every source of an emulated library; CUDA sources are compiled as C++ there.

Tests compile it more often than they run it for long: hence -O1. -g1 gives the emulator's errors
their line numbers.
"""


def default_source_dir() -> Path:
    """Return the folder of the C++ and CUDA sources: in the package, or beside it in a clone."""
    package = Path(__file__).parents[1]
    installed = package / "_csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def default_emulator_dir() -> Path:
    """Return the folder of the emulator's sources, which are a part of the tests.

    Raises:
        BuildError: this package was not imported from a clone.
    """
    folder = Path(__file__).parents[2] / "tests" / "emulator"
    if not (folder / "emulator.h").is_file():
        raise BuildError(
            f"there is no emulator in {folder}. It is a part of the tests, which are not "
            "installed: clone the repository and run `pip install -e .` in the clone."
        )
    return folder


def default_cache_dir() -> Path:
    """Return the folder that holds compiled libraries; it need not exist.

    Raises:
        BuildError: no environment variable names one and the user has no home; or a relative name
            where there is no current folder, or ``~`` for a user that does not exist.
    """
    try:
        if chosen := os.environ.get("RNN_CUDA_CACHE_DIR"):
            return Path(chosen).expanduser().absolute()
        if xdg := os.environ.get("XDG_CACHE_HOME"):
            return Path(xdg).absolute() / "rnn_cuda"
        return Path.home() / ".cache" / "rnn_cuda"
    except (RuntimeError, OSError) as error:
        raise BuildError(
            f"There is no folder for the kernel cache: {error} "
            "Set RNN_CUDA_CACHE_DIR to a folder you can write to."
        ) from error


def _find_cuda_for(source_dir: Path, kernels: Kernels) -> tuple[CudaToolchain | None, str]:
    """Return the CUDA toolchain and what is left out, or None and the reason."""
    if not any(source_dir.glob("cuda/*.cu")):
        return None, f"there are no CUDA sources in {source_dir / 'cuda'}"
    if kernels in ("cpu", "emulated"):
        return None, "they were not asked for"
    # Compiling them takes minutes: not where no CUDA tensor can exist, unless targets are named.
    has_cuda = torch.version.cuda is not None or listed_archs()
    if kernels == "auto" and not has_cuda:
        return None, "this build of torch has no CUDA"
    return find_cuda()


@dataclass(frozen=True)
class Recipe:
    """What to compile, with what, for what: a pure function of the sources and this machine."""

    source_dir: Path
    cache_dir: Path
    kernels: Kernels
    toolchain: Toolchain
    cuda: CudaToolchain | None
    """None where the library has no kernels for a GPU."""
    cuda_note: str
    """Why ``cuda`` is None; where there is one, what its kernels are not compiled for, or empty."""
    emulator_dir: Path | None
    """The emulator's sources, where the CUDA kernels are compiled for the CPU."""

    @classmethod
    def create(
        cls,
        source_dir: Path | None = None,
        cache_dir: Path | None = None,
        *,
        kernels: Kernels = "auto",
        emulator_dir: Path | None = None,
    ) -> Recipe:
        """Return how this package's sources, or others laid out alike, are compiled here.

        Raises:
            BuildError: this machine cannot compile, or there is nothing to compile.
        """
        source_dir = (source_dir or default_source_dir()).absolute()
        if not any(source_dir.glob("*.cpp")):
            raise BuildError(f"There are no C++ sources in {source_dir}; reinstall rnn_cuda.")
        emulated = kernels == "emulated"
        emulator_dir = (emulator_dir or default_emulator_dir()).absolute() if emulated else None
        toolchain = Toolchain.discover()
        cuda, cuda_note = _find_cuda_for(source_dir, kernels)
        return cls(
            source_dir=source_dir,
            cache_dir=(cache_dir or default_cache_dir()).absolute(),
            kernels=kernels,
            toolchain=toolchain,
            cuda=cuda,
            cuda_note=cuda_note,
            emulator_dir=emulator_dir,
        )

    @property
    def emulated(self) -> bool:
        """Whether the CUDA kernels are compiled for the CPU."""
        return self.emulator_dir is not None

    @property
    def include_dirs(self) -> list[Path]:
        """Folders in which the sources' includes are looked up."""
        return [self.source_dir, *([self.emulator_dir.parent] if self.emulator_dir else [])]

    def _name(self, path: Path) -> str:
        """Return a file's name as an include spells it, wherever the sources lie."""
        folder = next(folder for folder in self.include_dirs if path.is_relative_to(folder))
        return path.relative_to(folder).as_posix()

    def _sources(self, *patterns: str) -> list[Path]:
        return sorted(path for pattern in patterns for path in self.source_dir.glob(pattern))

    def _emulator(self, pattern: str) -> list[Path]:
        return sorted(self.emulator_dir.glob(pattern)) if self.emulator_dir else []

    @property
    def cxx_sources(self) -> list[Path]:
        """C++ sources: schemas and planner, the CPU kernels and, with nvcc, the CUDA binding."""
        folders = ["plan"]
        if self.kernels in ("auto", "cpu"):
            folders.append("cpu")
        if self.cuda or self.emulated:
            folders.append("cuda")
        ours = self._sources("*.cpp", *(f"{folder}/*.cpp" for folder in folders))
        return ours + self._emulator("*.cpp")

    @property
    def joined_sources(self) -> list[Path]:
        """C++ sources that are compiled as one: those that include torch/library.h, by their name.

        Reading that header takes longer than the rest of their compilation.
        """
        return [path for path in self.cxx_sources if path.name == "operators.cpp"]

    @property
    def cuda_sources(self) -> list[Path]:
        """CUDA sources; empty where nothing compiles them."""
        return self._sources("cuda/*.cu") if self.cuda or self.emulated else []

    @property
    def cxx_flags(self) -> list[str]:
        """Flags of every C++ source."""
        # -std=c++NN turns contraction into fused multiply-adds off, GNU's default has it on.
        fast = ["-O3", "-ffp-contract=fast", "-fopenmp", *self.toolchain.simd_flags]
        return [
            f"-std={torch_cxx_standard()}",
            *("-fPIC", "-fvisibility=hidden", "-Wall"),
            *(EMULATION_FLAGS if self.emulated else fast),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ]

    @property
    def nvcc_flags(self) -> list[str]:
        """Flags of every CUDA source."""
        if self.cuda is None:
            return []
        return [
            *("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
            *("-ccbin", str(self.toolchain.cxx)),
            # check_cuda.py reads in build.log what ptxas prints about registers.
            *("-Xptxas", "-v,-warn-spills,-warn-lmem-usage"),
            *self.cuda.arch_flags(),
        ]

    @property
    def link_flags(self) -> list[str]:
        """Flags of the link, folders left out.

        libtorch_cpu and libc10 are in every build of torch, and the CUDA runtime is linked in, so
        the library loads next to a torch without CUDA too.
        """
        cuda = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"] if self.cuda else []
        openmp = self.toolchain.openmp_link_flags
        return ["-shared", "-Wl,--no-undefined", "-ltorch_cpu", "-lc10", *openmp, *cuda]

    def inputs(self) -> dict[str, object]:
        """Return everything that the library depends on; folders do not count, contents do."""
        headers = self._sources("**/*.h", "**/*.cuh") + self._emulator("*.h")
        cuda = self.cuda
        return {
            "sources": {
                self._name(path): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(self.cxx_sources + self.cuda_sources + headers)
            },
            "flags": [self.cxx_flags, self.nvcc_flags, self.link_flags],
            "torch": [str(torch.__version__), torch.version.git_version],
            "compiler": [str(self.toolchain.cxx), self.toolchain.cxx_version],
            "nvcc": [cuda.version, *cuda.archs] if cuda else None,
            "cpu_capability": self.toolchain.cpu_capability,
            "platform": [sys.platform, platform.machine(), *platform.libc_ver()],
        }

    @property
    def key(self) -> str:
        """Name of this recipe's cache entry."""
        text = json.dumps(self.inputs(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def library(self) -> Path:
        """Where the compiled library is or will be."""
        return self.cache_dir / self.key / LIBRARY_NAME

    def estimated_seconds(self) -> int:
        """Guess how long compiling takes, for the line that announces it."""
        seconds = (4 if self.emulated else 8) * len(self.cxx_sources)
        if self.cuda:
            seconds += 30 * len(self.cuda_sources) * len(self.cuda.archs)
        jobs = min(len(os.sched_getaffinity(0)), len(self.cxx_sources + self.cuda_sources))
        return round(seconds / jobs)

    def ninja_file(self) -> str:
        """Return the build file; outputs go to ninja's working folder."""
        compiler, cuda = str(self.toolchain.cxx), self.cuda
        project = [word for folder in self.include_dirs for word in ("-I", str(folder))]
        # -isystem: users get no warnings about headers that are not ours.
        system = [*torch_include_dirs(), *([cuda.include] if cuda else [])]
        headers = project + [word for folder in system for word in ("-isystem", str(folder))]
        folders = [torch_library_dir(), *([cuda.library] if cuda else [])]
        libraries = [f"-L{folder}" for folder in folders] + self.link_flags
        files = ["$in", "-o", "$out"]
        cxx = [compiler, *self.cxx_flags, *headers]
        *included, joined = self.joined_sources or [None]
        before = [word for source in included for word in ("-include", str(source))]
        rules = {
            "cxx": [*cxx, "-c", *files],
            "joined": [*cxx, *before, "-c", *files],
            "link": [compiler, *files, *libraries],
        }
        if self.emulated:
            rules["cuda"] = [*cxx, "-x", "c++", "-c", *files]
        elif cuda:
            rules["cuda"] = [str(cuda.nvcc), *self.nvcc_flags, *project, "-c", *files]
        lines = []
        for name, command in rules.items():
            lines += [f"rule {name}", f"  command = {_ninja_command(command)}"]
        objects = []
        for source in self.cxx_sources + self.cuda_sources:
            if source in included:
                continue
            rule = "cuda" if source.suffix == ".cu" else "joined" if source == joined else "cxx"
            objects.append(_ninja_path(self._name(source).replace("/", "_") + ".o"))
            lines.append(f"build {objects[-1]}: {rule} {_ninja_path(str(source))}")
        lines.append(f"build {LIBRARY_NAME}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


def _ninja_command(words: list[str]) -> str:
    """Quote a command for the shell, then for ninja; ``$in`` and ``$out`` are left to ninja."""
    return " ".join(
        word if word in ("$in", "$out") else shlex.quote(word).replace("$", "$$") for word in words
    )


def _ninja_path(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)
