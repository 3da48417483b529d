"""The card, and everything beside it that a number depends on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu.context import Context, StageError

_QUERY = {
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "power_limit_w": "power.limit",
    "sm_clock_mhz": "clocks.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "ecc": "ecc.mode.current",
    "mig": "mig.mode.current",
}


def info(context: Context) -> None:
    """Write the machine's description; fail where there is no card."""
    if not context.rehearsal and not torch.cuda.is_available():
        built = "no CUDA in it" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        raise StageError(f"torch {torch.__version__} ({built}) sees no CUDA device")
    about = describe(context.device, context.commit)
    context.write("info.json", about)
    for name, value in about.items():
        print(f"{name}: {value}")
    commit = (about["git_commit"] or "unknown commit")[:12]
    print(f"{about['card']}, driver {about['driver']}, torch {about['torch']}, {commit}")


def describe(device: str, commit: str | None = None) -> dict[str, Any]:
    """Return card, driver, versions and commit as JSON-ready values; no host name and no path.

    Args:
        device: "cuda"; "cpu" describes the processor in place of the card.
        commit: the commit, if the checkout cannot be asked for it.
    """
    on_host = machine.describe()
    about: dict[str, Any] = {
        "date": on_host["date"],
        "card": on_host["cpu"],
        "driver": None,
        "rehearsal": device == "cpu",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvcc": _nvcc_version(),
        **{name: on_host[name] for name in ("cpu", "python", "torch", "rnn_cuda")},
        "numpy": on_host["numpy"],
        "flashrnn": _version("flashrnn"),
        "system": f"{platform.system()} {platform.machine()}",
        "git_commit": on_host["git_commit"] or commit,
        "git_modified": on_host["git_modified"],
        "sources": sources_digest(),
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "card": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": round(properties.L2_cache_size / 2**20),
            **_nvidia_smi(),
        }
    return about


def folder_name(about: dict[str, Any]) -> str:
    """Return a name for results: card and date, such as ``nvidia-h200-2026-01-31``."""
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", about["card"].lower())).strip("-")
    return f"{slug}-{about['date'][:10]}"


def sources_digest() -> str:
    """Return a hash of the kernels' and the package's sources: a copy without history has it too.

    ``python -c "from benchmarks.gpu.info import sources_digest; print(sources_digest())"`` in a
    checkout of some commit tells whether it is what was measured.
    """
    digest = hashlib.sha256()
    for folder in ("csrc", "rnn_cuda"):
        for path in sorted((machine.REPOSITORY / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(machine.REPOSITORY).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _nvidia_smi() -> dict[str, str | None]:
    fields = ",".join(_QUERY.values())
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    if shutil.which("nvidia-smi") is None:
        return dict.fromkeys(_QUERY)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(_QUERY):
        return dict.fromkeys(_QUERY)
    return dict(zip(_QUERY, values, strict=True))


def _nvcc_version() -> str | None:
    from rnn_cuda.build import find_cuda

    cuda, _ = find_cuda()
    return cuda.version if cuda else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
