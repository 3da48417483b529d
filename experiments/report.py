"""Makes one HTML page, and a CSV, from any set of records.

    python -m experiments.report runs/2026-11-28/12-00-00_horizon_ladder_fused_rnn
    python -m experiments.report runs/records                # every run there is
    python -m experiments.report FOLDER FOLDER --output page.html

A folder is that of a study, of a sweep, of one run, or one with any of these below it. The page is
``report.html`` in the first folder unless told otherwise; ``report.csv`` beside it has a line per
run. The page holds everything in itself: it can be sent, and opened without a network.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import jinja2
from scipy.special import stdtrit

from experiments import figures, tables, view
from experiments.command import command
from experiments.console import as_line
from experiments.expectations import QUANTITIES, Expectation, expectations, measure, parse_expected
from experiments.fields import ConfigError
from experiments.files import write_csv, write_text
from experiments.record import CONFIG, RECORD, Record
from experiments.run_folder import FAILURE, STUDY
from experiments.train import LEARNED_BELOW, SOLVED_BELOW
from experiments.view import Entry, Row, View, ViewError
from rnn_cuda.instruments import plots

LARGE_DRAWING = 110_000
"""Bytes of a drawing above which its pixels are kept instead."""
CONFIDENCE = 0.95


class ReportError(ValueError):
    """Folders that no report can be made from; the message says why."""


@dataclass
class Collection:
    """What was found in the folders.

    Attributes:
        studies: as they see their own runs.
        entries: every run once.
        problems: what could not be read, and why, by name.
    """

    studies: list[View] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what it says, and what it is sorted by."""

    text: str
    sort: float | str = ""

    @property
    def is_number(self) -> bool:
        """Whether it is set as numbers are."""
        return not isinstance(self.sort, str)


@dataclass(frozen=True)
class Line:
    """A line of a table, and the command that makes its runs again."""

    cells: list[Cell]
    command: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        title: what it is called.
        headings: of the columns.
        lines: its rows.
        note: what has to be said to read it.
    """

    title: str
    headings: list[str]
    lines: list[Line]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure as the page holds it."""

    name: str
    source: str
    caption: str


@dataclass(frozen=True)
class Section:
    """What the page shows of one task."""

    title: str
    tables: list[Table]
    statements: list[str]
    pictures: list[Picture]


# Reading


