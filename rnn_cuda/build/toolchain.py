"""What this machine can compile with: C++ compiler, ninja, nvcc, and the targets to compile for.

Nothing here writes a file or knows which sources exist; :mod:`rnn_cuda.build` does both.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why and what to do about it."""


class CompilerNotFoundError(BuildError):
    """A program that compiling needs is not installed; the message says what to install."""


DEFAULT_CUDA_ARCHS = ("8.0", "9.0", "10.0", "12.0")
"""Compute capabilities compiled for when no GPU is visible and TORCH_CUDA_ARCH_LIST is unset.

Those that nvcc does not know are left out.
"""

MINIMUM_CUDA_ARCH = 80
"""Oldest GPU architecture that the CUDA kernels are written for (bfloat16 products: sm_80)."""

_ARCHS_BY_NAME = {
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
"""Names in TORCH_CUDA_ARCH_LIST as torch.utils.cpp_extension reads them, but for older devices."""

DEFAULT_CUDA_HOME = Path("/usr/local/cuda")
"""Where NVIDIA's installers put the toolkit."""

_ANSWER_SECONDS = 60
"""How long a compiler or a driver may take to say what it is."""

_SIMD_FLAGS = {
    "AVX512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
        *("-mavx2", "-mfma", "-mf16c"),
    ),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}


@dataclass(frozen=True)
class CudaToolchain:
    """An nvcc with the headers and the static runtime that belong to it."""

    nvcc: Path
    version: str
    include: Path
    library: Path
    archs: tuple[str, ...]
    """Targets as nvcc's ``code=`` spells them: ``sm_90`` (machine code) or ``compute_90`` (PTX)."""

    def arch_flags(self) -> list[str]:
        """Return one ``-gencode`` flag for each target."""
        return [
            f"-gencode=arch=compute_{arch.partition('_')[2]},code={arch}" for arch in self.archs
        ]


