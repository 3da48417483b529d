"""Stages: child processes, each with a time limit of its own inside the limit of the whole run."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GRACE = 3.0
"""Seconds between asking a stage to end and ending it."""

SECONDS = "{seconds}"
"""In a command: the limit that it is run under."""

SHORTEST = 8.0
"""Seconds without which no stage is started."""

LONGEST_LOG = 4 << 20
"""Bytes of one command's output that are kept: the last ones."""

_TAIL = 15  # lines of a failed stage's output shown at once


@dataclass(frozen=True)
class Stage:
    """A command, and what follows from how it ends."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    """Tried in turn until one passes. None: the stage is skipped."""

    limit: float
    """Seconds for all of them; less where less is left."""

    required: bool = True
    """Whether the run fails with it."""

    needs: tuple[str, ...] = ()
    """Stages that must have passed, if they are part of the run."""

    must_print: str = ""
    """A pattern without which the output is that of a failure; `must_not_print`: with which."""

    must_not_print: str = ""

    cannot_run: str = ""
    """A pattern in the output of a tool that does not work on this machine: it is skipped."""

    environment: Mapping[str, str] = field(default_factory=dict)
    why_not: str = ""
    """Why there is no command."""


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: "passed", "failed" or "skipped", and its last line or why."""

    name: str
    status: str
    seconds: float
    note: str
    required: bool = True

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "seconds": round(self.seconds, 1)}


class Runner:
    """Runs stages one after the other until the time is over."""

    def __init__(
        self,
        seconds: float,
        folder: Path,
        log: Callable[[str], None] = print,
    ) -> None:
        self._begin = time.monotonic()
        self._seconds = seconds
        self._folder = folder
        self._log_line = log
        self.outcomes: dict[str, Outcome] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._begin

    @property
    def passed(self) -> bool:
        """Whether no stage failed that must not; one that could not run is no failure."""
        return not any(o.required and o.status == "failed" for o in self.outcomes.values())

    def run(self, stage: Stage) -> Outcome:
        """Run a stage within what time is left; its output goes into ``NAME.txt`` and the log."""
        done = self.outcomes
        blocked = [n for n in stage.needs if n in done and done[n].status != "passed"]
        limit, begin = min(stage.limit, self._seconds - self.elapsed), time.monotonic()
        if not stage.commands:
            status, note = "skipped", stage.why_not
        elif blocked:
            status, note = "skipped", f"{blocked[0]} {done[blocked[0]].status}"
        elif limit < min(SHORTEST, stage.limit):
            # A required stage that was not reached leaves open what it was to show.
            status, note = "failed" if stage.required else "skipped", "no time left"
        else:
            self._log_line(f"{stage.name} (at most {limit:.0f} s) ...")
            status, note = self._try(stage, begin + limit)
        outcome = Outcome(stage.name, status, time.monotonic() - begin, note, stage.required)
        done[stage.name] = outcome
        self._log_line(line_of(outcome))
        return outcome

    def _try(self, stage: Stage, end: float) -> tuple[str, str]:
        status, notes = "failed", []
        for command in stage.commands:
            limit = end - time.monotonic()
            if notes and limit < 5:
                break
            # One of several leaves time for the next.
            limit = limit if command == stage.commands[-1] else 0.7 * limit
            status, note, lines = self._run(stage, command, limit)
            notes.append(note)
            if status == "passed":
                return status, "; ".join([notes[-1], *(f"not {n}" for n in notes[:-1])])
            if status == "failed":
                self._log_line("\n".join(f"    {line}" for line in lines[-_TAIL:]))
        return status, "; ".join(notes)

    def _run(self, stage: Stage, command: tuple[str, ...], limit: float) -> tuple[str, str, list]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment}
        command = tuple(word.replace(SECONDS, f"{limit:.0f}") for word in command)
        output = self._folder / f"{stage.name.replace(':', '-')}.txt"
        with output.open("wb") as stream:
            how = _watch(command, environment, stream, limit)
        text = output.read_bytes()[-LONGEST_LOG:].decode(errors="replace")
        with (self._folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"=== {stage.name}: {' '.join(command)}\n{text}\n=== {how or 'done'}\n")
        lines = [line.strip() for line in text.splitlines() if line.strip(" =")]
        # A sanitizer's summary is not its last word.
        summary = [line for line in lines if re.search(r"(ERROR|RACECHECK) SUMMARY", line)] or lines
        note = summary[-1].strip(" =")[:200] if summary else "no output"
        if stage.cannot_run and re.search(stage.cannot_run, text):
            return "skipped", note, lines
        if how is None and stage.must_print and not re.search(stage.must_print, text):
            how = f"nothing like {stage.must_print!r} in its output"
        if stage.must_not_print and (complaint := re.search(f".*({stage.must_not_print}).*", text)):
            how = complaint[0].strip()[:200]
        return (
            ("passed", note, lines)
            if how is None
            else ("failed", f"{how}; last line: {note}", lines)
        )


def line_of(outcome: Outcome) -> str:
    """Return a line for the terminal."""
    mark = "" if outcome.required or outcome.status != "failed" else " (a lead, no verdict)"
    return f"{outcome.name:12} {outcome.status:8} {outcome.seconds:4.0f} s  {outcome.note}{mark}"


def _watch(
    command: tuple[str, ...], environment: dict[str, str], stream: Any, limit: float
) -> str | None:
    """Return how the command ended, None if well; no child of its own survives."""
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": stream, "env": environment}
    try:
        process = subprocess.Popen(
            command, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
    except OSError as error:
        return str(error)
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
    if ended:
        return f"ended after {limit:.0f} s"
    status = process.returncode
    return None if status == 0 else f"signal {-status}" if status < 0 else f"exit status {status}"


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