def gather(folders: Sequence[Path]) -> Collection:
    """Return what is in folders: studies, runs, and what cannot be read.

    Raises:
        ReportError: a folder is missing, or none holds a run.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ReportError(f"{folder} is {'not a folder' if folder.exists() else 'missing'}")
    found = Collection()
    entries: list[Entry] = []
    for path in _files(folders, STUDY):
        try:
            study = view.load(path.parent)
            study = replace(study, entries=[_checked(entry) for entry in study.entries])
            _ = study.rows, parse_expected(study.expected)
        except (ViewError, ConfigError, TypeError, AttributeError) as error:
            found.problems[str(path)] = str(error)
            continue
        found.studies.append(study)
        entries += study.entries
    seen = {entry.folder.resolve() for entry in entries}
    for path in _files(folders, FAILURE):
        found.problems[str(path.parent)] = view.reason_of_failure(path)
    runs = {path.parent for name in (RECORD, CONFIG) for path in _files(folders, name)}
    for folder in sorted(runs - seen):
        try:
            entries.append(_checked(view.entry_of(folder)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            found.problems[str(folder)] = f"no run that can be read: {error}"
    found.entries = _once(entries)
    if not found.entries and not found.problems:
        raise ReportError(f"no records in {', '.join(map(str, folders))}")
    for entry in found.entries:
        try:
            view.curve(entry, "loss")
        except ViewError as error:
            found.problems[f"log of {_title(entry)}"] = f"{error}; its curves are left out"
    return found


def _files(folders: Iterable[Path], name: str) -> list[Path]:
    paths = [path.resolve() for folder in folders for path in sorted(folder.rglob(name))]
    return list(dict.fromkeys(paths))


def _checked(entry: Entry) -> Entry:
    """Return a run without its record if that does not hold what a run leaves.

    Raises:
        TypeError: it has no horizon or seed.
    """
    for name, value in (("horizon", entry.horizon), ("seed", entry.seed)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer; got {value!r}")
    entry = replace(entry, label=str(entry.label))
    if entry.record is None:
        return entry
    defect = _defect(entry.record)
    if defect is None:
        return entry
    return replace(
        entry, record=None, reason=f"{entry.folder / RECORD} is no record of a run: {defect}"
    )


def _defect(record: Record) -> str | None:
    """Return what is wrong with a record; ``None`` if it can be shown."""
    number, text = int | float, str
    groups = dict.fromkeys(
        ("model", "task", "remedy", "optimizer", "probe", "training", "evaluation"), Mapping
    )
    expected: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("config", record.config, {**groups, "horizon": int, "seed": int}),
        ("config.model", record.config.get("model", {}), {"core": text}),
        ("config.task", record.config.get("task", {}), {"name": text}),
        ("probes", record.probes, dict.fromkeys(record.probes, Mapping)),
    ]
    if record.status in ("finished", "diverged"):
        expected += [
            (
                "result",
                record.result,
                {
                    **dict.fromkeys(("task", "metric", "verdict"), text),
                    **dict.fromkeys(("hidden_size", "parameters", "steps"), number),
                    **dict.fromkeys(("know_nothing_loss", "know_nothing_error"), number),
                },
            ),
            ("provenance", record.provenance, {"seconds": number}),
        ]
        if record.result.get("steps") == 0:
            return "result.steps is 0"
    elif record.status != "failed":
        return f"status is {record.status!r}"
    for where, values, kinds in expected:
        if not isinstance(values, Mapping):
            return f"{where} is {values!r:.60}"
        for key, kind in kinds.items():
            value = values.get(key)
            if not isinstance(value, kind) or isinstance(value, bool):
                return f"{where}.{key} is {value!r:.60}"
    return None


def _once(entries: Iterable[Entry]) -> list[Entry]:
    """Return every run once, however many folders hold it or studies name it."""
    by_identity: dict[str, Entry] = {}
    for entry in entries:
        record = entry.record
        identity = entry.identity if record is None else record.identity
        before = by_identity.get(identity)
        if before is None:
            by_identity[identity] = entry
        elif before.record is None and record is not None:
            by_identity[identity] = replace(entry, label=before.label)
        elif entry.contrast_of is None and before.contrast_of is not None:
            by_identity[identity] = replace(before, contrast_of=None)
    return list(by_identity.values())


# Arms


def by_task(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Return the runs whose configuration is known, by the name of their task."""
    names: dict[str, str] = {}
    for entry in entries:
        if entry.record is not None and entry.record.result:
            names[_task_key(entry.record.config)] = entry.record.result["task"]
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.record is not None:
            config = entry.record.config
            name = names.get(_task_key(config), config["task"]["name"])
            found.setdefault(name, []).append(entry)
    return {name: _told_apart(runs) for name, runs in found.items()}


def _task_key(config: Mapping[str, Any]) -> str:
    return json.dumps(config["task"], sort_keys=True)


def _told_apart(entries: Sequence[Entry]) -> list[Entry]:
    """Label runs so that equal labels mean equal settings, horizon and seed aside.

    Where several arms have one label, what tells them apart is added to it; where one arm has
    several labels, the first is taken.
    """
    settings = [_settings(entry) for entry in entries]
    keys = [json.dumps(each, sort_keys=True) for each in settings]
    arms: dict[str, tuple[str, dict[str, Any]]] = {}
    for entry, key, own in zip(entries, keys, settings, strict=True):
        arms.setdefault(key, (entry.label, own))
    labels = {}
    for key, (label, own) in arms.items():
        names = _distinguishing([other for name, other in arms.values() if name == label])
        words = ", ".join(
            f"{name}={_plain(own[name])}" if name in own else f"without {name}" for name in names
        )
        labels[key] = f"{label} ({words})" if words else label
    by_label = {label: key for key, (label, _) in reversed(arms.items())}
    return [
        replace(
            entry,
            label=labels[key],
            contrast_of=labels.get(by_label.get(entry.contrast_of or "", ""), entry.contrast_of),
        )
        for entry, key in zip(entries, keys, strict=True)
    ]


