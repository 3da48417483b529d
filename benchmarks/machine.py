"""The machine: threads held to cores, who else uses them, and what to write beside a number.

Nothing here imports torch at the top: a worker sets its cores and its environment first.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

BUSY_CORES = 0.1
"""More than this many cores used by others on average, and a run is called disturbed."""

DRIFT = 0.15
"""A fixed loop may take this much longer at one time than at another before it is remarked on."""


def usable_cores() -> list[int]:
    """Return the cores this process may run on, one thread of each physical core first."""
    allowed = os.sched_getaffinity(0)
    first, rest = [], []
    seen: set[str] = set()
    for core in sorted(allowed):
        siblings = _read(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        (rest if siblings and siblings in seen else first).append(core)
        seen.add(siblings)
    return first + rest


def thread_environment(threads: int) -> dict[str, str]:
    """Return environment variables that hold every peer's runtime to this many threads.

    They are read once, when libraries load. ONNX Runtime is told per session; XLA sizes its pool
    by NPROC and by the cores that it may run on.
    """
    number = str(threads)
    eigen = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}"
    return {
        "OMP_NUM_THREADS": number,
        "MKL_NUM_THREADS": number,
        "OPENBLAS_NUM_THREADS": number,
        "NPROC": number,
        "XLA_FLAGS": " ".join(filter(None, [os.environ.get("XLA_FLAGS"), eigen])),
        "JAX_PLATFORMS": "cpu",
        "KERAS_BACKEND": os.environ.get("KERAS_BACKEND", "jax"),
        "CUDA_VISIBLE_DEVICES": "",
    }


def hold_to(threads: int) -> list[int]:
    """Bind this process, and whatever it starts, to that many cores; return which."""
    cores = usable_cores()[:threads]
    os.sched_setaffinity(0, cores)
    return cores


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
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return time.monotonic(), user + nice + system + irq + softirq, steal, own


def calibrate() -> float:
    """Return the seconds that a fixed loop takes, the shortest of five.

    Its changes over a run show a clock that changes, or a busy machine.
    """
    return min(_calibration_loop() for _ in range(5))


def _calibration_loop() -> float:
    start = time.perf_counter()
    total = 0
    for i in range(20_000):
        total += i
    return time.perf_counter() - start


def disturbances(
    loads: Iterable[dict[str, float] | None], calibrations: Iterable[float]
) -> list[str]:
    """Return sentences that say what disturbed the measurements; an empty list: nothing seen."""
    loads, calibrations = [load for load in loads if load], list(calibrations)
    found = []
    for key, words in (("others", "other processes used"), ("stolen", "the hypervisor took")):
        disturbed = [load[key] for load in loads if load[key] > BUSY_CORES]
        if disturbed:
            found.append(
                f"in {len(disturbed)} of {len(loads)} measurements {words} more than "
                f"{BUSY_CORES} cores (up to {max(disturbed):.2f})"
            )
    if calibrations and max(calibrations) > (1 + DRIFT) * min(calibrations):
        found.append(
            f"a fixed loop took up to {max(calibrations) / min(calibrations):.2f} times its "
            "shortest time"
        )
    return found


# ---- what to write beside a number ---------------------------------------------------------------


def cpu_model() -> str:
    """Return the processor's name."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def describe() -> dict[str, Any]:
    """Return the machine, versions and commit as JSON-ready values; no host name and no path."""
    import torch

    import rnn_cuda

    commit = git("rev-parse", "HEAD")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": len(usable_cores()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "rnn_cuda": rnn_cuda.__version__,
        "git_commit": commit,
        "git_modified": None if commit is None else bool(git("status", "--porcelain")),
    }


def folder_name(machine: dict[str, Any]) -> str:
    """Return a name for results: processor and date, such as ``amd-epyc-9354-2026-01-31``."""
    model = re.sub(r"\((r|tm)\)|\bcpu\b|@.*|\d+-core processor", "", machine["cpu"].lower())
    slug = re.sub(r"[^a-z0-9]+", "-", model).strip("-")
    return f"{slug}-{machine['date'][:10]}"


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
