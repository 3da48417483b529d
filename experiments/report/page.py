"""Makes the page of a report: one HTML file that holds everything, or Markdown for a repository."""

from __future__ import annotations

import base64
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from experiments import figures, tables
from experiments.console import as_line
from experiments.expectations import expectations, statement
from experiments.looks import saved_looks
from experiments.report.arms import by_task
from experiments.report.reading import Collection, title
from experiments.report.result_tables import (
    Table,
    expected,
    gaps,
    measures,
    other_lengths,
    results,
)
from experiments.report.summary import provenance, speeds
from experiments.view import Entry, View
from rnn_cuda.instruments import plots

LARGE_DRAWING = 110_000
"""Bytes of a drawing above which its pixels are kept instead."""


@dataclass(frozen=True)
class Picture:
    """A figure of the page; ``source`` is where the page finds it."""

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
    looks: list[Shown]


@dataclass(frozen=True)
class Shown:
    """A look at a trained model.

    Attributes:
        title: what it is, and of which run.
        source: where the page finds a picture; empty for text.
        texts: by title, one for each step that is shown; the last one is of the trained model.
    """

    title: str
    source: str
    texts: dict[str, str]


def html(found: Collection) -> str:
    """Return a page that holds its figures, all that the records allow."""
    with tempfile.TemporaryDirectory() as folder:

        def embedded(task: str, drawn: figures.Drawn) -> str:
            return _embedded(_saved(drawn, Path(folder) / task))

        return _rendered("page.html.j2", _content(found, figures.EVERY, embedded, _embedded))


def _embedded(path: Path) -> str:
    kind = {".svg": "svg+xml"}.get(path.suffix, path.suffix[1:])
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def markdown(found: Collection, folder: Path) -> str:
    """Return a page, and leave its figures in a folder beside it.

    Args:
        found: what it is about.
        folder: for the figures that the studies name.
    """
    names = dict.fromkeys(name for study in found.studies for name in study.figures)

    def beside(task: str, drawn: figures.Drawn) -> str:
        return f"{folder.name}/{_saved(drawn, folder / task).name}"

    def copied(path: Path) -> str:
        name = f"{path.parent.parent.name}_{path.name}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
        return f"{folder.name}/{name}"

    content = _content(found, list(names) or figures.EVERY, beside, copied)
    return _rendered("page.md.j2", content)


def _rendered(template: str, content: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = as_markdown
    return environment.get_template(template).render(content)


def as_markdown(text: Any) -> str:
    """Return text as Markdown that shows it as it is, on one line."""
    line = re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", " ".join(str(text).split()))
    return re.sub(r"^(\d*)([-+=.)])(?=\s|$)", r"\1\\\2", line)  # would begin a list


def _saved(drawn: figures.Drawn, stem: Path) -> Path:
    """Save a figure as a drawing, or as pixels where that would be large."""
    stem = stem.with_name(f"{stem.name}_{drawn.name}")
    if not drawn.is_large:
        (path,) = plots.save(drawn.figure, stem, ["svg"])
        if path.stat().st_size <= LARGE_DRAWING:
            return path
        path.unlink()
    (path,) = plots.save(drawn.figure, stem, ["webp"])
    return path


def _content(
    found: Collection,
    names: Iterable[str],
    source: Callable[[str, figures.Drawn], str],
    file_source: Callable[[Path], str],
) -> dict[str, Any]:
    """Return what a template fills in."""
    problems = dict(found.problems)
    for entry in found.entries:
        if entry.failure is not None:
            problems[title(entry)] = entry.failure

    def pictures(seen: View) -> list[Picture]:
        def on_problem(name: str, error: Exception) -> None:
            reason = f"not drawn: {type(error).__name__}: {error}"
            problems[f"figure {name} of {seen.name}"] = reason

        return [
            Picture(each.name, source(seen.name, each), as_line(each.caption))
            for each in figures.drawn(seen, names, on_problem)
        ]

    sections = []
    for task, entries in by_task(found.entries).items():
        seen = View(task, "", "", entries)
        shown = [results(seen), measures(seen), other_lengths(seen), gaps(seen)]
        sections.append(
            Section(
                task,
                [table for table in shown if table is not None],
                tables.conclusions(seen) if seen.records else [],
                pictures(seen),
                _looks(seen, file_source),
            )
        )
    records = [entry.record for entry in found.entries if entry.record is not None]
    studies: dict[tuple[str, ...], dict[str, Any]] = {}
    for study in found.studies:  # those of one sweep have one command
        about = as_line(study.about) if study.about != "-" else ""
        named = (as_line(study.name), about, as_line(study.command))
        heading = dict(zip(("name", "about", "command"), named, strict=True))
        its = studies.setdefault(named, heading | {"runs": 0, "kernel": []})
        its["runs"] += len(study.entries)
        its["kernel"] += tables.conclusions(replace(study, entries=[], expected={}))
    return {
        "title": as_line(", ".join(dict.fromkeys(study.name for study in found.studies))) or "Runs",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "studies": list(studies.values()),
        "runs": len(found.entries),
        "records": len(records),
        "provenance": provenance(records),
        "expected": expected(found.studies),
        "signatures": [
            f"{study.name}: {said}"
            for study in found.studies
            if (said := statement(expectations(study), study.rows)) is not None
        ],
        "speeds": speeds(found.entries),
        "sections": sections,
        "problems": {as_line(name): as_line(reason) for name, reason in problems.items()},
    }


def _looks(seen: View, source: Callable[[Path], str]) -> list[Shown]:
    """Return what the first seed of each arm shows, at the longest horizon."""
    chosen: dict[str, Entry] = {}
    for entry in seen.entries:
        before = chosen.get(entry.label)
        if before is None or entry.horizon > before.horizon:
            chosen[entry.label] = entry
    shown = []
    for entry in chosen.values():
        for name, by_step in saved_looks(entry.folder).items():
            title = as_line(f"{name}: {entry.label}, T = {entry.horizon}, seed {entry.seed}")
            steps = list(by_step)
            if by_step[steps[-1]].suffix != ".txt":
                shown.append(Shown(title, source(by_step[steps[-1]]), {}))
                continue
            few = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
            texts = {f"step {s}": by_step[s].read_text(encoding="utf-8") for s in few}
            shown.append(Shown(title, "", texts))
    return shown
