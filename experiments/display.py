"""What a terminal shows while a study runs: a bar per arm and horizon, and how many are left."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.console import as_line, say
from experiments.execution import Outcome
from experiments.record import RecordError
from experiments.study import Member, Study


class Display:
    """A context manager; on what is no terminal, a line per run that ends.

    Args:
        study: whose runs are shown.
        console: where.
    """

    def __init__(self, study: Study, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._steps: dict[str, int] = {}
        self._running: set[str] = set()
        self._done = self._failed = self._elsewhere = 0
        self._bars = {}
        runs = study.runs
        for member in runs:
            title = as_line(member.title)
            if title not in self._bars:
                self._bars[title] = self._progress.add_task(title, total=0, note="")
            bar = self._progress.tasks[self._bars[title]]
            self._progress.update(bar.id, total=(bar.total or 0) + member.run.training.steps)
        self._total = len(runs)
        steps = sum(member.run.training.steps for member in runs)
        self._all = self._progress.add_task("all", total=steps, note="")
        ended = [member for member in runs if _has_ended(member)]
        for member in ended:
            self._advance(member, member.run.training.steps)
            self._done += 1
        if ended:
            say(console, f"{len(ended)} of {self._total} runs are on record already")
        self._count()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def progress(self, member: Member, step: int, loss: float) -> None:
        """Show how far a run is."""
        self._running.add(member.run.identity)
        self._advance(member, step)
        bar = self._bars[as_line(member.title)]
        if step:
            self._progress.update(bar, note=f"loss {loss:.4f}")
        self._count()

    def outcome(self, member: Member, outcome: Outcome) -> None:
        """Show that a run has ended."""
        self._running.discard(member.run.identity)
        if outcome.state == "done":
            self._done += 1
            # A run that stopped early: its bar is full all the same.
            self._advance(member, member.run.training.steps)
        elif outcome.state == "elsewhere":
            self._elsewhere += 1
        elif outcome.state == "failed":
            self._failed += 1
        self._count()
        if not self._console.is_terminal:
            words = _verdict(member) if outcome.state == "done" else outcome.state
            reason = f": {outcome.reason}" if outcome.reason else ""
            say(self._console, f"  {member.title}, seed {member.run.seed}: {words}{reason}")

    def _advance(self, member: Member, step: int) -> None:
        advance = step - self._steps.get(member.run.identity, 0)
        self._steps[member.run.identity] = step
        self._progress.advance(self._bars[as_line(member.title)], advance)
        self._progress.advance(self._all, advance)

    def _count(self) -> None:
        running = len(self._running)
        left = self._total - self._done - self._failed - self._elsewhere - running
        note = f"done {self._done}, running {running}, left {left}"
        if self._failed:
            note += f", failed {self._failed}"
        if self._elsewhere:
            note += f", elsewhere {self._elsewhere}"
        self._progress.update(self._all, note=note)


def _verdict(member: Member) -> str:
    """Return what a run has shown; a run without an error can still have failed to learn."""
    record = member.record()
    if record is None or record.status == "diverged":
        return "done" if record is None else "diverged"
    result = record.result
    verdict = "not learned" if result.verdict == "failed" else result.verdict
    return f"{verdict}, {result.metric} {result.test_metric:.3g}"


def _has_ended(member: Member) -> bool:
    try:
        record = member.record()
    except RecordError:
        return False
    return record is not None and record.status != "failed"
