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

from rnn_cuda.build.toolchain import (
    BuildError,
    CudaToolchain,
    Toolchain,
    listed_archs,
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
"""Of every source of an emulated library; CUDA sources are C++ there.

It is compiled more often than it runs long. -g1 names lines in the emulator's errors.
"""


def default_source_dir() -> Path:
    """Return the folder of the C++ and CUDA sources: in the package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "_csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def default_emulator_dir() -> Path:
    """Return the folder of the emulator's sources, a part of the tests.

    Raises:
        BuildError: this is not a clone.
    """
    folder = Path(__file__).parents[2] / "tests" / "emulator"
    if not (folder / "emulator.h").is_file():
        raise BuildError(
            f"the emulator's sources are not in {folder}: an installed package has none. "
            "To run the CUDA kernels on a CPU, clone the repository and `pip install -e .` there."
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


def _why_no_cuda(source_dir: Path, kernels: Kernels) -> str:
    """Return what stands against CUDA kernels before anyone looks for nvcc, or nothing."""
    if not any(source_dir.glob("cuda/*.cu")):
        return f"there are no CUDA sources in {source_dir / 'cuda'}"
    if kernels in ("cpu", "emulated"):
        return "they were not asked for"
    # Compiling them takes minutes: not where no CUDA tensor can exist, unless targets are named.
    has_cuda = torch.version.cuda is not None or listed_archs()
    if kernels == "auto" and not has_cuda:
        return "this build of torch has no CUDA"
    return ""


@dataclass(frozen=True)
class BuildPlan:
    """What to compile, with what, for what: a pure function of the sources and the toolchain."""

    source_dir: Path
    cache_dir: Path
    toolchain: Toolchain
    kernels: Kernels = "auto"
    emulator_dir: Path | None = None
    """Sources of the emulator, which the kernels are compiled for; None: for a GPU."""

    @classmethod
    def create(
        cls,
        source_dir: Path | None = None,
        cache_dir: Path | None = None,
        *,
        kernels: Kernels = "auto",
        emulator_dir: Path | None = None,
    ) -> BuildPlan:
        """Plan a build of this package's sources, or of others laid out alike, on this machine.

        Raises:
            BuildError: this machine cannot compile, or there is nothing to compile.
        """
        source_dir = (source_dir or default_source_dir()).absolute()
        if not any(source_dir.glob("*.cpp")):
            raise BuildError(f"There are no C++ sources in {source_dir}; reinstall rnn_cuda.")
        return cls(
            source_dir=source_dir,
            cache_dir=(cache_dir or default_cache_dir()).absolute(),
            toolchain=Toolchain.discover(why_no_cuda=_why_no_cuda(source_dir, kernels)),
            kernels=kernels,
            emulator_dir=(
                (emulator_dir or default_emulator_dir()).absolute()
                if kernels == "emulated"
                else None
            ),
        )

    @property
    def emulated(self) -> bool:
        """Whether the CUDA kernels are compiled for the CPU."""
        return self.emulator_dir is not None

    @property
    def cuda(self) -> CudaToolchain | None:
        """The CUDA toolchain, or None where the library has CPU kernels only."""
        return self.toolchain.cuda

    def _sources(self, *patterns: str) -> list[Path]:
        return sorted(path for pattern in patterns for path in self.source_dir.glob(pattern))

    @property
    def include_dirs(self) -> list[Path]:
        """Folders that the sources' includes are relative to."""
        return [self.source_dir, *([self.emulator_dir.parent] if self.emulator_dir else [])]

    def _name(self, path: Path) -> str:
        """Return a source's or header's name, which does not depend on where the project lies."""
        folder = next(folder for folder in self.include_dirs if path.is_relative_to(folder))
        return path.relative_to(folder).as_posix()

    @property
    def cxx_sources(self) -> list[Path]:
        """C++ sources: schemas and planner, the CPU kernels and, with nvcc, the CUDA binding."""
        folders = ["plan"]
        if self.kernels in ("auto", "cpu"):
            folders.append("cpu")
        if self.cuda or self.emulated:
            folders.append("cuda")
        sources = self._sources("*.cpp", *(f"{folder}/*.cpp" for folder in folders))
        return sources + sorted(self.emulator_dir.glob("*.cpp") if self.emulator_dir else [])

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
            # What ptxas says of registers is kept in build.log, where check_cuda.py reads it.
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
        headers = self._sources("**/*.h", "**/*.cuh")
        headers += self.emulator_dir.glob("*.h") if self.emulator_dir else []
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
        """Name of this plan's cache entry."""
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
        tools, cuda = self.toolchain, self.cuda
        project = [word for folder in self.include_dirs for word in ("-I", str(folder))]
        # -isystem: warnings in headers that are not ours are not for our users either.
        system = [*torch_include_dirs(), *([cuda.include] if cuda else [])]
        headers = project + [word for folder in system for word in ("-isystem", str(folder))]
        folders = [torch_library_dir(), *([cuda.library] if cuda else [])]
        libraries = [f"-L{folder}" for folder in folders] + self.link_flags
        files = ["$in", "-o", "$out"]
        cxx = [str(tools.cxx), *self.cxx_flags, *headers]
        *included, joined = self.joined_sources or [None]
        before = [word for source in included for word in ("-include", str(source))]
        rules = {
            "cxx": [*cxx, "-c", *files],
            "joined": [*cxx, *before, "-c", *files],
            "link": [str(tools.cxx), *files, *libraries],
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
