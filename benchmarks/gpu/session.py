"""A whole run: which stages, in which order, and what follows from a failure."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import SECONDS, Outcome, Runner, Stage

TOTAL = 530.0
"""Seconds for all stages: nine minutes, less what starting and reporting take."""

SANITIZERS = ("memcheck", "synccheck", "initcheck", "racecheck")

RESIDENCIES = ("one_sm", "cluster", "grid", "streamed")
DTYPES = ("float32", "bfloat16", "float16", "float64")

STAGES = {
    "info": "card, driver, versions, commit",
    "build": "extension, stand-alone checker, floor",
    "check": "the stand-alone checker: every kernel against float64",
    "tests": "pytest of the tests marked gpu, on the kernels or not at all",
    "bench": "against torch.nn.RNN on cuDNN, and FlashRNN if installed",
    "floor": "an empty kernel with the same exchange; the card's rates",
    **{tool: f"compute-sanitizer --tool {tool} on the checker" for tool in SANITIZERS},
    "profile": "one training step under ncu, nsys or torch's profiler",
}
"""In the order in which they run."""

_LIMITS = {  # seconds
    "info": 30.0,
    "build": 120.0,
    "check": 45.0,
    "tests": 70.0,
    "bench": 135.0,
    "floor": 25.0,
    "memcheck": 45.0,
    "synccheck": 30.0,
    "initcheck": 30.0,
    "racecheck": 40.0,
    "profile": 40.0,
}

_NOT_REQUIRED = {
    "floor",
    "racecheck",  # it reports hazards in mbarrier code that are none: leads, not verdicts
    "profile",
}


@dataclass
class Session:
    """One run of some stages."""

    runner: Runner
    work: Path
    """Folder for what stages leave each other."""

    device: str = "cuda"
    commit: str | None = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run(self, names: Iterable[str]) -> None:
        """Run the named stages in order; stop where the rest has no sense."""
        names = list(names)
        whole = names == list(STAGES)
        for name in names:
            outcome = self.outcomes[name] = self.runner.run(self.stage(name))
            if outcome.status != "failed" or not whole:
                continue
            if name in ("info", "build"):
                # Nothing runs without a card; without kernels there is nothing to measure.
                self._skip(names[names.index(name) + 1 :], f"{name} failed")
                return
            if name == "check":
                self.explain()
                self._skip(names[names.index(name) + 1 :], "the checker failed")
                return

    def explain(self) -> None:
        """Spend the time that is left on saying which kernels are wrong, and in what way.

        First each residency by itself, then the data types of those that fail, then the sanitizers
        on one that fails.
        """
        bad = [name for name in RESIDENCIES if self._fails("check", name)]
        places: list[tuple[str, ...]] = []
        for residency in bad:
            dtypes = [d for d in dtypes_of(residency) if self._fails("check", residency, d)]
            places += [(residency, dtype) for dtype in dtypes] or [(residency,)]
        # A failure that needs all of them in one process: look there.
        for place in places[:2] or [()]:
            for tool in SANITIZERS:
                self._fails(tool, *place)

    def _fails(self, *words: str) -> bool:
        name = ":".join(words)
        stage = self.stage(name)
        outcome = self.runner.run(
            Stage(name, stage.command, min(stage.limit, 30.0), False, stage.environment)
        )
        return outcome.status == "failed" and outcome.seconds > 0

    def _skip(self, names: Sequence[str], why: str) -> None:
        for name in names:
            self.outcomes[name] = self.runner.skip(self.stage(name), why)

    def stage(self, name: str) -> Stage:
        """Return a stage by name; ``check:grid:float32`` is a part of ``check``."""
        kind = name.partition(":")[0]
        command = [sys.executable, "-m", "benchmarks.gpu.run_stage", name]
        command += ["--work", str(self.work), "--device", self.device, "--seconds", SECONDS]
        if self.commit is not None:
            command += ["--commit", self.commit]
        # No fallback may pass for a kernel. The stand-in has none to fall back from.
        environment = {} if self.device == "cpu" else {"RNN_CUDA_BACKEND": "native"}
        return Stage(name, tuple(command), _LIMITS[kind], kind not in _NOT_REQUIRED, environment)

    def results(self) -> dict[str, Any]:
        """Return everything that the stages found, as JSON-ready values."""
        timings = _read_lines(self.work / "timings.jsonl")
        return {
            "machine": _read(self.work / "info.json"),
            "stages": [outcome.as_json() for outcome in self.runner.outcomes],
            "seconds": round(self.runner.elapsed, 1),
            "passed": self.runner.passed,
            "unmeasured": _read(self.work / "unmeasured.json") or [],
            "floor": _read(self.work / "floor.json"),
            "timings": timings,
        }


def dtypes_of(residency: str) -> tuple[str, ...]:
    """Return the data types that a residency has kernels for."""
    return DTYPES if residency == "streamed" else tuple(d for d in DTYPES if d != "float64")


def clear(work: Path) -> None:
    """Remove what an earlier run left of results; what it compiled stays."""
    for name in ("info.json", "timings.jsonl", "unmeasured.json", "floor.json", "profile.txt"):
        (work / name).unlink(missing_ok=True)


def _read(path: Path) -> Any:
    return _parsed(path, json.loads)


def _read_lines(path: Path) -> list[Any]:
    return _parsed(path, lambda text: [json.loads(line) for line in text.splitlines()]) or []


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    return parse(path.read_text(encoding="utf-8")) if path.is_file() else None
