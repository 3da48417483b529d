"""Makes the runs of a study: those that have no record yet, several at a time, whatever happens.

A run that fails is recorded with its reason and stops nothing. Each process works with one thread
(for networks of this size the faster use of the cores), and is spawned: forking a process that has
used OpenMP is not safe.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any, Literal

from experiments.checkpoint import CheckpointError
from experiments.config import RunConfig
from experiments.interrupts import SIGNALS
from experiments.provenance import provenance
from experiments.record import RECORD, Record, RecordError, Rows, RunTakenError
from experiments.study import ExecutionConfig, Member, Study
from experiments.tensorboard import EventWriter
from experiments.train import Interrupted, train

State = Literal["done", "failed", "elsewhere", "interrupted"]


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        state: ``done`` (finished or diverged), ``failed``, ``elsewhere`` (another process works on
            it) or ``interrupted``.
        reason: in words, where it is not done.
    """

    state: State
    reason: str = ""


@dataclass(frozen=True)
class Job:
    """A run as it is sent to another process."""

    values: Mapping[str, Any]
    label: str
    folder: Path
    checkpoint_seconds: float
    tensorboard: bool


def job_of(member: Member, execution: ExecutionConfig) -> Job:
    """Return the job that makes a member of a study."""
    return Job(
        member.run.plain(),
        member.label,
        member.folder,
        execution.checkpoint_seconds,
        execution.tensorboard,
    )


Progress = Callable[[str, int, float], None]
"""Called with the identity of a run, the steps done and the last loss."""

Launcher = Callable[
    [Study, Mapping[str, Job], Callable[[], bool], Progress], Iterator[tuple[str, Outcome]]
]
"""Makes jobs, by the identities of their runs, and yields what became of each that ended.

Of a study it reads how it is executed. It is told whether to save and stop, and whom to tell of
progress.
"""


def execute(
    study: Study,
    is_asked_to_end: Callable[[], bool],
    on_progress: Callable[[Member, int, float], None],
    on_outcome: Callable[[Member, Outcome], None],
) -> None:
    """Make every run of a study that has no record; the longest first.

    Args:
        study: its members and how they are executed.
        is_asked_to_end: whether to save and stop.
        on_progress: called with a member, the steps done and the last loss, now and then.
        on_outcome: called once for each member that was not done before.
    """
    pending: dict[str, Member] = {}
    for member in sorted(study.members, key=lambda member: -member.run.horizon):
        if not _has_ended(member, study.execution.retry, on_outcome):
            pending.setdefault(member.run.identity, member)
    jobs = {identity: job_of(member, study.execution) for identity, member in pending.items()}

    def progress(identity: str, step: int, loss: float) -> None:
        on_progress(pending[identity], step, loss)

    launch = _launcher(study)
    if jobs:
        for identity, outcome in launch(study, jobs, is_asked_to_end, progress):
            on_outcome(pending[identity], outcome)


def _launcher(study: Study) -> Launcher:
    if study.execution.launcher == "processes":
        return _in_processes
    # Only here: submitit is not installed everywhere.
    from experiments.slurm import in_jobs

    return in_jobs


def _in_processes(
    study: Study,
    jobs: Mapping[str, Job],
    is_asked_to_end: Callable[[], bool],
    on_progress: Progress,
) -> Iterator[tuple[str, Outcome]]:
    """Make jobs in this process, or in several others."""
    workers = worker_count(study, len(jobs))
    if workers > 1:
        yield from _Pool(jobs, is_asked_to_end, on_progress).run(workers)
        return
    for identity, job in jobs.items():
        outcome = make(job, partial(on_progress, identity), is_asked_to_end)
        yield identity, outcome
        if outcome.state == "interrupted":
            return


def worker_count(study: Study, jobs: int) -> int:
    """Return the number of processes: as configured, else one per core; one for a GPU."""
    if study.execution.workers is not None:
        return max(1, min(study.execution.workers, jobs))
    if study.reference.run.device != "cpu":
        return 1
    return max(1, min(available_cores(), jobs))


