"""Reads pairs of sentences from a table of tab-separated values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class TSVError(ValueError):
    """A file that is not what it should be; the message names file, line and fault."""


def read_tsv(path: Path, columns: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Read two columns of a UTF-8 file; empty lines are skipped.

    Args:
        path: the file.
        columns: the names of the two, in a first line with the names of all; none: the first two
            columns, and there is no such line.

    Raises:
        TSVError: it cannot be read, is not UTF-8 or empty, or a line lacks a column.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TSVError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise TSVError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error
    # Not splitlines(): a sentence may hold a line separator of Unicode's.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    chosen = (0, 1)
    if columns and lines:
        _, header = lines.pop(0)
        names = [name.strip() for name in header.split("\t")]
        for column in columns:
            if column not in names:
                raise TSVError(
                    f"{path}, line 1: no column {column!r}; its columns are {', '.join(names)}"
                )
        chosen = (names.index(columns[0]), names.index(columns[1]))
    pairs = []
    for number, line in lines:
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) <= max(chosen):
            raise TSVError(
                f"{path}, line {number}: expected {max(chosen) + 1} columns or more with a tab "
                f"between them, got {len(cells)}"
            )
        source, target = (cells[column] for column in chosen)
        if not source or not target:
            raise TSVError(
                f"{path}, line {number}: the {'target' if source else 'source'} is empty"
            )
        pairs.append((source, target))
    if not pairs:
        raise TSVError(f"{path}: holds nothing")
    return pairs
