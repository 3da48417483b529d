"""The CSV of a report: a line per run, everything that its record holds as one number or text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from experiments import view
from experiments.report.arms import flat
from experiments.view import Entry


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
            if record.result is not None:
                line |= {
                    f"result.{key}": value for key, value in flat(asdict(record.result)).items()
                }
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