def _distinguishing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a few names whose values, present or not, tell all of these settings apart."""
    groups = ("training", "model", "remedy", "optimizer", "task", "evaluation", "probe")

    def values(names: Sequence[str]) -> set[str]:
        return {json.dumps([each.get(name, "absent") for name in names]) for each in settings}

    names = list(dict.fromkeys(name for each in settings for name in each))
    # Of names that tell as many apart, the one of the group that a reader thinks of first.
    rank = {group: index for index, group in enumerate(groups)}
    names.sort(key=lambda name: rank.get(name.partition(".")[0], len(groups)))
    chosen: list[str] = []
    while len(values(chosen)) < len(settings):
        chosen.append(max(names, key=lambda name: len(values([*chosen, name]))))
    return chosen


def _settings(entry: Entry) -> dict[str, Any]:
    """Return what makes an arm: the flattened configuration without horizon, seed, data folder."""
    assert entry.record is not None
    values = flat(entry.record.config)
    for name in ("horizon", "seed", "task.root"):
        values.pop(name, None)
    return values


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, keys joined by dots; an empty one stays, as ``{}``."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# Tables


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean by Student's t; ``None`` for one value."""
    if len(values) < 2:
        return None
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * stdev(values)
    half /= math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def results(seen: View) -> Table:
    """Return the table of a task: an arm at a horizon per line."""
    lines = []
    for row in seen.rows:
        known = [record.config for record in row.records] or [
            entry.record.config
            for entry in seen.entries
            if entry.record is not None and (entry.label, entry.horizon) == (row.label, row.horizon)
        ]
        seeds = sorted({config["seed"] for config in known} | set(row.failures))
        lines.append(Line(_row_cells(row), _command(known[0], [row.horizon], seeds)))
    metric = seen.metric or "metric"
    return Table(
        "Results",
        [
            "T",
            "arm",
            "H",
            "parameters",
            "seeds",
            f"test {metric}, mean",
            "95 % interval",
            "knowing nothing",
            "verdicts",
            "log10 ratio, initial",
            "trained",
            "ms per step",
        ],
        lines,
        "Mean and 95 % confidence interval of the mean over seeds (Student's t; none for a single "
        f"seed); seeds that diverged have no {metric}. Knowing nothing: the best answer that "
        f"ignores the input. Solved, learned: test error below {SOLVED_BELOW:.0%}, "
        f"{LEARNED_BELOW:.0%} of that. log10 ratio: |dL/dh_1| / |dL/dh_T|, total adjoint, mean "
        "over seeds, at initialisation and trained. ms per step: median over seeds of wall-clock "
        "time, evaluation, probes and checkpoints included.",
    )


def _row_cells(row: Row) -> list[Cell]:
    values = row.values("test_metric")
    ends = interval(values)
    first = row.records[0].result if row.records else {}
    is_accuracy = first.get("metric") == "accuracy"
    nothing = view.know_nothing_metric(row.records[0]) if row.records else None
    total = len(row.records) + len(row.failures)
    pattern = "{:.3f}" if is_accuracy else "{:.3g}"
    label = f"{row.label} (beside {row.contrast_of})" if row.is_contrast else row.label
    return [
        _number(row.horizon, "{:d}"),
        Cell(as_line(label), as_line(label)),
        _spread(row.values("hidden_size")),
        _spread(row.values("parameters")),
        _number(total, "{:d}"),
        _number(mean(values) if values else None, pattern),
        Cell("")
        if ends is None
        else Cell(f"{pattern.format(ends[0])} to {pattern.format(ends[1])}", ends[0]),
        _number(nothing, pattern),
        Cell(verdicts(row), row.count("solved", "learned") / max(1, total)),
        _ratio(row, "initial"),
        _ratio(row, "trained"),
        _number(row.milliseconds_per_step, "{:.2f}"),
    ]


def verdicts(row: Row) -> str:
    """Return how many seeds ended how, e.g. ``solved 2, learned 1``."""
    counts = {name: row.count(name) for name in ("solved", "learned", "failed", "diverged")}
    words = [f"{name} {count}" for name, count in counts.items() if count]
    if row.failures:
        words.append(f"error {len(row.failures)}")
    return ", ".join(words) or "no result"


