"""What a study asks of its records: rows of a table, whatever of them is there.

A study's folder holds ``study.json``: the name, the command, what is expected, and a line for each
run that says where its record is. Several studies are viewed together as one. ``failure.json`` says
why a member of a sweep failed as a whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean, median
from typing import Any

from experiments.record import (
    CONFIG,
    METRICS,
    Record,
    RecordError,
    is_owned,
    read_metrics,
    write_json,
)
from experiments.run_folder import FAILURE, STUDY
from experiments.study import Study, StudyConfig

VERSION = 1


class ViewError(ValueError):
    """Folders that there is nothing to see in; the message says why."""


@dataclass(frozen=True)
class Entry:
    """One run of a view.

    Attributes:
        label: of its arm.
        horizon, seed: of the run.
        contrast_of: the arm beside which this one stands at a few horizons, if it is a contrast.
        folder: of the run.
        record: ``None`` if it has not ended, or cannot be read.
        reason: then, why.
    """

    label: str
    horizon: int
    seed: int
    contrast_of: str | None
    folder: Path
    record: Record | None
    reason: str = ""

    @property
    def identity(self) -> str:
        """Of the run, whether or not it has a record: the end of its folder's name."""
        return self.folder.name.rpartition("-")[2]

    @property
    def failure(self) -> str | None:
        """Why there are no numbers; ``None`` if there are. Diverging is a result."""
        if self.record is None:
            return self.reason
        return self.record.reason if self.record.status == "failed" else None


@dataclass(frozen=True)
class Row:
    """An arm at one horizon.

    Attributes:
        label, horizon, contrast_of: as in `Entry`.
        records: of the seeds that finished or diverged, in the order of the study.
        failures: why others have no numbers, by seed.
    """

    label: str
    horizon: int
    contrast_of: str | None
    records: list[Record]
    failures: dict[int, str]

    @property
    def is_contrast(self) -> bool:
        """Whether the arm stands beside another one."""
        return self.contrast_of is not None

    def values(self, name: str) -> list[float]:
        """Return a number of ``result`` for each seed that has it; those that diverged have few."""
        values = (getattr(record.result, name) for record in self.records)
        return [value for value in values if value is not None]

    def count(self, *verdicts: str) -> int:
        """Return how many seeds ended with one of these verdicts."""
        return sum(record.result.verdict in verdicts for record in self.records)

    @property
    def is_learned(self) -> bool:
        """Whether most of the seeds solved or learned it."""
        return 2 * self.count("solved", "learned") > len(self.records)

    def log10_ratios(self, stage: str) -> list[float | None]:
        """Return log10 of the adjoint's first-to-last ratio; ``None``: zero, or not measured."""
        return [probed(record, "adjoint", stage).get("log10_ratio") for record in self.records]

    @property
    def is_measured(self) -> bool:
        """Whether the adjoint at initialisation was; a run can be without that probe."""
        return bool(self.profiles("initial"))

    def mean_log10_ratio(self, stage: str = "initial") -> float | None:
        """Return the mean over seeds; ``None`` if no seed has one."""
        known = [ratio for ratio in self.log10_ratios(stage) if ratio is not None]
        return mean(known) if known else None

    def profiles(self, stage: str) -> list[list[float]]:
        """Return the adjoint's norm by time step, for each seed that has it."""
        norms = (probed(record, "adjoint", stage).get("state_norm") for record in self.records)
        return [norm for norm in norms if norm is not None]

    @property
    def milliseconds_per_step(self) -> float | None:
        """Return the median wall-clock time of a training step; see `Record.seconds_per_step`."""
        times = [record.seconds_per_step for record in self.records]
        known = [1e3 * time for time in times if time is not None]
        return median(known) if known else None


def probed(record: Record, probe: str, stage: str) -> Mapping[str, Any]:
    """Return what a probe measured first or last (``initial``, ``trained``); empty if nothing."""
    return (record.probes.get(probe) or {}).get(stage) or {}


def shown(record: Record, error: float) -> float:
    """Return what a table shows of an error: an accuracy, of a classifier, else the error.

    The counterpart of `experiments.tasks.shown_metric`, for a record.
    """
    return 1 - error if record.result.metric == "accuracy" else error


def know_nothing_metric(record: Record) -> float:
    """Return what a table shows of knowing nothing."""
    return shown(record, record.result.know_nothing_error)


