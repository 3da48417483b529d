"""nvcc, the headers and the runtime that belong to it, and the GPUs to compile for."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rnn_cuda.build.toolchain import BuildError, output_of

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


def find_cuda() -> tuple[CudaToolchain | None, str]:
    """Return the CUDA toolchain and what is left out, or None and the reason.

    No problem with CUDA raises an error: the CPU kernels can be compiled all the same.
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
    version = re.search(r"V(\d+\.\d+\.\d+)", output_of([nvcc, "--version"]))
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

    nvcc prints where its toolkit is, even if the nvcc on the PATH is a script that wraps it. The
    source need not exist: a dry run only prints commands.
    """
    dry_run = output_of([nvcc, "--dryrun", "-c", "none.cu"])
    roots = [Path(top).resolve() for top in re.findall(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)]
    roots += [Path(home) for home in _cuda_homes()]
    roots += [nvcc.resolve().parent.parent, DEFAULT_CUDA_HOME]
    return roots


def _first_folder_with(file_name: str, roots: list[Path], patterns: list[str]) -> Path | None:
    folders = (
        path.parent
        for root in roots
        for pattern in patterns
        for path in sorted(root.glob(f"{pattern}/{file_name}"))
    )
    return next(folders, None)


def _supported_archs(nvcc: Path) -> set[str]:
    """Return the targets that nvcc and the kernels know, such as ``{"80", "90", "90a"}``."""
    known = re.findall(r"compute_(\d+)", output_of([nvcc, "--list-gpu-arch"]))
    if known:
        # Not in that list: targets with the features of one device (a) or of its family (f).
        known += re.findall(r"'sm_(\d+[af])'", output_of([nvcc, "--help"]))
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
        supported_targets, unsupported = _targets(entry, supported)
        targets |= supported_targets
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
    """Return the targets of an entry of TORCH_CUDA_ARCH_LIST, and its unsupported parts."""
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
    """Return one target for each compute capability: code that runs on such a device, if any."""
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
        printed = output_of([nvidia_smi, "--query-gpu=compute_cap", "--format=csv,noheader"])
    except BuildError:
        return []
    return sorted(set(re.findall(r"^\d+\.\d$", printed, re.MULTILINE)))
