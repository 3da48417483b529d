"""Text and tables on disk, whole or not at all."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.record import write_whole

# Half a surrogate pair, which a command line may hold, is no reason to lose a file.
ERRORS = "backslashreplace"


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    write_whole(path, text.encode("utf-8", ERRORS))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())
