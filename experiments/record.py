"""What a run leaves in its folder, and whose that folder is.

| file | |
|---|---|
| ``config.json`` | every value that affects numbers, resolved |
| ``metrics.jsonl`` | a line per training step, evaluation and measurement of a probe, in order |
| ``checkpoint.pt`` | where training stands; at the end, the trained weights |
| ``record.json`` | the outcome; only there once the run has ended |
| ``owner.json`` | the process that works on it or was the last to; locked while that lives |

A folder's name ends with the run's identity, so it never holds a run of other values.

The lock is the kernel's, so it ends with the process, however that ends. On a network file system
with locks it holds between hosts too: ``owner.json`` says on which host the owner is.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from experiments.fields import value_at

RECORD, CONFIG, METRICS, OWNER = "record.json", "config.json", "metrics.jsonl", "owner.json"
VERSION = 1

_LOCK_TRIES, _LOCK_PAUSE = 20, 0.05
"""How often, and after how many seconds each, a lock is asked for: `is_owned` holds one briefly."""

Status = Literal["finished", "diverged", "failed"]
Verdict = Literal["solved", "learned", "failed", "diverged"]


class RecordError(RuntimeError):
    """A record that cannot be read; the message says what to do about it."""


class RunTakenError(RuntimeError):
    """A run that another live process works on."""


@dataclass(frozen=True)
class Result:
    """What was measured of a trained model. A run that diverged has no errors, only ``None``.

    Attributes:
        hidden_size, parameters: of the model; trained numbers.
        steps: of training that were done.
        solved_at: the first step at which an evaluation found the task solved.
        task, metric: names, of the task and of what is shown of it.
        know_nothing_loss, know_nothing_error: of the best answer that ignores the input.
        dependency: the longest lag that matters, in time steps.
        verdict: test error below 10 % of that of knowing nothing, below 25 %, or not. Of a task
            with baselines: below all of them and 10 %, below all of them, or not.
        test_error, train_error: what the task counts as error, on held-out and on training data.
        test_metric: what is shown of the test error: an accuracy, of a classifier.
        error_over_know_nothing: test error over that of knowing nothing.
        test_error_at: at other lengths, by T.
        baselines: errors of simple methods on the same test data, by name.
        measures: what the task measures beside the error, by name.
    """

    hidden_size: int
    parameters: int
    steps: int
    solved_at: int | None
    task: str
    metric: str
    know_nothing_loss: float
    know_nothing_error: float
    dependency: int
    verdict: Verdict
    test_error: float | None = None
    test_metric: float | None = None
    error_over_know_nothing: float | None = None
    train_error: float | None = None
    test_error_at: dict[str, float | None] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    measures: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """The outcome of one run.

    Attributes:
        identity: hash of every value that affects numbers; the end of the folder's name.
        label: what the model was called where the run was first asked for.
        status: ``finished``; ``diverged``, a loss, gradient, weight or the test error was not
            finite; or ``failed``, an error ended it.
        reason: of a run that diverged or failed.
        config: the resolved values, as `experiments.config.RunConfig.plain` gives them.
        result: what was measured of the trained model; ``None`` of a run that failed.
        probes: by name, what was measured first and last: ``initial`` and ``trained``.
        provenance: versions, machine, commit, backend; wall-clock times.
    """

    identity: str
    label: str
    status: Status
    reason: str | None
    config: dict[str, Any]
    result: Result | None = None
    probes: dict[str, dict[str, dict[str, Any] | None]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @property
    def seconds_per_step(self) -> float | None:
        """Wall-clock time over training steps: evaluation, probes and checkpoints included.

        None where the processor worked for another program, or the run was paused: on a CPU, in
        more than a fifth of the time.
        """
        assert self.result is not None
        seconds = self.provenance["seconds"]
        is_on_cpu = str(self.config.get("device", "cpu")).startswith("cpu")
        if is_on_cpu and self.provenance.get("processor_seconds", 0.0) < 0.8 * seconds:
            return None
        return seconds / self.result.steps

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
        if values.get("result") == {}:  # what a run that failed left at first
            values["result"] = None
        wrong = _wrong(cls, values, "record") or _impossible(values)
        if wrong:
            raise RecordError(f"{path} is damaged (see {', '.join(wrong)}); {again}")
        result = values.get("result")
        record = cls(**{**values, "result": None if result is None else Result(**result)})
        if not folder.resolve().name.endswith(record.identity):
            raise RecordError(f"{path} is the record of another run, {record.identity}; {again}")
        return record


def _wrong(kind: Any, value: Any, name: str) -> list[str]:
    """Return the names of what is missing, unknown, or not of its type, of a value out of JSON.

    Args:
        kind: a type, or a dataclass of types.
        value: what should be one.
        name: of the value.
    """
    if is_dataclass(kind):
        if not isinstance(value, dict):
            return [name]
        known = get_type_hints(kind)
        needed = {
            f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING
        }
        wrong = [f"{name}.{key}" for key in sorted(needed - value.keys() | value.keys() - known)]
        for key in known:
            if key in value:
                wrong += _wrong(known[key], value[key], f"{name}.{key}")
        return wrong
    if get_origin(kind) is UnionType:
        found = [_wrong(each, value, name) for each in get_args(kind)]
        return [] if [] in found else found[0]
    if get_origin(kind) is dict and isinstance(value, dict):
        item = get_args(kind)[1]
        return [wrong for key in value for wrong in _wrong(item, value[key], f"{name}.{key}")]
    if get_origin(kind) is Literal:
        return [] if value in get_args(kind) else [name]
    if kind is Any:
        return []
    plain = get_origin(kind) or (int | float if kind is float else kind)
    is_right = isinstance(value, plain) and (kind is bool or not isinstance(value, bool))
    return [] if is_right else [name]


_CONFIG = {
    "horizon": int,
    "seed": int,
    "model.core": str,
    "task.name": str,
    **dict.fromkeys(("remedy", "optimizer", "probe", "training", "evaluation"), dict),
}
"""What every run's configuration holds, whatever its model and task are."""


