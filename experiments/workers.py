"""Runs independent jobs on several processes of one thread each.

For networks of this size that is the faster use of the cores: one job cannot keep two of them busy.
Processes are spawned (forking a process that has used OpenMP is not safe). An exception in a worker
is raised in the parent with the worker's traceback; a worker that dies is reported; whatever ends
the parent's wait, Ctrl-C included, ends the workers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

import torch

Report = Callable[[Any], None]
"""How a job tells of its progress: any picklable value."""


class WorkerError(RuntimeError):
    """A job failed, or the process that ran it died."""


def available_cores() -> int:
    """Return the number of cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread for the time of a ``with`` block, as a worker process does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_interrupted = threading.Event()


@contextmanager
def noticed_interrupts() -> Iterator[None]:
    """Let `run_jobs`, and the end of the ``with`` block, notice every Ctrl-C that comes inside it.

    Python drops a KeyboardInterrupt that comes up in a destructor or in a library's callback, and
    the run would go on for hours.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        _interrupted.set()
        signal.default_int_handler(number, frame)

    _interrupted.clear()
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
        _raise_if_interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
        _interrupted.clear()


def _raise_if_interrupted() -> None:
    if _interrupted.is_set():
        raise KeyboardInterrupt


def run_jobs(
    function: Callable[..., Any],
    jobs: Sequence[tuple],
    workers: int,
    on_progress: Callable[[int, Any], None],
    on_result: Callable[[int, Any], None],
) -> None:
    """Call ``function(*job, report)`` for every job, in the order given.

    Args:
        function: importable by name from another process.
        jobs: argument tuples, picklable.
        workers: number of processes; with 1 the jobs run in this one.
        on_progress: called here with a job's index and each value the job reported.
        on_result: called here with a job's index and what the job returned.

    Raises:
        WorkerError: a job raised in another process, or its process died.
        KeyboardInterrupt: Ctrl-C came, since `noticed_interrupts` was entered if it was.
    """
    if workers == 1 or len(jobs) <= 1:
        # One thread here too: the thread count can change the rounding of a sum, and results must
        # not depend on how many workers there were.
        def report(value: Any) -> None:
            _raise_if_interrupted()
            on_progress(index, value)

        with one_thread():
            for index, job in enumerate(jobs):
                on_result(index, function(*job, report))
        return

    context = multiprocessing.get_context("spawn")
    pending = list(enumerate(jobs))[::-1]
    running: dict[Connection, int] = {}
    processes = []
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, function), daemon=True)
            process.start()
            # The worker holds the only other end now: its death is an end of file here.
            theirs.close()
            processes.append(process)
            _send_next(ours, pending, running)
        while running:
            _raise_if_interrupted()
            for connection in wait(list(running), timeout=1):
                _receive(connection, pending, running, on_progress, on_result)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _send_next(connection: Connection, pending: list, running: dict[Connection, int]) -> None:
    """Hand the next job to an idle worker, or let it go if there is none."""
    if pending:
        index, job = pending.pop()
        running[connection] = index
        connection.send(job)
    else:
        connection.close()


def _receive(
    connection: Connection,
    pending: list,
    running: dict[Connection, int],
    on_progress: Callable[[int, Any], None],
    on_result: Callable[[int, Any], None],
) -> None:
    index = running[connection]
    try:
        kind, value = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        raise WorkerError(f"the process running job {index} died without a word") from error
    if kind == "progress":
        on_progress(index, value)
    elif kind == "error":
        raise WorkerError(f"job {index} failed in its process:\n{value}")
    else:
        del running[connection]
        on_result(index, value)
        _send_next(connection, pending, running)


def _serve(connection: Connection, function: Callable[..., Any]) -> None:
    # Ctrl-C reaches the whole process group; the parent decides what becomes of the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        while True:
            job = connection.recv()
            try:
                result = function(*job, lambda value: connection.send(("progress", value)))
            except BrokenPipeError:
                raise
            except Exception:
                connection.send(("error", traceback.format_exc()))
            else:
                connection.send(("result", result))
    except (EOFError, BrokenPipeError):
        # The parent has no more jobs, or is gone: either way nobody listens any more.
        return
