"""The tables of a report, as text cells; how they look is the page's affair."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from scipy.special import stdtrit

from experiments import tables, view
from experiments.command import command
from experiments.console import as_line
from experiments.expectations import QUANTITIES, Expectation, expectations, measure, parse_expected
from experiments.report.arms import plain
from experiments.view import Row, View

CONFIDENCE = 0.95


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
    has_baselines = bool(view.baselines(seen.records))
    for row in seen.rows:
        known = [record.config for record in row.records] or [
            entry.record.config
            for entry in seen.entries
            if entry.record is not None and (entry.label, entry.horizon) == (row.label, row.horizon)
        ]
        seeds = sorted({config["seed"] for config in known} | set(row.failures))
        lines.append(Line(_row_cells(row, has_baselines), _command(known[0], [row.horizon], seeds)))
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
            *(["baselines"] if has_baselines else []),
            "verdicts",
            "log10 ratio, initial",
            "trained",
            "ms per step",
        ],
        lines,
        "Mean and 95 % confidence interval of the mean over seeds (Student's t; none for a single "
        f"seed); seeds that diverged have no {metric}. Knowing nothing: the best answer that "
        f"ignores the input. Solved / learned: {tables.bounds(seen)}. log10 ratio: |dL/dh_1| / "
        "|dL/dh_T|, total adjoint, mean over seeds, at initialisation and trained. ms per step: "
        "median over seeds of wall-clock time, evaluation, probes and checkpoints included; none "
        "where the processor did other work as well.",
    )


def _row_cells(row: Row, has_baselines: bool) -> list[Cell]:
    values = row.values("test_metric")
    ends = interval(values)
    is_accuracy = bool(row.records) and row.records[0].result.metric == "accuracy"
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
        *([_baselines(row, pattern)] if has_baselines else []),
        Cell(verdicts(row), row.count("solved", "learned") / max(1, total)),
        _ratio(row, "initial"),
        _ratio(row, "trained"),
        _number(row.milliseconds_per_step, "{:.2f}"),
    ]


def _baselines(row: Row, pattern: str) -> Cell:
    found = view.baselines(row.records)
    words = (f"{name} {tables.numbers(values, pattern)}" for name, values in found.items())
    return Cell(as_line(", ".join(words)))


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
            for length, error in record.result.test_error_at.items():
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


def measures(seen: View) -> Table | None:
    """Return what the task measures beside its error; ``None`` if it measures nothing else."""
    names = dict.fromkeys(name for record in seen.records for name in record.result.measures)
    lines = []
    for row in seen.rows:
        values = [
            [
                each
                for record in row.records
                if (each := record.result.measures.get(name)) is not None
            ]
            for name in names
        ]
        if any(values):
            lines.append(
                Line(
                    [
                        _number(row.horizon, "{:d}"),
                        Cell(as_line(row.label), row.label),
                        *(_number(mean(own) if own else None, "{:.3g}") for own in values),
                    ]
                )
            )
    if not lines:
        return None
    headings = ["T", "arm", *map(as_line, names)]
    return Table("Beside the error", headings, lines, "Means over seeds, on held-out data.")


def gaps(seen: View) -> Table | None:
    """Return training and test error side by side; ``None`` if no run has both."""
    lines = []
    for row in seen.rows:
        pairs = [
            (record.result.train_error, record.result.test_error)
            for record in row.records
            if None not in (record.result.train_error, record.result.test_error)
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
    lines: list[Line] = []
    for study in studies:
        compared = expectations(study)
        for each in parse_expected(study.expected):
            lines += _expected_lines(study, each, each in compared)
    if not lines:
        return None
    return Table(
        "Expected and published",
        ["study", "arm", "T", "quantity", "expected", "measured", "verdict", "source", "settings"],
        lines,
        "A signature is an interval that the study states beforehand: it is met if the measured "
        "number lies in it. A published number is shown, and nothing is concluded from it. "
        "Measured: ratio, the mean over seeds; test metric, the median. "
        + " ".join(dict.fromkeys(map(_origin, studies))),
    )


def _origin(study: View) -> str:
    """Say where the signatures of a study come from, and for which settings they hold."""
    if not any(each.is_signature for each in parse_expected(study.expected)):
        return ""
    settings = ", ".join(
        f"{key}={plain(value)}" for key, value in (study.expected.get("settings") or {}).items()
    )
    return as_line(
        f"Signatures of {study.name}: {study.expected.get('source', 'no source')}"
        + (f"; they hold for {settings}." if settings else ".")
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
                    Cell(as_line(each.source)),
                    Cell(as_line(each.settings)),
                ]
            )
