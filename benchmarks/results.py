"""The file of results: one JSON object, written whole or not at all.

schema, complete        version of this form; false while a run goes on
command, suites, ...    what was asked for
machine, peers, backend where, who, and what FusedRNN ran on
timings                 one entry for each case and number of threads: benchmarks.measure
accuracy, memory        one entry for each case, each point: modules of the same names
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

SCHEMA = 1
FILE = "results.json"


def save(found: dict[str, Any], folder: Path) -> None:
    """Write the results into a folder."""
    write_text(folder / FILE, as_text(found))


def as_text(found: dict[str, Any]) -> str:
    """Return strict JSON, a line for each measurement, so that a change of some can be read."""
    fields = []
    for key, value in _strict(found).items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            lines = [json.dumps(item, allow_nan=False) for item in value]
            text = "[\n" + ",\n".join(lines) + "\n]"
        fields.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def load(path: Path) -> dict[str, Any]:
    """Read results.

    Raises:
        ValueError: the file is not one of results, or of another version.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} holds no results in the form that this version writes")
    return found


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _strict(value: Any) -> Any:
    """Return the value with six digits, and with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