def baselines(records: Iterable[Record]) -> dict[str, list[float]]:
    """Return what simple methods reach on the test data of records, by name, as tables show it."""
    found: dict[str, list[float]] = {}
    for record in records:
        for name, error in record.result.baselines.items():
            found.setdefault(name, []).append(shown(record, error))
    return found


@dataclass(frozen=True)
class View:
    """Runs to look at together.

    Attributes:
        name: of the study, or of what was joined.
        about: a sentence on what it asks.
        command: that made it.
        expected: what was known of it beforehand, as the study's YAML has it.
        kernel_checks: the fused kernel beside each layer of torch that it replaces here.
        figures: that answer what it asks, by name.
        entries: the runs.
        failed: members of a sweep that never became a study: why, by their folder.
    """

    name: str
    about: str
    command: str
    entries: list[Entry]
    expected: Mapping[str, Any] = field(default_factory=dict)
    kernel_checks: Sequence[Mapping[str, Any]] = ()
    figures: Sequence[str] = StudyConfig.figures
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """The table: an arm at a horizon each, ladders before contrasts, by horizon."""
        rows: dict[tuple[bool, int, str], Row] = {}
        for entry in self.entries:
            key = (entry.contrast_of is not None, entry.horizon, entry.label)
            row = rows.setdefault(key, Row(entry.label, entry.horizon, entry.contrast_of, [], {}))
            if entry.record is None or entry.failure is not None:
                row.failures[entry.seed] = entry.failure or ""
            else:
                row.records.append(entry.record)
        return [rows[key] for key in sorted(rows, key=lambda key: key[:2])]

    def with_reasons(self, reasons: Mapping[str, str]) -> View:
        """Return the same view; runs without a record get these reasons, by identity."""
        entries = [
            replace(entry, reason=reason)
            if entry.record is None and (reason := reasons.get(entry.identity))
            else entry
            for entry in self.entries
        ]
        return replace(self, entries=entries)

    @property
    def records(self) -> list[Record]:
        """All records that hold numbers."""
        return [record for row in self.rows for record in row.records]

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in the order of the entries."""
        return list(dict.fromkeys(record.result.task for record in self.records))

    @property
    def metric(self) -> str:
        """What the table shows of the task; several if the tasks differ."""
        return ", ".join(dict.fromkeys(record.result.metric for record in self.records))

    @property
    def failures(self) -> dict[str, str]:
        """Why runs have no numbers, by arm, horizon and seed."""
        return dict(self.failed) | {
            f"{entry.label}, T={entry.horizon}, seed {entry.seed}": entry.failure
            for entry in self.entries
            if entry.failure is not None
        }


def curve(entry: Entry, name: str) -> tuple[list[int], list[float]]:
    """Return the training steps at which something was logged, and its values.

    Args:
        entry: of the run.
        name: ``loss``, ``gradient_norm`` or ``test_error``.

    Raises:
        ViewError: the log cannot be read.
    """
    return _log(entry).curves.get(name, ([], []))


def measurements(entry: Entry, probe: str) -> list[dict[str, Any]]:
    """Return every measurement of a probe in a run, each with its training step.

    Raises:
        ViewError: the log cannot be read.
    """
    return _log(entry).probes.get(probe, [])


@dataclass(frozen=True)
class _Log:
    curves: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    probes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def _log(entry: Entry) -> _Log:
    path = entry.folder / METRICS
    try:
        status = path.stat()
        return _read_log(entry.folder, status.st_size, status.st_mtime_ns)
    except FileNotFoundError:
        return _Log()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ViewError(f"{path} cannot be read: {error}") from error


@lru_cache(maxsize=1000)  # every figure asks again
def _read_log(folder: Path, size: int, modified: int) -> _Log:
    log = _Log()
    for row in read_metrics(folder):
        if "probe" in row:
            log.probes.setdefault(row["probe"], []).append(row)
            continue
        for name in ("loss", "gradient_norm", "test_error"):
            if row.get(name) is not None:
                steps, values = log.curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(row[name])
    return log


def save(study: Study, folder: Path, command: str, kernel_checks: Sequence[Any] = ()) -> None:
    """Write ``study.json``; where records are is said relative to ``folder``."""
    runs = [
        {
            "label": member.label,
            "horizon": member.run.horizon,
            "seed": member.run.seed,
            "contrast_of": member.contrast_of,
            "folder": os.path.relpath(member.folder, folder),
        }
        for member in study.members
    ]
    write_json(
        folder / STUDY,
        {
            "version": VERSION,
            "name": study.config.name,
            "about": study.config.about,
            "command": command,
            "expected": study.expected,
            "kernel_checks": kernel_checks,
            "figures": study.config.figures,
            "runs": runs,
        },
    )


def load(folder: Path) -> View:
    """Return what is to be seen in a folder: of a study, a sweep, or of any runs below it.

    Raises:
        ViewError: it holds none of these.
    """
    if (folder / STUDY).exists():
        return _load_study(folder)
    studies = sorted((path.parent for path in folder.rglob(STUDY)), key=_order)
    failed = {
        path.parent.name: reason_of_failure(path)
        for path in sorted(folder.rglob(FAILURE), key=lambda path: _order(path.parent))
    }
    if studies or failed:
        views = [_load_study(path) for path in studies]
        return replace(joined(views, f"{len(studies)} studies", studies), failed=failed)
    entries = [entry_of(path.parent, None, None) for path in sorted(folder.rglob(CONFIG))]
    if not entries:
        raise ViewError(f"{folder} holds no {STUDY} and no runs")
    return View(folder.name, "", "", entries)


def reason_of_failure(path: Path) -> str:
    """Return what a member's ``failure.json`` gives as the reason."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} cannot be read: {error}"