def _ratio(row: Row, stage: str) -> Cell:
    profiles, known = row.profiles(stage), row.mean_log10_ratio(stage)
    if known is not None:
        return _number(known, "{:.1f}")
    if any(profile and profile[0] == 0 for profile in profiles):
        return Cell("exactly 0", -math.inf)
    return Cell("")


def _number(value: float | None, pattern: str) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell("", math.nan)
    return Cell(pattern.format(value), value)


def _spread(values: Sequence[float]) -> Cell:
    return Cell(tables.numbers(values, "{:.0f}") if values else "", min(values, default=""))


def _command(config: Mapping[str, Any], horizons: Sequence[int], seeds: Sequence[int]) -> str:
    try:
        return command(config, horizons, seeds)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"no command: its configuration is not one of this program ({error!r})"


def other_lengths(seen: View) -> Table | None:
    """Return what trained models reach at other lengths; ``None`` if none was tested there."""
    lines = []
    for row in seen.rows:
        by_length: dict[int, list[float]] = {}
        for record in row.records:
            for length, error in (record.result.get("test_error_at") or {}).items():
                if error is not None:
                    by_length.setdefault(int(length), []).append(error)
        if by_length:
            by_length[row.horizon] = row.values("test_error")
        for length, errors in sorted(by_length.items()):
            if errors:
                lines.append(
                    Line(
                        [
                            Cell(as_line(row.label), row.label),
                            _number(row.horizon, "{:d}"),
                            _number(length, "{:d}"),
                            _number(mean(errors), "{:.3g}"),
                        ]
                    )
                )
    if not lines:
        return None
    return Table(
        "Trained at one length, tested at others",
        ["arm", "trained at T", "tested at T", "test error, mean"],
        lines,
        "Error: of a classifier the share of wrong answers.",
    )


def gaps(seen: View) -> Table | None:
    """Return training and test error side by side; ``None`` if no run has both."""
    lines = []
    for row in seen.rows:
        pairs = [
            (record.result["train_error"], record.result["test_error"])
            for record in row.records
            if None not in (record.result.get("train_error"), record.result.get("test_error"))
        ]
        if pairs:
            train, test = (mean(column) for column in zip(*pairs, strict=True))
            lines.append(
                Line(
                    [
                        _number(row.horizon, "{:d}"),
                        Cell(as_line(row.label), row.label),
                        _number(train, "{:.3g}"),
                        _number(test, "{:.3g}"),
                        _number(test - train, "{:.2g}"),
                    ]
                )
            )
    if not lines:
        return None
    return Table(
        "Training and test error",
        ["T", "arm", "training error, mean", "test error, mean", "difference"],
        lines,
        "Both of the trained model. Tasks that draw fresh batches have no fixed training set: "
        "there the training error is that of another fresh sample.",
    )


def expected(studies: Sequence[View]) -> Table | None:
    """Return signatures and published numbers beside what was measured; ``None`` without any."""
    lines = [
        line
        for study in studies
        for each in parse_expected(study.expected)
        for line in _expected_lines(study, each, each in expectations(study))
    ]
    if not lines:
        return None
    return Table(
        "Expected and published",
        ["study", "arm", "T", "quantity", "expected", "measured", "verdict", "source", "settings"],
        lines,
        "A signature is an interval that the study states beforehand: it is met if the measured "
        "number lies in it. A published number is shown, and nothing is concluded from it. "
        "Measured: ratio, the mean over seeds; test metric, the median.",
    )


