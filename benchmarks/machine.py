"""The machine: threads held to cores, who else uses them, and what to write beside a number.

Nothing here imports torch at the top: a worker sets its cores and environment first.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def usable_cores() -> list[int]:
    """Return the cores this process may run on, one thread of each physical core first."""
    first: dict[str, int] = {}
    cores = sorted(os.sched_getaffinity(0))
    for core in cores:
        siblings = _read(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        first.setdefault(siblings or str(core), core)
    return sorted(cores, key=lambda core: core not in first.values())


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
        "CUDA_VISIBLE_DEVICES": "",
    }


# ---- who else is there ---------------------------------------------------------------------------


class LoadWatch:
    """How many cores other processes and the hypervisor took since this object was made."""

    def __init__(self) -> None:
        self._begin = self._now()

    def read(self) -> float:
        """Return the mean number of cores; zero where /proc is missing."""
        elapsed, cores = (b - a for a, b in zip(self._begin, self._now(), strict=True))
        return round(max(0.0, cores) / elapsed, 3)

    @staticmethod
    def _now() -> tuple[float, float]:
        """Return seconds by the clock, and of all cores but for this process and its children."""
        fields = [int(field) for field in _read("/proc/stat").partition("\n")[0].split()[1:9]]
        busy = sum(fields) - sum(fields[3:5])  # idle, and waiting for a disk
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


# ---- what to write beside a number ---------------------------------------------------------------


def describe(device: str = "cpu") -> dict[str, Any]:
    """Return the machine, versions and commit as JSON-ready values; no host name and no path."""
    import torch

    cpu = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu[1].strip() if cpu else platform.machine(),
        "cores": len(usable_cores()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "git_commit": git("rev-parse", "HEAD"),
        "git_modified": bool(git("status", "--porcelain")),
    }
    return about | (_card() if device == "cuda" else {})


def _card() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    names = ["driver_version", "power.limit", "clocks.sm", "clocks.max.sm", "ecc.mode.current"]
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    values = [value.strip() for value in (_output_of(query) or "").split(",")]
    return {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **dict(zip(names, values, strict=False)),
    }


def folder_name(about: dict[str, Any]) -> str:
    """Return a name for results: card or processor, date, time: ``nvidia-h200-2026-01-31-1800``."""
    model = re.sub(r"\((r|tm)\)|cpu|@.*", "", (about.get("card") or about["cpu"]).lower())
    time = about["date"][:16].replace("T", "-").replace(":", "")
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {time}").strip("-")


def git(*arguments: str) -> str | None:
    """Return what git says of this repository, stripped; None if it cannot."""
    return _output_of(["git", "-C", str(REPOSITORY), *arguments])


def _output_of(command: list[str]) -> str | None:
    try:
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 20}
        return subprocess.run(command, check=True, **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
