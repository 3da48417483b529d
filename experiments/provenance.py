"""What a reader needs to know to repeat a run: versions, machine, commit, backend."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hydra
import torch

import rnn_cuda

REPOSITORY = Path(__file__).resolve().parents[1]


def provenance(device: str) -> dict[str, Any]:
    """Return versions, machine, git commit and kernel backend as JSON-ready values."""
    commit = _git("rev-parse", "HEAD")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "rnn_cuda": rnn_cuda.__version__,
        "torch": torch.__version__,
        "hydra": hydra.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "git_commit": commit,
        "git_modified": None if commit is None else bool(_git("status", "--porcelain")),
    }


def _git(*arguments: str) -> str | None:
    """Return what git says about this repository; ``None`` outside of one, or without git."""
    if not (REPOSITORY / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        # git is not installed, or the repository has no commit yet.
        return None
    return answer.stdout.strip()
