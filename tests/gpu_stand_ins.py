"""Stand-ins for what the one call on a GPU meets: programs, timings, results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.gpu.cases import GpuCase
from benchmarks.gpu.stages import Outcome


def python(program: str) -> tuple[str, ...]:
    """Return a command that runs a Python program."""
    return (sys.executable, "-c", program)


def stand_in(folder: Path, name: str, program: str) -> str:
    """Return an executable Python script."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{program}\n")
    path.chmod(0o755)
    return str(path)


def timing_of(case: GpuCase, ratio: float = 5.0, ours: float = 1e-3) -> dict[str, Any]:
    """Return a case's timings, made up: our seconds, and how much longer torch.nn.RNN takes."""

    def entry(seconds: float, over: float) -> dict[str, Any]:
        quartiles = {"q1": 0.9 * over, "median": over, "q3": 1.1 * over}
        return {"seconds": {"q1": seconds, "median": seconds, "q3": seconds}, "ratio": quartiles}

    plan = {"residency": "cluster", "blocks": 8}
    launch = {"torch_rnn": entry(ratio * ours, 1.0), "fused_rnn": entry(ours, ratio)}
    return {
        "case": case.as_json(),
        "tokens": case.case.T * case.case.B,
        "plans": {"forward": plan},
        "eager": launch,
        "graphed": launch,
    }


def found_with(timings: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Return the results of a run."""
    found = {
        "schema": results.SCHEMA,
        "complete": True,
        "passed": True,
        "command": "python -m benchmarks.gpu",
        "machine": {"card": "Fake 9000", "rehearsal": False},
        "stages": [Outcome("bench", "passed", 12.0, "fine").as_json()],
        "seconds": 500.0,
        "timings": timings,
        "unmeasured": [],
        "floor": None,
    }
    return found | changes
