"""Makes the page of a report: one HTML file that holds everything, or Markdown for a repository."""

from __future__ import annotations

import base64
import re
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
from experiments.report.arms import by_task
from experiments.report.reading import Collection, title
from experiments.report.result_tables import Table, expected, gaps, other_lengths, results
from experiments.report.summary import provenance, speeds
from experiments.view import View
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


def html(found: Collection) -> str:
    """Return a page that holds its figures, all that the records allow."""
    with tempfile.TemporaryDirectory() as folder:

        def embedded(task: str, drawn: figures.Drawn) -> str:
            path = _saved(drawn, Path(folder) / task)
            kind = {".svg": "svg+xml"}.get(path.suffix, path.suffix[1:])
            return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

        return _rendered("page.html.j2", _content(found, figures.EVERY, embedded))


def markdown(found: Collection, folder: Path) -> str:
    """Return a page, and leave its figures in a folder beside it.

    Args:
        found: what it is about.
        folder: for the figures that the studies name.
    """
    names = dict.fromkeys(name for study in found.studies for name in study.figures)

    def beside(task: str, drawn: figures.Drawn) -> str:
        return f"{folder.name}/{_saved(drawn, folder / task).name}"

    return _rendered("page.md.j2", _content(found, list(names) or figures.EVERY, beside))


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
    found: Collection, names: Iterable[str], source: Callable[[str, figures.Drawn], str]
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
        shown = [results(seen), other_lengths(seen), gaps(seen)]
        sections.append(
            Section(
                task,
                [table for table in shown if table is not None],
                tables.conclusions(seen) if seen.records else [],
                pictures(seen),
            )
        )
    records = [entry.record for entry in found.entries if entry.record is not None]
    studies = [
        {
            "name": as_line(study.name),
            "about": as_line(study.about) if study.about != "-" else "",
            "command": as_line(study.command),
            "runs": len(study.entries),
            "kernel": tables.conclusions(replace(study, entries=[], expected={})),
        }
        for study in found.studies
    ]
    return {
        "title": as_line(", ".join(dict.fromkeys(study.name for study in found.studies))) or "Runs",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "studies": studies,
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
