"""The machine: threads held to cores, who else uses them, and what to write beside a number.

    python -m benchmarks.machine cuda [--write FILE]     # or cpu

describes it. Nothing here imports torch at the top: a worker sets its cores and environment first.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

BUSY_CORES = 0.1
"""More than this many cores used by others on average, and a run is called disturbed."""


def usable_cores() -> list[int]:
    """Return the cores this process may run on, one thread of each physical core first."""
    first, rest = [], []
    seen: set[str] = set()
    for core in sorted(os.sched_getaffinity(0)):
        siblings = _read(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        (rest if siblings and siblings in seen else first).append(core)
        seen.add(siblings)
    return first + rest


def thread_environment(threads: int) -> dict[str, str]:
    """Return environment variables that hold every contestant's runtime to this many threads.

    They are read once, when libraries load. ONNX Runtime is told per session; XLA sizes its pool
    by NPROC and by the cores that it may run on.
    """
    eigen = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}"
    counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")
    return {
        **dict.fromkeys(counts, str(threads)),
        "XLA_FLAGS": " ".join(filter(None, [os.environ.get("XLA_FLAGS"), eigen])),
        "JAX_PLATFORMS": "cpu",
        "KERAS_BACKEND": os.environ.get("KERAS_BACKEND", "jax"),
        "CUDA_VISIBLE_DEVICES": "",
    }


# ---- who else is there ---------------------------------------------------------------------------


class LoadWatch:
    """How many cores other processes took, and the hypervisor, since this object was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def read(self) -> dict[str, float] | None:
        """Return mean numbers of cores: ``others`` and ``stolen``; None where /proc is missing."""
        end = self._now()
        if self._start is None or end is None:
            return None
        elapsed, busy, stolen, own = (b - a for a, b in zip(self._start, end, strict=True))
        if elapsed <= 0:
            return None
        others = max(0.0, busy - own) / elapsed
        return {"others": round(others, 3), "stolen": round(stolen / elapsed, 3)}

    @staticmethod
    def _now() -> tuple[float, float, float, float] | None:
        """Return seconds: clock, all processes on all cores, stolen, this process and children."""
        fields = _read("/proc/stat").partition("\n")[0].split()[1:]
        if len(fields) < 8:
            return None
        user, nice, system, _idle, _wait, irq, softirq, steal = (
            int(field) / os.sysconf("SC_CLK_TCK") for field in fields[:8]
        )
        own = sum(os.times()[:4])
        return time.monotonic(), user + nice + system + irq + softirq, steal, own


def disturbances(loads: Iterable[dict[str, float] | None]) -> list[str]:
    """Return sentences that say what disturbed the measurements; an empty list: nothing seen."""
    known = [load for load in loads if load]
    sentences = []
    for key, words in (("others", "other processes used"), ("stolen", "the hypervisor took")):
        disturbed = [load[key] for load in known if load[key] > BUSY_CORES]
        if disturbed:
            sentences.append(
                f"in {len(disturbed)} of {len(known)} measurements {words} more than "
                f"{BUSY_CORES} cores (up to {max(disturbed):.2f})"
            )
    return sentences


# ---- what to write beside a number ---------------------------------------------------------------


def describe(device: str = "cpu", commit: str | None = None) -> dict[str, Any]:
    """Return the machine, versions and commit as JSON-ready values; no host name and no path.

    Args:
        device: "cuda" adds the card.
        commit: the commit, where the checkout has no history to ask.
    """
    import torch

    known = git("rev-parse", "HEAD")
    cpu = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu[1].strip() if cpu else platform.processor() or platform.machine(),
        "cores": len(usable_cores()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "git_commit": known or commit,
        "git_modified": None if known is None else bool(git("status", "--porcelain")),
        "sources": sources_digest(),
    }
    return about | (_card() if device == "cuda" else {})


def _card() -> dict[str, Any]:
    import torch

    from rnn_cuda.build import find_cuda

    properties, (cuda, _) = torch.cuda.get_device_properties(0), find_cuda()
    names = ("driver_version", "power.limit", "clocks.sm", "clocks.max.sm", "ecc.mode.current")
    query = f"--query-gpu={','.join(names)}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        values = [value.strip() for value in done.stdout.split(",")]
    except (OSError, subprocess.SubprocessError):
        values = []
    return {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "card_memory_gib": round(properties.total_memory / 2**30),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvcc": cuda.version if cuda else None,
        **dict(zip(names, values, strict=False)),
    }


def folder_name(about: dict[str, Any]) -> str:
    """Return a name for results: card or processor, and date: ``nvidia-h200-2026-01-31``."""
    model = about.get("card") or about["cpu"]
    model = re.sub(r"\((r|tm)\)|\bcpu\b|@.*|\d+-core processor", "", model.lower())
    return f"{re.sub(r'[^a-z0-9]+', '-', model).strip('-')}-{about['date'][:10]}"


def sources_digest() -> str:
    """Return a hash of the kernels' and the package's sources: a copy without history has it too.

    ``python -c "from benchmarks.machine import sources_digest; print(sources_digest())"`` in a
    checkout of some commit tells whether it is what was measured.
    """
    digest = hashlib.sha256()
    for folder in ("csrc", "rnn_cuda"):
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(REPOSITORY).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def git(*arguments: str) -> str | None:
    """Return what git says of this repository, stripped; None if it cannot."""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or not a checkout


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def main() -> int:
    """Print the description; return 1 where there is no such device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine")
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("--commit", help="the commit, where the checkout has no history")
    parser.add_argument("--write", type=Path, help="a file for it, as JSON")
    options = parser.parse_args()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        built = "no CUDA in it" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        print(f"torch {torch.__version__} ({built}) sees no CUDA device")
        return 1
    about = describe(options.device, options.commit)
    if options.write is not None:
        options.write.write_text(json.dumps(about))
    for name, value in about.items():
        print(f"{name}: {value}")
    print(f"{about.get('card') or about['cpu']}, torch {about['torch']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
