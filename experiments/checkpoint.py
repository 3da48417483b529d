"""Where training stands, on disk: whole, verified, and the one before kept.

A file is the SHA-256 of what follows, and what follows, from ``torch.save``. A new checkpoint is
written beside the old one and renamed; the old one, if it is whole, becomes
``checkpoint.previous.pt``. So whatever kills a process, one of the two can be read.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from experiments.record import sync_names, written

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
VERSION = 1
_DIGEST = 32


class CheckpointError(RuntimeError):
    """No checkpoint of a folder can be read; the message says why and what to do."""


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: tensors and plain values, which ``torch.load`` reads as weights only.

    Raises:
        OSError: it cannot be written; the one before is still there.
    """
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **state}, buffer)
    payload = buffer.getvalue()
    current = folder / CHECKPOINT
    temporary = written(current, hashlib.sha256(payload).digest() + payload)
    # A damaged one must not take the place of a whole one.
    if current.exists() and _payload(current.read_bytes()) is not None:
        os.replace(current, folder / PREVIOUS)
    os.replace(temporary, current)
    sync_names(folder)


def load(folder: Path) -> dict[str, Any] | None:
    """Return the newest state that can be read; ``None`` if no checkpoint was ever written.

    If it is not the newest, one line on stderr says so.

    Raises:
        CheckpointError: there is one, and none can be read.
    """
    reasons = []
    for path in (folder / CHECKPOINT, folder / PREVIOUS):
        try:
            state = _read(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError) as error:
            reasons.append(f"{path}: {error}")
            continue
        for reason in reasons:
            print(f"{reason}; going on from {path.name}, made before it", file=sys.stderr)
        return state
    if not reasons:
        return None
    raise CheckpointError(
        f"no checkpoint can be read ({'; '.join(reasons)}); delete {folder} to make the run again "
        "from its first step"
    )


def _read(path: Path) -> dict[str, Any]:
    payload = _payload(path.read_bytes())
    if payload is None:
        raise ValueError("damaged, its checksum does not match")
    state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    if state.get("version") != VERSION:
        raise ValueError(f"version {state.get('version')!r}, this program reads {VERSION}")
    return state


def _payload(content: bytes) -> bytes | None:
    """Return what the checksum of a file is of; ``None`` if it is of something else."""
    digest, payload = content[:_DIGEST], content[_DIGEST:]
    return payload if hashlib.sha256(payload).digest() == digest else None