def available_cores() -> int:
    """Return the number of cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make(
    job: Job,
    on_progress: Callable[[int, float], None],
    is_asked_to_end: Callable[[], bool],
    on_rows: Callable[[Rows], None] = lambda rows: None,
) -> Outcome:
    """Make one run in this process, and say what became of it.

    `on_rows` is called with all rows of its log, those of earlier processes first.
    """
    run = RunConfig.parse({**job.values, "model": {**job.values["model"], "name": job.label}})
    try:
        with ExitStack() as stack:
            follow = [on_rows]
            if job.tensorboard:
                follow.append(stack.enter_context(EventWriter(job.folder)))
            train(
                run,
                job.folder,
                on_progress,
                is_asked_to_end,
                job.checkpoint_seconds,
                lambda rows: [each(rows) for each in follow],
            )
    except RunTakenError as error:
        return Outcome("elsewhere", str(error))
    except Interrupted:
        return Outcome("interrupted", "asked to end; the same command goes on from here")
    except (OSError, RecordError, CheckpointError) as error:
        # Nothing that the run's values would bring about again: it has no record, and is tried
        # again by the next command.
        return Outcome("failed", f"{type(error).__name__}: {error}")
    except Exception as error:
        _record_failure(run, job.folder, f"{type(error).__name__}: {error}", traceback.format_exc())
        return Outcome("failed", f"{type(error).__name__}: {error}")
    return Outcome("done")


def _has_ended(
    member: Member, is_retried: bool, on_outcome: Callable[[Member, Outcome], None]
) -> bool:
    try:
        record = member.record()
    except RecordError as error:
        on_outcome(member, Outcome("failed", str(error)))
        return True
    if record is None:
        return False
    if record.status != "failed":
        return True
    if is_retried:
        (member.folder / RECORD).unlink()
        return False
    on_outcome(member, Outcome("failed", f"{record.reason} (retry=true makes it again)"))
    return True


def _record_failure(run: RunConfig, folder: Path, reason: str, details: str = "") -> None:
    origin = {**provenance(run.device), "traceback": details}
    Record(run.identity, run.label, "failed", reason, run.plain(), provenance=origin).save(folder)


class _Pool:
    """Processes that make jobs; when one of them dies, it is found out whose job that was."""

    def __init__(
        self,
        jobs: Mapping[str, Job],
        is_asked_to_end: Callable[[], bool],
        on_progress: Callable[[str, int, float], None],
    ) -> None:
        self._jobs = jobs
        self._is_asked_to_end = is_asked_to_end
        self._on_progress = on_progress
        self._context = multiprocessing.get_context("spawn")
        self._reports = self._context.Queue()
        self._is_ending = self._context.Event()
        self._begun: set[str] = set()

    def run(self, workers: int) -> Iterator[tuple[str, Outcome]]:
        """Yield what became of each job, as they end."""
        todo = list(self._jobs)
        while todo and not self._is_ending.is_set():
            lost = yield from self._some(todo, workers)
            # A process died, and with it the pool. One of the jobs that had begun was the cause:
            # each is tried again by itself.
            todo = [name for name in lost if name not in self._begun]
            for name in lost:
                if name in self._begun and (yield from self._some([name], 1)):
                    yield name, Outcome("failed", "its process died (killed, or out of memory)")

    def _some(
        self, names: Sequence[str], workers: int
    ) -> Generator[tuple[str, Outcome], None, list[str]]:
        """Make jobs; yield the outcomes that there are, return the names of the other jobs."""
        lost = []
        with ProcessPoolExecutor(
            workers, self._context, _begin, (self._reports, self._is_ending)
        ) as pool:
            names_by_future = {pool.submit(_make_job, n, self._jobs[n]): n for n in names}
            left = set(names_by_future)
            while left:
                ended, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
                self._hear()
                if self._is_asked_to_end() and not self._is_ending.is_set():
                    self._is_ending.set()
                    left -= {future for future in left if future.cancel()}
                for future in ended:
                    try:
                        yield names_by_future[future], future.result()
                    except BrokenProcessPool:
                        lost.append(names_by_future[future])
        self._hear()
        return lost

    def _hear(self) -> None:
        with suppress(Empty):
            while True:
                name, step, loss = self._reports.get_nowait()
                self._begun.add(name)
                if step:
                    self._on_progress(name, step, loss)


_reports: Any = None
_is_ending: Any = None


def _begin(reports: Any, is_ending: Any) -> None:
    """Prepare a process of the pool."""
    global _reports, _is_ending
    _reports, _is_ending = reports, is_ending
    # The parent hears the signals, and decides what becomes of the runs.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_job(name: str, job: Job) -> Outcome:
    _reports.put((name, 0, 0.0))
    return make(job, lambda step, loss: _reports.put((name, step, loss)), _is_ending.is_set)
