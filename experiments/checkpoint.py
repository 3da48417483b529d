"""Where training stands, on disk: whole, verified, and the one before kept.

A file is the SHA-256 of what follows, and what follows, from ``torch.save``. A new checkpoint is
written beside the old one and renamed; the old one becomes ``checkpoint.previous.pt``. So whatever
kills a process, one of the two can be read.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from experiments.record import written

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
_DIGEST = 32


class CheckpointError(RuntimeError):
    """No checkpoint of a folder can be read; the message says why and what to do."""


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint.

    Raises:
        OSError: it cannot be written; the one before is still there.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    current = folder / CHECKPOINT
    temporary = written(current, hashlib.sha256(payload).digest() + payload)
    if current.exists():
        os.replace(current, folder / PREVIOUS)
    os.replace(temporary, current)


def load(folder: Path) -> dict[str, Any] | None:
    """Return the newest state that can be read; ``None`` if no checkpoint was ever written.

    Raises:
        CheckpointError: there is one, and none can be read.
    """
    reasons = []
    for name in (CHECKPOINT, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            content = path.read_bytes()
            digest, payload = content[:_DIGEST], content[_DIGEST:]
            if hashlib.sha256(payload).digest() != digest:
                raise ValueError("its checksum does not match")
            return torch.load(io.BytesIO(payload), weights_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            reasons.append(f"{path}: {error}")
    if not reasons:
        return None
    raise CheckpointError(
        f"no checkpoint can be read ({'; '.join(reasons)}); delete {folder} to make the run again "
        "from its first step"
    )
