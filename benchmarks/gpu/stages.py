"""Stages: child processes, each with a time limit of its own inside the limit of the whole run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

SKIPPED = 77
"""Exit status of a stage that cannot run here; its last line says why."""

GRACE = 3.0
"""Seconds between asking a stage to end and ending it."""

SECONDS = "{seconds}"
"""In a command: the limit that it is run under."""

SHORTEST = 8.0
"""Seconds without which no stage is started."""

LONGEST_LOG = 4 << 20
"""Bytes of one stage's output that are kept: the last ones."""

_TAIL = 15  # lines of a failed stage's output shown at once

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Stage:
    """A command and what becomes of the run if it fails."""

    name: str
    command: tuple[str, ...]
    limit: float
    """Seconds; less where less is left."""

    required: bool = True
    """Whether the run fails with it."""

    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    name: str
    status: Status
    seconds: float
    note: str
    """Its last line, or why it was skipped or ended."""

    required: bool = True

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "seconds": round(self.seconds, 1)}


class Runner:
    """Runs stages one after the other until the time is over."""

    def __init__(
        self,
        seconds: float,
        log: Path,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._begin = clock()
        self._end = self._begin + seconds
        self._log = log
        self._say = say
        self.outcomes: list[Outcome] = []

    @property
    def left(self) -> float:
        """Seconds until the end of the run."""
        return self._end - self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._begin

    @property
    def passed(self) -> bool:
        """Whether no stage failed that must not; one that could not run is no failure."""
        return not any(o.required and o.status == "failed" for o in self.outcomes)

    def run(self, stage: Stage) -> Outcome:
        """Run a stage within what time is left, and say how it went."""
        limit = min(stage.limit, self.left)
        if limit < min(SHORTEST, stage.limit):
            # A required stage that was not reached leaves open what it was to show.
            status: Status = "failed" if stage.required else "skipped"
            outcome = Outcome(stage.name, status, 0.0, "no time left", stage.required)
        else:
            outcome = self._run(stage, limit)
        self.outcomes.append(outcome)
        self._say(line_of(outcome))
        return outcome

    def skip(self, stage: Stage, why: str) -> Outcome:
        """Note that a stage is not run, and why."""
        outcome = Outcome(stage.name, "skipped", 0.0, why, stage.required)
        self.outcomes.append(outcome)
        self._say(line_of(outcome))
        return outcome

    def _run(self, stage: Stage, limit: float) -> Outcome:
        self._say(f"{stage.name} (at most {limit:.0f} s) ...")
        begin = self._clock()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment}
        command = tuple(word.replace(SECONDS, f"{limit:.0f}") for word in stage.command)
        output = self._log.with_name(f".{self._log.name}.stage")
        try:
            with output.open("wb") as stream:
                status, ended = _watch(command, environment, stream, limit)
            text = _tail_of(output)
        finally:
            output.unlink(missing_ok=True)
        seconds = self._clock() - begin
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"=== {stage.name}: {status}, {seconds:.0f} s\n{text}\n")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        note = lines[-1][:200] if lines else "said nothing"
        if ended:
            note = f"ended after {limit:.0f} s; last line: {note}"
        if status == SKIPPED and not ended:
            return Outcome(stage.name, "skipped", seconds, note, stage.required)
        if status == 0 and not ended:
            return Outcome(stage.name, "passed", seconds, note, stage.required)
        if not ended:
            note = f"{_how(status)}; last line: {note}"
        self._say("\n".join(f"    {line}" for line in lines[-_TAIL:]))
        return Outcome(stage.name, "failed", seconds, note, stage.required)


def line_of(outcome: Outcome) -> str:
    """Return a line for the terminal."""
    mark = "" if outcome.required or outcome.status != "failed" else " (a lead, no verdict)"
    return f"{outcome.name:12} {outcome.status:8} {outcome.seconds:4.0f} s  {outcome.note}{mark}"


def _watch(
    command: tuple[str, ...], environment: dict[str, str], stream: Any, limit: float
) -> tuple[int, bool]:
    """Return the exit status, and whether the time was over; no child of its own survives."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    ended = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        ended = True
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        # What it started may outlive it, and hold the device.
        _signal(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, ended


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _tail_of(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(max(0, size - LONGEST_LOG))
        return stream.read().decode(errors="replace")


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"