def _expected_lines(study: View, each: Expectation, is_compared: bool) -> Iterator[Line]:
    rows = [row for row in study.rows if each.is_of(row)] or [None]
    for row in rows:
        for quantity in each.values:
            measured = measure(row, quantity) if row is not None else None
            if not each.is_signature:
                words = "published" if measured is not None else "published; not measured"
            elif not is_compared:  # runs whose settings are not those that it holds for
                words = "not measured: these runs have other settings"
            else:
                met = each.is_met(row)[quantity] if row is not None else None
                words = {True: "met", False: "not met", None: "not measured"}[met]
            source = each.source if not each.is_signature else study.expected.get("source", "")
            settings = each.settings or ", ".join(
                f"{key}={_plain(value)}"
                for key, value in (study.expected.get("settings") or {}).items()
            )
            labels = ", ".join(each.labels) if row is None else row.label
            horizon = each.horizon if row is None else row.horizon
            yield Line(
                [
                    Cell(as_line(study.name), study.name),
                    Cell(as_line(labels), labels),
                    Cell("any") if horizon is None else _number(horizon, "{:d}"),
                    Cell(QUANTITIES[quantity], quantity),
                    Cell(each.cell(quantity)),
                    _number(measured, "{:.3g}"),
                    Cell(words, words),
                    Cell(as_line(str(source))),
                    Cell(as_line(settings)),
                ]
            )


def speeds(entries: Sequence[Entry]) -> list[str]:
    """Say how much faster ``fused_rnn`` trains than ``rnn``, where both are there alike."""
    groups: dict[str, dict[str, dict[int, Record]]] = {}
    for entry in entries:
        record = entry.record
        if record is None or record.status != "finished":
            continue
        core = record.config["model"]["core"]
        if core not in ("fused_rnn", "rnn"):
            continue
        values = {**flat(record.config), "model.core": "", "seed": ""}
        machine = [record.provenance.get(name) for name in ("platform", "device_name", "torch")]
        key = json.dumps([values, machine], sort_keys=True)
        own = groups.setdefault(key, {"fused_rnn": {}, "rnn": {}})
        own[core][record.config["seed"]] = record
    said = []
    for own in groups.values():
        seeds = sorted(set(own["fused_rnn"]) & set(own["rnn"]))
        if not seeds:
            continue
        fused, plain = (
            median(1e3 * r.provenance["seconds"] / r.result["steps"] for r in records)
            for records in ([own[core][seed] for seed in seeds] for core in ("fused_rnn", "rnn"))
        )
        if fused > 0 and plain > 0:
            record = own["fused_rnn"][seeds[0]]
            said.append(
                f"{record.result['task']}, T = {record.config['horizon']}, "
                f"H = {record.result['hidden_size']}: fused_rnn trains {plain / fused:.2f} times "
                f"as fast as rnn, end to end ({fused:.2f} against {plain:.2f} ms per step, median "
                f"over {len(seeds)} seed(s), all other settings equal)."
            )
    return said


