"""What a run leaves on disk, and how a killed run is told from a finished one.

A run folder holds ``results.json`` only when the run finished: it is written in one rename, before
anything is drawn or printed. Until then there is ``partial_results.json``, with
``"complete": false`` and the runs done so far. What an error ended holds ``failure.json``.
"""

from __future__ import annotations

import csv
import json
import math
import os
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = "results.json"
PARTIAL = "partial_results.json"
FAILURE = "failure.json"


# Half a surrogate pair, which a command line may hold, is no reason to lose a file.
ERRORS = "backslashreplace"


class IncompleteRunError(RuntimeError):
    """A run folder without the results of a finished run."""


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8", errors=ERRORS)
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
    with temporary.open("w", newline="", encoding="utf-8", errors=ERRORS) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    os.replace(temporary, path)


def write_failure(run_dir: Path, error: Exception) -> None:
    """Record the exception that ended a run."""
    reason = f"{type(error).__name__}: {error}"
    write_json(
        run_dir / FAILURE,
        {"reason": reason, "traceback": "".join(traceback.format_exception(error))},
    )


def failure(run_dir: Path) -> str | None:
    """Return why a run failed: its error, or that it was ended; ``None`` if it finished well."""
    if (run_dir / FAILURE).exists():
        return json.loads((run_dir / FAILURE).read_text(encoding="utf-8"))["reason"]
    if (run_dir / RESULTS).exists():
        return None
    if (run_dir / PARTIAL).exists():
        return f"it holds {PARTIAL} but no {RESULTS}: the run was ended before it finished"
    return f"it holds no {RESULTS}: not a run folder, or a failed run"


def load_results(run_dir: Path) -> dict[str, Any]:
    """Read the results of a finished run.

    Raises:
        IncompleteRunError: the folder holds none; the message says why.
    """
    path = run_dir / RESULTS
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    raise IncompleteRunError(f"{run_dir}: {failure(run_dir)}")
