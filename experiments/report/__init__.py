"""Makes one page, and a CSV, from any set of records: ``python -m experiments.report FOLDER``.

A folder is that of a study, of a sweep, of one run, or one with any of these below it. The page is
``report.html`` in the first folder unless told otherwise; it holds everything in itself, so it can
be sent, and opened without a network. Called ``NAME.md`` it is Markdown, with the figures that the
studies name in the folder ``NAME``. The CSV beside it has a line per run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.files import write_csv, write_text
from experiments.report.page import html, markdown
from experiments.report.reading import ReportError, gather
from experiments.report.runs import csv_rows

__all__ = ["ReportError", "write"]


def write(folders: Sequence[Path], output: Path | None = None) -> tuple[Path, Path]:
    """Write page and CSV; return where they are.

    Args:
        folders: with what the page is about.
        output: the page; ``report.html`` in the first folder by default.

    Raises:
        ReportError: there is nothing to report on.
        OSError: a file cannot be written.
    """
    output = folders[0] / "report.html" if output is None else output
    beside = output.with_suffix(".csv")
    if output == beside or not output.name:
        raise ReportError(f"the page must not be called {output}, as the CSV beside it is")
    found = gather(folders)
    is_markdown = output.suffix == ".md"
    write_text(output, markdown(found, output.with_suffix("")) if is_markdown else html(found))
    write_csv(beside, *csv_rows(found.entries))
    return output, beside