def joined(views: Sequence[View], name: str, folders: Sequence[Path]) -> View:
    """Return several views as one; labels that would collide get their folder's name."""
    labels = [label for view in views for label in {entry.label for entry in view.entries}]
    entries = []
    for view, folder in zip(views, folders, strict=True):

        def unique(label: str | None, folder: Path = folder) -> Any:
            return f"{label} ({folder.name})" if label and labels.count(label) > 1 else label

        entries += [
            replace(entry, label=unique(entry.label), contrast_of=unique(entry.contrast_of))
            for entry in view.entries
        ]
    expected = next((view.expected for view in views if view.expected), {})
    return View(name, "", "", entries, expected)


def _load_study(folder: Path) -> View:
    path = folder / STUDY
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("version")
        if version != VERSION:
            raise ViewError(f"{path} has version {version}, this program reads {VERSION}")
        runs = values.pop("runs")
        if check := values.pop("kernel_check", None):  # written when there was one at most
            values["kernel_checks"] = [{"torch": "RNN", **check}]
        entries = [
            entry_of((folder / run["folder"]).resolve(), run["label"], run["contrast_of"], run)
            for run in runs
        ]
        return View(entries=entries, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise ViewError(f"{path} cannot be read: {error}") from error


def entry_of(
    folder: Path,
    label: str | None = None,
    contrast_of: str | None = None,
    run: Mapping[str, Any] | None = None,
) -> Entry:
    """Return the run in a folder.

    Args:
        folder: of the run.
        label: of its arm; by default the record's.
        contrast_of: as in `Entry`.
        run: its ``horizon`` and ``seed``; by default the record's, or those of ``config.json``.

    Raises:
        OSError, ValueError, KeyError, TypeError: there is no record, and no configuration that can
            be read.
    """
    record, reason = None, ""
    try:
        record = Record.load(folder)
    except FileNotFoundError:
        reason = "still running" if is_owned(folder) else "has not ended; the same command goes on"
    except RecordError as error:
        reason = str(error)
    if run is None:
        run = record.config if record is not None else _config(folder)
    if label is None:
        label = record.label if record is not None else folder.name
    for name in ("horizon", "seed"):
        if type(run[name]) is not int:
            raise TypeError(f"{name} must be an integer; got {run[name]!r}")
    return Entry(str(label), run["horizon"], run["seed"], contrast_of, folder, record, reason)


def _config(folder: Path) -> Mapping[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def _order(path: Path) -> tuple[int, str]:
    number = path.name.split("_")[0]
    return (int(number) if number.isdigit() else 0, path.name)


def decades_per_step(rows: Iterable[Row]) -> float | None:
    """Return the mean slope of log10 of the adjoint norm against lag at initialisation.

    That is the median over rows and seeds of the first-to-last ratio over the number of lags;
    ``None`` if no ratio has a logarithm. Negative: the gradient vanishes going back in time.
    """
    slopes = []
    for record in (record for row in rows for record in row.records):
        measured = probed(record, "adjoint", "initial")
        lags = len(measured.get("state_norm", ())) - 1
        if measured.get("log10_ratio") is not None and lags > 0:
            slopes.append(measured["log10_ratio"] / lags)
    return median(slopes) if slopes else None
