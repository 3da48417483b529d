"""Makes the runs of a study as jobs of SLURM, through submitit: one job array, a run a job.

    python -m experiments.run launcher=slurm slurm.partition=cpu slurm.timeout_min=240
    python -m experiments.run launcher=submitit_local workers=2   # the same jobs, without SLURM

A job that SLURM preempts or that runs out of time gets submitit's signal, SIGUSR2. The run is then
saved at its next step, and submitit requeues the job, which goes on from the checkpoint. At SIGTERM
alone (SLURM sends it before it kills) the run is saved and goes on as long as it is let. What
submitit keeps of the jobs, with their output, is in ``runs/jobs``.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import submitit

from experiments import interrupts
from experiments.execution import Job, Outcome, Progress, make, worker_count
from experiments.fields import ConfigError
from experiments.record import METRICS
from experiments.study import Study

_REQUEUE = submitit.JobEnvironment._usr_sig()
_SIGNALS = (*interrupts.SIGNALS, _REQUEUE)
_POLL_SECONDS = 1.0
_SECONDS_TO_END = 30.0
"""How long jobs that were cancelled are waited for."""
_TAIL = 4096
"""Bytes at the end of a log in which its last step is looked for."""


@dataclass(frozen=True)
class ResumableJob:
    """What a job of submitit calls; pickled with it, before it begins and when it is requeued."""

    job: Job

    def __call__(self) -> Outcome:
        """Make the run; if the job is to be requeued, this does not return."""
        came: set[int] = set()
        requeue: Any = signal.getsignal(_REQUEUE)  # submitit's; it would end a step half done
        for number in _SIGNALS:
            signal.signal(number, lambda number, frame: came.add(number))
        while True:
            outcome = make(self.job, lambda step, loss: None, lambda: bool(came))
            if outcome.state != "interrupted" or signal.SIGINT in came:
                return outcome
            if _REQUEUE in came:
                requeue(_REQUEUE, None)
            came.clear()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return what submitit calls when the job has been requeued: the same."""
        return submitit.helpers.DelayedSubmission(self)


def in_jobs(
    study: Study,
    jobs: Mapping[str, Job],
    is_asked_to_end: Callable[[], bool],
    on_progress: Progress,
) -> Iterator[tuple[str, Outcome]]:
    """Make jobs as jobs of submitit; a launcher of `experiments.execution`.

    Asked to end, it cancels those that have not ended. If this process is killed they go on.
    """
    executor = _executor(study)
    # SLURM holds back by itself what is beyond array_parallelism; the local executor does not.
    is_slurm = study.execution.launcher == "slurm"
    limit = len(jobs) if is_slurm else _parallel(study, len(jobs))
    todo = list(jobs)
    left: dict[str, submitit.Job[Outcome]] = {}
    while (todo or left) and not is_asked_to_end():
        now = [todo.pop(0) for _ in range(min(limit - len(left), len(todo)))]
        if now:
            submitted = executor.submit_array([ResumableJob(jobs[identity]) for identity in now])
            left |= zip(now, submitted, strict=True)
        time.sleep(_POLL_SECONDS)
        for identity in [identity for identity, job in left.items() if job.done()]:
            yield identity, _outcome(left.pop(identity))
        for identity, job in left.items():
            if job.state == "RUNNING":
                on_progress(identity, *_last_step(jobs[identity].folder))
    yield from _cancel(left)


def _cancel(left: dict[str, submitit.Job[Outcome]]) -> Iterator[tuple[str, Outcome]]:
    """End jobs; yield what became of each."""
    for job in left.values():
        job.cancel(check=False)
    deadline = time.monotonic() + _SECONDS_TO_END
    while not all(job.done(force_check=True) for job in left.values()):
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    for identity, job in left.items():
        if job.paths.result_pickle.exists():
            yield identity, _outcome(job)
        else:
            yield identity, Outcome("interrupted", "cancelled; the same command goes on from here")


def _executor(study: Study) -> submitit.SlurmExecutor | submitit.LocalExecutor:
    """Return an executor that asks for what the study's configuration says.

    Raises:
        ConfigError: there is no SLURM here, or an option that submitit does not know.
    """
    config = study.slurm
    folder = study.root / "runs" / "jobs" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}"
    options = {"signal_delay_s": config.signal_delay_s, "gpus_per_node": config.gpus_per_node}
    executor: submitit.SlurmExecutor | submitit.LocalExecutor
    try:
        if study.execution.launcher == "slurm":
            executor = submitit.SlurmExecutor(folder, config.max_num_timeout)
            options |= {
                "job_name": "rnn_cuda",
                "partition": config.partition,
                "time": config.timeout_min,
                "mem": None if config.mem_gb is None else f"{round(config.mem_gb * 1024)}M",
                "cpus_per_task": config.cpus_per_task,
                "array_parallelism": _parallel(study, 256),
                **config.extra,
            }
        else:
            executor = submitit.LocalExecutor(folder, config.max_num_timeout)
            options["timeout_min"] = config.timeout_min
        executor.update_parameters(**{k: v for k, v in options.items() if v is not None})
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"launcher={study.execution.launcher}: {reason}") from error
    return executor


def _parallel(study: Study, jobs: int) -> int:
    if study.slurm.array_parallelism is not None:
        return study.slurm.array_parallelism
    if study.execution.launcher == "slurm":
        return study.execution.workers or jobs
    return worker_count(study, jobs)


def _outcome(job: submitit.Job[Outcome]) -> Outcome:
    """Return what became of a job that has ended: of its run, or of the job itself."""
    error = job.exception()
    if error is None:
        return job.result()
    # A run that fails says so itself. Here its process died, or was not requeued any more: there is
    # no record, and the next command tries again.
    reason = f"ended without a result (state {job.state})"
    if isinstance(error, submitit.core.utils.FailedJobError):
        # The last line of its traceback stands before a line of dashes.
        reason = [line for line in str(error).split("\n----")[1].splitlines() if line][-1]
    return Outcome("failed", f"job {job.job_id}: {reason}; its output: {job.paths.stderr}")


def _last_step(folder: Path) -> tuple[int, float]:
    """Return the last step in a run's log, and its loss."""
    with suppress(OSError), (folder / METRICS).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        for line in reversed(file.read().splitlines()):
            with suppress(ValueError):  # a line cut in two
                row = json.loads(line)
                if row.get("loss") is not None:
                    return row["step"], row["loss"]
    return 0, math.nan