def _impossible(values: dict[str, Any]) -> list[str]:
    """Return the names of what has its type and is yet not what a run leaves."""
    wrong, result = [], values.get("result")
    for name, kind in _CONFIG.items():
        wrong += _wrong(kind, value_at(values["config"], name), f"record.config.{name}")
    if (result is None) != (values["status"] == "failed") or (result and result["steps"] < 1):
        wrong.append("record.result")
    if result:
        seconds = values.get("provenance", {}).get("seconds")
        wrong += _wrong(float, seconds, "record.provenance.seconds")
    return wrong


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Work on a run's folder, made if it is missing, as the only process that does.

    What a process left that died is taken over; its unfinished files are deleted.

    Raises:
        RunTakenError: a live process works on it; names it, its host and when it started.
        OSError: the folder cannot be written to, or its file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / OWNER, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(file, folder)
        for leftover in folder.glob(f".*{_UNFINISHED}"):
            leftover.unlink(missing_ok=True)
        os.ftruncate(file, 0)
        with _naming(folder / OWNER):
            os.write(file, this_process())
        yield
    finally:
        os.close(file)


def this_process() -> bytes:
    """Return what ``owner.json`` says of a folder that is this process's."""
    owner = {
        "pid": os.getpid(),
        "host": platform.node(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
    }
    return (json.dumps(owner, indent=1) + "\n").encode()


def _lock(file: int, folder: Path) -> None:
    for tries_left in reversed(range(_LOCK_TRIES)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not tries_left:
                raise RunTakenError(_on_owner(folder)) from None
        except OSError as error:
            raise OSError(
                error.errno,
                f"the file system has no locks ({error.strerror}), so two processes on one run "
                "could not be kept apart; choose another output.root",
                str(folder),
            ) from error
        time.sleep(_LOCK_PAUSE)


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


Rows = list[dict[str, Any]]
"""Lines of ``metrics.jsonl``."""


class MetricsLog:
    """``metrics.jsonl``, written as the run goes.

    Args:
        path: the file.
        size: keep this many bytes of it, which a checkpoint vouches for; the rest was written by a
            process that died and is written again.
        on_rows: called with all rows, in order: first those that are kept, then each as it is
            written.

    Raises:
        RecordError: the file has fewer bytes, or these are not whole rows.
    """

    def __init__(
        self, path: Path, size: int = 0, on_rows: Callable[[Rows], None] | None = None
    ) -> None:
        self._path = path
        self._file = path.open("a+b")
        self._file.seek(0)
        try:
            rows = _rows_of(self._file.read(size), size)
        except ValueError as error:
            self._file.close()
            raise RecordError(
                f"{path} is not the log that its checkpoint was made with ({error}); delete the "
                "folder to make the run again"
            ) from error
        self._file.truncate(size)
        self._on_rows = on_rows
        if on_rows is not None:
            on_rows(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error, a disk that is full must not raise once more.
        with suppress(OSError) if kind is not None else nullcontext():
            self._file.close()

    def write(self, rows: Rows) -> None:
        """Append rows; an infinity or nan becomes ``null``. Other processes see them at once.

        Raises:
            OSError: they cannot be written; what a checkpoint vouches for is still there.
        """
        lines = "".join(_one_line(_strict(row)) + "\n" for row in rows)
        with _naming(self._path):
            self._file.write(lines.encode())
            self._file.flush()
        if self._on_rows is not None:
            self._on_rows(rows)

    def commit(self) -> int:
        """Bring everything to the disk; return the size of the file."""
        with _naming(self._path):
            os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size


def read_metrics(folder: Path) -> Rows:
    """Return the rows of ``metrics.jsonl``; a last line that is not whole is left out.

    Raises:
        ValueError: a line is damaged.
    """
    content = (folder / METRICS).read_bytes()
    return _rows_of(content, content.rfind(b"\n") + 1)


def _rows_of(content: bytes, size: int) -> Rows:
    """Return the rows in the first ``size`` bytes, which end with a line."""
    *lines, rest = content[:size].split(b"\n")
    if len(content) < size or rest:
        raise ValueError(f"{size} bytes of whole lines were expected, it has {len(content)}")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number} is damaged: {error}") from error
        if not isinstance(rows[-1], dict):
            raise ValueError(f"line {number} is damaged: it is no mapping")
    return rows


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON, whole or not at all; nan and infinities become null."""
    write_whole(path, (json.dumps(_strict(value), indent=1, allow_nan=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever ends the process."""
    os.replace(written(path, content), path)
    sync_names(path.parent)


_UNFINISHED = ".unfinished"


def written(path: Path, content: bytes) -> Path:
    """Write a file beside ``path``, and bring it to the disk; return where, to be renamed.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_UNFINISHED}")
    try:
        with _naming(path), temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def sync_names(folder: Path) -> None:
    """Bring what was renamed in a folder to the disk, so that it outlives a power failure."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have an error of the operating system say which file it is about."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


_one_line = json.JSONEncoder(allow_nan=False).encode


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
