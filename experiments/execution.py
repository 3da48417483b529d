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
from typing import Any, Literal

from experiments import distributed
from experiments.checkpoint import CheckpointError
from experiments.config import RunConfig
from experiments.interrupts import SIGNALS, held_back
from experiments.provenance import provenance
from experiments.record import RECORD, Record, RecordError, Rows, RunTakenError, owned
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
        on_outcome: called once for each run that was not done before.
    """
    runs = {
        member.run.identity: member
        for member in sorted(study.runs, key=lambda member: -member.run.horizon)
    }
    # Under torchrun the processes make every run together, so one of them says which are left.
    left = distributed.from_main(
        lambda: [
            identity
            for identity, member in runs.items()
            if not _has_ended(member, study.execution.retry, on_outcome)
        ]
    )
    jobs = {identity: job_of(runs[identity], study.execution) for identity in left}
    if not jobs:
        return
    launch: Launcher = _in_processes
    if study.execution.launcher != "processes":
        # Only here: submitit is not installed everywhere.
        from experiments.slurm import in_jobs as launch

    def progress(identity: str, step: int, loss: float) -> None:
        on_progress(runs[identity], step, loss)

    for identity, outcome in launch(study, jobs, is_asked_to_end, progress):
        on_outcome(runs[identity], outcome)


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
    """Return the number of processes: as configured, else one per core; one for a GPU.

    Under torchrun one: the processes that it started make a run together.
    """
    if distributed.count() > 1:
        return 1
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
    on_rows: Callable[[Rows], None] | None = None,
) -> Outcome:
    """Make one run in this process, and say what became of it.

    `on_rows` is called with all rows of its log, those of earlier processes first.
    """
    run = None
    try:
        run = RunConfig.parse({**job.values, "model": {**job.values["model"], "name": job.label}})
        with ExitStack() as stack:
            followers = [] if on_rows is None else [on_rows]
            if job.tensorboard:
                followers.append(stack.enter_context(EventWriter(job.folder)))

            def follow(rows: Rows) -> None:
                for follower in followers:
                    follower(rows)

            train(
                run,
                job.folder,
                on_progress,
                is_asked_to_end,
                job.checkpoint_seconds,
                # Whoever follows a log has all of it read again when the run goes on.
                follow if followers else None,
            )
    except RunTakenError as error:
        return Outcome("elsewhere", str(error))
    except Interrupted:
        return Outcome("interrupted", "asked to end; the same command goes on from here")
    except Exception as error:
        if distributed.count() > 1:
            # The others wait for this process; torchrun ends all of them when it ends.
            raise
        return _failed(error, run, job)
    return Outcome("done")


def _failed(error: Exception, run: RunConfig | None, job: Job) -> Outcome:
    """Return the outcome of a run that an error ended; record it if the run's values brought it.

    What the machine brought about, such as a full disk, leaves no record: the next command tries
    again.
    """
    reason = f"{type(error).__name__}: {error}"
    if run is not None and not isinstance(error, OSError | RecordError | CheckpointError):
        origin = {**provenance(run.device), "traceback": traceback.format_exc()}
        record = Record(run.identity, run.label, "failed", reason, run.plain(), provenance=origin)
        # Without it the next command tries again; the reason is said all the same.
        with suppress(OSError, RunTakenError), owned(job.folder):
            record.save(job.folder)
    return Outcome("failed", reason)


def _has_ended(
    member: Member, is_retried: bool, on_outcome: Callable[[Member, Outcome], None]
) -> bool:
    try:
        record = member.record()
        if record is not None and record.status == "failed" and is_retried:
            _forget_failure(member)
            return False
    except (OSError, RecordError) as error:
        on_outcome(member, Outcome("failed", str(error)))
        return True
    if record is not None and record.status == "failed":
        on_outcome(member, Outcome("failed", f"{record.reason} (retry=true makes it again)"))
    return record is not None


def _forget_failure(member: Member) -> None:
    """Delete the record of a run that failed; not what another process has made of it since."""
    with suppress(RunTakenError), owned(member.folder):
        record = member.record()
        if record is not None and record.status == "failed":
            (member.folder / RECORD).unlink()


class _Pool:
    """Processes that make jobs; when one of them dies, it is found out whose job that was.

    What the processes tell one another goes through memory without locks, which a process that is
    killed cannot leave locked.
    """

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
        self._indices = {name: index for index, name in enumerate(jobs)}
        # By index: -1 until the job has begun, then the steps done; the last loss.
        self._steps = self._context.RawArray("q", [-1] * len(jobs))
        self._losses = self._context.RawArray("d", len(jobs))
        self._shown = dict.fromkeys(jobs, 0)
        self._is_ending = False

    def run(self, workers: int) -> Iterator[tuple[str, Outcome]]:
        """Yield what became of each job, as they end."""
        todo = list(self._jobs)
        while todo and not self._is_ending:
            lost = yield from self._some(todo, workers)
            # A process died, and with it the pool. One of the jobs that had begun was the cause:
            # each is tried again by itself.
            begun = [name for name in lost if self._steps[self._indices[name]] >= 0]
            suspects = begun or lost
            todo = [name for name in lost if name not in suspects]
            for name in suspects:
                if self._is_ending:
                    return
                if (yield from self._some([name], 1)) and not self._is_ending:
                    yield name, Outcome("failed", "its process died (killed, or out of memory)")

    def _some(
        self, names: Sequence[str], workers: int
    ) -> Generator[tuple[str, Outcome], None, list[str]]:
        """Make jobs; yield the outcomes that there are, return the names of the other jobs."""
        lost = []
        is_stopping = self._context.RawValue("b", 0)
        shared = (is_stopping, self._steps, self._losses)
        with ProcessPoolExecutor(workers, self._context, _begin, shared) as pool:
            with held_back():
                names_by_future = {
                    pool.submit(_make_job, self._indices[name], self._jobs[name]): name
                    for name in names
                }
            left = set(names_by_future)
            while left:
                ended, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
                self._report_progress()
                if self._is_asked_to_end() and not self._is_ending:
                    self._is_ending = True
                    is_stopping.value = 1
                    left -= {future for future in left if future.cancel()}
                for future in ended:
                    name = names_by_future[future]
                    try:
                        yield name, future.result()
                    except BrokenProcessPool:
                        is_stopping.value = 1
                        lost.append(name)
        return lost

    def _report_progress(self) -> None:
        for name, index in self._indices.items():
            step = self._steps[index]
            if step > self._shown[name]:
                self._shown[name] = step
                self._on_progress(name, step, self._losses[index])


_is_stopping: Any = None
_steps: Any = None
_losses: Any = None
_is_working = _is_terminated = False


def _begin(is_stopping: Any, steps: Any, losses: Any) -> None:
    """Prepare a process of the pool."""
    global _is_stopping, _steps, _losses
    _is_stopping, _steps, _losses = is_stopping, steps, losses
    # The parent hears the signals, and decides what becomes of the runs. But SIGTERM is also how a
    # pool that has lost a process ends the others.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _on_sigterm)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _on_sigterm(*_: object) -> None:
    global _is_terminated
    if not _is_working:
        os._exit(1)
    _is_terminated = True


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_job(index: int, job: Job) -> Outcome:
    global _is_working

    def on_progress(step: int, loss: float) -> None:
        _losses[index] = loss
        _steps[index] = step

    if _is_stopping.value:
        return Outcome("interrupted", "asked to end before it began")
    _is_working = True
    _steps[index] = 0
    outcome = make(job, on_progress, lambda: _is_terminated or bool(_is_stopping.value))
    _is_working = False
    if _is_terminated:
        os._exit(1)
    return outcome
