"""What a run leaves on disk, and how a killed run is told from a finished one.

A run folder holds ``results.json`` only when the run finished: it is the last thing written, in
one rename. Until then there is ``partial_results.json``, with ``"complete": false`` and the runs
done so far.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = "results.json"
PARTIAL = "partial_results.json"


class IncompleteRunError(RuntimeError):
    """A run folder without the results of a finished run."""


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON, whole or not at all; nan and infinities become null."""
    write_text(path, json.dumps(_strict(value), indent=1, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    os.replace(temporary, path)


def load_results(run_dir: Path) -> dict[str, Any]:
    """Read the results of a finished run.

    Raises:
        IncompleteRunError: the folder holds none; the message says what it holds instead.
    """
    path = run_dir / RESULTS
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    if (run_dir / PARTIAL).exists():
        raise IncompleteRunError(
            f"{run_dir} holds {PARTIAL} but no {RESULTS}: the run was ended before it finished"
        )
    raise IncompleteRunError(f"{run_dir} holds no {RESULTS}: not a run folder, or a failed run")
