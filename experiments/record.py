"""What a run leaves in its folder, and whose that folder is.

| file | |
|---|---|
| ``config.json`` | every value that affects numbers, resolved |
| ``metrics.jsonl`` | a line per training step, evaluation and measurement of a probe, in order |
| ``checkpoint.pt`` | where training stands (`experiments.checkpoint`) |
| ``record.json`` | the outcome; only there once the run has ended |
| ``owner.json`` | the process that works on it, locked as long as that lives |

A folder's name ends with the run's identity, so it never holds a run of other values.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

RECORD, CONFIG, METRICS, OWNER = "record.json", "config.json", "metrics.jsonl", "owner.json"
VERSION = 1

Status = Literal["finished", "diverged", "failed"]


class RecordError(RuntimeError):
    """A record that cannot be read; the message says what to do about it."""


class RunTakenError(RuntimeError):
    """A run that another live process works on."""


@dataclass(frozen=True)
class Record:
    """The outcome of one run.

    Attributes:
        identity: hash of every value that affects numbers; the end of the folder's name.
        label: what the model was called where the run was first asked for.
        status: ``finished``; ``diverged``, a loss or gradient was not finite; or ``failed``, an
            error ended it.
        reason: of a run that diverged or failed.
        config: the resolved values, as `experiments.config.RunConfig.plain` gives them.
        result: what was measured of the trained model; see `experiments.train`.
        probes: by name, what was measured first and last: ``initial`` and ``trained``.
        provenance: versions, machine, commit, backend; wall-clock times.
    """

    identity: str
    label: str
    status: Status
    reason: str | None
    config: dict[str, Any]
    result: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def save(self, folder: Path) -> None:
        """Write ``record.json``, whole or not at all."""
        write_json(folder / RECORD, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``record.json``.

        Raises:
            FileNotFoundError: the run has not ended, or there is none.
            RecordError: it is damaged, of another version, or of another run than its folder's.
        """
        path = folder / RECORD
        text = path.read_bytes()
        again = "delete its folder to make the run again"
        try:
            values = json.loads(text)
        except ValueError as error:
            raise RecordError(f"{path} is damaged ({error}); {again}") from error
        version = values.get("version") if isinstance(values, dict) else None
        if version != VERSION:
            raise RecordError(
                f"{path} has version {version!r}, this program reads {VERSION}; read it with the "
                f"rnn_cuda that wrote it, or {again}"
            )
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            wrong = ", ".join(sorted(set(values) ^ names))
            raise RecordError(f"{path} is damaged (missing or unknown: {wrong}); {again}")
        for f in fields(cls):
            allowed = _TYPES[f.name]
            if not isinstance(values[f.name], allowed):
                raise RecordError(
                    f"{path} is damaged ({f.name} is {values[f.name]!r:.60}); {again}"
                )
        record = cls(**values)
        if not folder.resolve().name.endswith(record.identity):
            raise RecordError(f"{path} is the record of another run, {record.identity}; {again}")
        return record


_TYPES: dict[str, Any] = {
    "identity": str,
    "label": str,
    "status": str,
    "reason": str | None,
    "config": dict,
    "result": dict,
    "probes": dict,
    "provenance": dict,
    "version": int,
}


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Work on a run's folder, made if it is missing, as the only process that does.

    What a process left that died is taken over.

    Raises:
        RunTakenError: a live process works on it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / OWNER, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunTakenError(_on_owner(folder)) from None
        except OSError as error:
            raise RunTakenError(
                f"{folder}: its file system has no locks ({error}), so two processes could not "
                f"be kept apart; choose another output.root"
            ) from error
        owner = {
            "pid": os.getpid(),
            "host": platform.node(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
        }
        os.ftruncate(file, 0)
        os.write(file, (json.dumps(owner, indent=1) + "\n").encode())
        yield
    finally:
        os.close(file)


def is_owned(folder: Path) -> bool:
    """Return whether a live process works on a run's folder."""
    try:
        with (folder / OWNER).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _on_owner(folder: Path) -> str:
    who = "another process"
    with suppress(OSError, ValueError, KeyError):
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        who = f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
    return f"{folder}: {who}, is working on this run"


class MetricsLog:
    """``metrics.jsonl``, written as the run goes.

    Args:
        path: the file.
        size: keep this many bytes of it, which a checkpoint vouches for; the rest was written by a
            process that died and is written again.

    Raises:
        RecordError: the file has fewer bytes.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        have = path.stat().st_size if path.exists() else 0
        if have < size:
            raise RecordError(
                f"{path} has {have} bytes, its checkpoint was made after {size}; delete the folder "
                "to make the run again"
            )
        self._file = path.open("ab")
        self._file.truncate(size)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows; an infinity or nan becomes ``null``."""
        lines = (json.dumps(_strict(row), allow_nan=False) + "\n" for row in rows)
        self._file.write("".join(lines).encode())

    def commit(self) -> int:
        """Bring everything to the disk; return the size of the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of ``metrics.jsonl``; a last line that is not whole is left out."""
    with (folder / METRICS).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON, whole or not at all; nan and infinities become null."""
    content = (json.dumps(_strict(value), indent=1, allow_nan=False) + "\n").encode()
    os.replace(written(path, content), path)


def written(path: Path, content: bytes) -> Path:
    """Write a file beside ``path``, and bring it to the disk; return where, to be renamed.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