@dataclass(frozen=True)
class Toolchain:
    """Everything outside the sources that decides what the compiled library looks like."""

    cxx: Path
    cxx_version: str
    cpu_capability: str
    cuda: CudaToolchain | None
    cuda_note: str
    """Why ``cuda`` is None; where there is one, what its kernels are not compiled for, or empty."""

    @classmethod
    def discover(cls, *, why_no_cuda: str = "") -> Toolchain:
        """Look at this machine and at the environment.

        Args:
            why_no_cuda: a reason not to look for nvcc, which takes a tenth of a second.

        Raises:
            CompilerNotFoundError: there is no C++ compiler.
            BuildError: the platform is not supported, or $CXX cannot be started.
        """
        if not sys.platform.startswith("linux"):
            raise BuildError(
                f"rnn_cuda's kernels are compiled on Linux only; this platform is {sys.platform!r}."
            )
        cxx = find_cxx()
        cuda, note = (None, why_no_cuda) if why_no_cuda else find_cuda()
        return cls(
            cxx=cxx,
            cxx_version=_output_of([cxx, "--version"]).partition("\n")[0],
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
            cuda=cuda,
            cuda_note=note,
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


def find_cuda() -> tuple[CudaToolchain | None, str]:
    """Return the CUDA toolchain with what is left out, or None with the reason.

    Whatever is wrong with CUDA is such a reason: it must not cost the CPU kernels.
    """
    try:
        return _cuda_toolchain()
    except (BuildError, OSError) as error:
        return None, str(error)


def _cuda_toolchain() -> tuple[CudaToolchain, str]:
    nvcc = _find_nvcc()
    if nvcc is None:
        raise BuildError(
            f"nvcc is neither in CUDA_HOME, nor on the PATH, nor in {DEFAULT_CUDA_HOME}"
        )
    roots = _cuda_roots(nvcc)
    include = _first_folder_with("cuda_runtime_api.h", roots, ["include", "targets/*/include"])
    if include is None:
        raise BuildError(f"{nvcc} has no cuda_runtime_api.h beside it; set CUDA_HOME")
    library = _first_folder_with(
        "libcudart_static.a", roots, ["lib64", "lib", "targets/*/lib", "lib/*-linux-gnu"]
    )
    if library is None:
        raise BuildError(f"{nvcc} has no libcudart_static.a beside it; set CUDA_HOME")
    supported = _supported_archs(nvcc)
    if not supported:
        raise BuildError(f"{nvcc} --list-gpu-arch lists nothing; CUDA 11.1 or newer is needed")
    archs, left_out = cuda_archs(supported)
    version = re.search(r"V(\d+\.\d+\.\d+)", _output_of([nvcc, "--version"]))
    toolchain = CudaToolchain(nvcc, version[1] if version else "unknown", include, library, archs)
    return toolchain, left_out


def _cuda_homes() -> list[str]:
    return [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]


def _find_nvcc() -> Path | None:
    candidates = [shutil.which("nvcc", path=str(Path(home) / "bin")) for home in _cuda_homes()]
    candidates += [shutil.which("nvcc"), shutil.which("nvcc", path=str(DEFAULT_CUDA_HOME / "bin"))]
    return next((Path(path) for path in candidates if path), None)


def _cuda_roots(nvcc: Path) -> list[Path]:
    """Return folders that may be the toolkit of this nvcc, the most trustworthy first.

    nvcc itself knows where it is, even if what stands on the PATH is a script that wraps it. The
    name of the source need not exist: a dry run only prints commands.
    """
    dry_run = _output_of([nvcc, "--dryrun", "-c", "none.cu"])
    roots = [Path(top).resolve() for top in re.findall(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)]
    roots += [Path(home) for home in _cuda_homes()]
    roots += [nvcc.resolve().parent.parent, DEFAULT_CUDA_HOME]
    return roots


def _first_folder_with(file_name: str, roots: list[Path], patterns: list[str]) -> Path | None:
    found = (
        path.parent
        for root in roots
        for pattern in patterns
        for path in sorted(root.glob(f"{pattern}/{file_name}"))
    )
    return next(found, None)


def _supported_archs(nvcc: Path) -> set[str]:
    """Return the targets that nvcc and the kernels know, such as ``{"80", "90", "90a"}``."""
    known = re.findall(r"compute_(\d+)", _output_of([nvcc, "--list-gpu-arch"]))
    if known:
        # Not in that list: targets with the features of one device (a) or of its family (f).
        known += re.findall(r"'sm_(\d+[af])'", _output_of([nvcc, "--help"]))
    return {arch for arch in known if int(arch.rstrip("af")) >= MINIMUM_CUDA_ARCH}


def listed_archs() -> list[str]:
    """Return the entries of TORCH_CUDA_ARCH_LIST; none where it is unset or blank."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()


def cuda_archs(supported: set[str]) -> tuple[tuple[str, ...], str]:
    """Return the targets to compile for: TORCH_CUDA_ARCH_LIST, this machine's GPUs, or a default.

    Args:
        supported: what nvcc and the kernels know, as of :func:`_supported_archs`.

    Returns:
        The targets, and in words what is left out of TORCH_CUDA_ARCH_LIST, if anything.

    Raises:
        BuildError: no entry of TORCH_CUDA_ARCH_LIST is supported, or no visible GPU.
    """
    targets: set[str] = set()
    left_out: list[str] = []
    for entry in listed_archs() or ["native"]:
        found, unsupported = _targets(entry, supported)
        targets |= found
        left_out += unsupported
    numbers = sorted(int(arch) for arch in supported if arch.isdigit())
    why = (
        f"TORCH_CUDA_ARCH_LIST: the kernels and this nvcc do not support {', '.join(left_out)}. "
        f"Supported are {', '.join(f'{n // 10}.{n % 10}' for n in numbers)}, each also with +PTX, "
        f"and the names {', '.join(_ARCHS_BY_NAME)}, All, Common, native."
    )
    if not targets:
        oldest = f"no visible GPU is of compute capability {MINIMUM_CUDA_ARCH / 10} or newer"
        raise BuildError(why if left_out else oldest)
    return tuple(sorted(targets)), why if left_out else ""


def _targets(entry: str, supported: set[str]) -> tuple[set[str], list[str]]:
    """Return the targets of one entry of TORCH_CUDA_ARCH_LIST, and what of it is not supported."""
    name = entry.removesuffix("+PTX")
    if name == "native":
        return _targets_for(_visible_gpu_archs() or DEFAULT_CUDA_ARCHS, supported), []
    if name == "Common":
        return _targets_for(DEFAULT_CUDA_ARCHS, supported), []
    if name == "All":
        return {f"sm_{arch}" for arch in supported if arch.isdigit()}, []
    archs = _ARCHS_BY_NAME.get(name, name).split(";")
    if entry != name:
        archs[-1] = archs[-1].removesuffix("+PTX") + "+PTX"
    targets: set[str] = set()
    unsupported = []
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if match and (number := match[1] + match[2]) in supported:
            targets |= {f"sm_{number}", f"compute_{number}"} if match[3] else {f"sm_{number}"}
        else:
            unsupported.append(arch)
    return targets, unsupported


def _targets_for(capabilities: Iterable[str], supported: set[str]) -> set[str]:
    """Return the targets of which one runs on each device of a compute capability, if any does."""
    targets: set[str] = set()
    for capability in capabilities:
        number = int(capability.replace(".", ""))
        older = [int(arch) for arch in supported if arch.isdigit() and int(arch) < number]
        if str(number) in supported:
            targets.add(f"sm_{number}")
        elif older:
            # This nvcc does not know the device: the driver compiles the nearest PTX for it.
            targets.add(f"compute_{max(older)}")
    return targets


def _visible_gpu_archs() -> list[str]:
    """Return the compute capabilities of this machine's GPUs, as nvidia-smi reports them.

    Asking torch would initialise CUDA, after which this process could no longer fork workers that
    use it; and eight ranks with a GPU each would disagree on the cache key.
    """
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return []
    try:
        printed = _output_of([nvidia_smi, "--query-gpu=compute_cap", "--format=csv,noheader"])
    except BuildError:
        return []
    return sorted(set(re.findall(r"^\d+\.\d$", printed, re.MULTILINE)))


def _output_of(command: list[Path | str]) -> str:
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