def provenance(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return when, where and with what runs were made, every value that occurs."""
    names = {
        "rnn_cuda": "rnn_cuda",
        "torch": "PyTorch",
        "python": "Python",
        "hydra": "Hydra",
        "platform": "machine",
        "cpu_capability": "CPU capability",
        "device_name": "GPU",
        "git_commit": "commit",
        "backend": "backend",
    }
    found = []
    started = sorted(str(r.provenance["started"]) for r in records if r.provenance.get("started"))
    if started:
        ends = dict.fromkeys((started[0], started[-1]))
        found.append(("runs ended", " to ".join(ends)))
    for name, title in names.items():
        values = {}
        for record in records:
            value = record.provenance.get(name)
            if value in (None, "", [], {}):
                continue
            text = _plain(value)
            if name == "backend" and isinstance(value, Mapping):
                text = "; ".join(f"{key}: {_plain(item)}" for key, item in value.items())
            if name == "git_commit" and record.provenance.get("git_modified"):
                text += " (with changes not committed)"
            values[text] = None
        if values:
            found.append((title, as_line(" | ".join(values))))
    for name in ("device", "precision", "threads"):
        values = dict.fromkeys(_plain(r.config[name]) for r in records if name in r.config)
        if values:
            found.append((name, ", ".join(values)))
    return found


# The page


def pictures(seen: View, problems: dict[str, str]) -> list[Picture]:
    """Draw what the records of a task allow; a figure that cannot be drawn is a problem."""

    def on_problem(name: str, error: Exception) -> None:
        problems[f"figure {name} of {seen.name}"] = f"not drawn: {type(error).__name__}: {error}"

    with tempfile.TemporaryDirectory() as folder:
        return [
            Picture(each.name, _embedded(each, Path(folder)), as_line(each.caption))
            for each in figures.drawn(seen, on_problem)
        ]


def _embedded(drawn: figures.Drawn, folder: Path) -> str:
    """Return a figure as a data URI: a drawing, or pixels where that would be large."""
    if not drawn.is_large:
        (path,) = plots.save(drawn.figure, folder / "figure", ["svg"])
        content = path.read_bytes()
        if len(content) <= LARGE_DRAWING:
            return f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
    (path,) = plots.save(drawn.figure, folder / "figure", ["webp"])
    return f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode()}"


def page(found: Collection) -> str:
    """Return the page as HTML."""
    problems = dict(found.problems)
    for entry in found.entries:
        if entry.failure is not None:
            problems[_title(entry)] = entry.failure
    sections = []
    for task, entries in by_task(found.entries).items():
        seen = View(task, "", "", entries)
        shown = [results(seen), other_lengths(seen), gaps(seen)]
        sections.append(
            Section(
                task,
                [table for table in shown if table is not None],
                tables.conclusions(seen) if seen.records else [],
                pictures(seen, problems),
            )
        )
    records = [entry.record for entry in found.entries if entry.record is not None]
    names = list(dict.fromkeys(study.name for study in found.studies))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=as_line(", ".join(names)) or "Runs",
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        studies=[
            {
                "name": as_line(study.name),
                "about": as_line(study.about) if study.about != "-" else "",
                "command": as_line(study.command),
                "runs": len(study.entries),
                "kernel": tables.conclusions(replace(study, entries=[], expected={})),
            }
            for study in found.studies
        ],
        runs=len(found.entries),
        records=len(records),
        provenance=provenance(records),
        expected=expected(found.studies),
        speeds=speeds(found.entries),
        sections=sections,
        problems={as_line(name): as_line(reason) for name, reason in problems.items()},
    )


def _title(entry: Entry) -> str:
    return f"{entry.label}, T={entry.horizon}, seed {entry.seed} ({entry.folder.name})"


def csv_rows(entries: Sequence[Entry]) -> tuple[list[str], list[list[Any]]]:
    """Return the CSV: header, and a line per run."""
    lines = []
    for entry in entries:
        record = entry.record
        line: dict[str, Any] = {
            "identity": entry.identity,
            "label": entry.label,
            "status": "no record" if record is None else record.status,
            "reason": entry.failure or "",
            "folder": str(entry.folder),
            "horizon": entry.horizon,
            "seed": entry.seed,
        }
        if record is not None:
            line |= {"identity": record.identity, "reason": record.reason or ""}
            line |= {f"config.{key}": value for key, value in flat(record.config).items()}
            line |= {f"result.{key}": value for key, value in flat(record.result).items()}
            for stage in ("initial", "trained"):
                adjoint = view.probed(record, "adjoint", stage)
                line[f"log10_ratio.{stage}"] = adjoint.get("log10_ratio")
            line["seconds"] = record.provenance.get("seconds")
        lines.append(line)
    header = list(dict.fromkeys(key for line in lines for key in line))
    return header, [[_csv_value(line.get(key)) for key in header] for line in lines]


def _csv_value(value: Any) -> Any:
    if isinstance(value, list | tuple | Mapping | bool):
        return json.dumps(value)
    return "" if value is None else value


def write(folders: Sequence[Path], output: Path | None = None) -> tuple[Path, Path]:
    """Write page and CSV; return where they are.

    Raises:
        ReportError: there is nothing to report on.
        OSError: a file cannot be written.
    """
    output = folders[0] / "report.html" if output is None else output
    beside = output.with_suffix(".csv")
    if output == beside or not output.name:
        raise ReportError(f"the page must not be called {output}, as the CSV beside it is")
    found = gather(folders)
    write_text(output, page(found))
    write_csv(beside, *csv_rows(found.entries))
    return output, beside


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="Make one HTML page, and a CSV, from any set of records.",
    )
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="+",
        type=Path,
        help="of a study, a sweep or a run, or one with any of these below it",
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="the page; report.html in the first FOLDER"
    )
    options = parser.parse_args(arguments)
    try:
        files = write(options.folders, options.output)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in files:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
