"""The processes that measure: held to their cores, watched, and replaced when they are lost.

    python -m benchmarks.workers FD THREADS DEVICE [FOLDER]

is one: a request comes through the socket FD, and its answer goes back. A request is a function's
name and arguments. With FOLDER, ``rnn_cuda`` is that folder's; ``benchmarks`` is this checkout's.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.machine import REPOSITORY, thread_environment, usable_cores

PATIENCE = 40.0
"""Seconds that a case may take on a GPU, where a kernel that waits forever hangs its process."""

START_PATIENCE = 300.0
"""Seconds that a process may take to import everything."""

MOST_LOST = 4
"""After so many processes that crashed or hung, the cases that are left are not tried."""

SHORTEST, LONGEST = 0.06, 0.5
"""Seconds for the rounds of a case where there is a limit; there are five rounds, however long."""


class WorkerError(RuntimeError):
    """A worker was lost; the message says how."""


class Worker:
    """A process that does what it is asked."""

    def __init__(self, threads: int, device: str = "cpu", folder: Path | None = None) -> None:
        here, there = socket.socketpair()
        command = [sys.executable, "-m", "benchmarks.workers", str(there.fileno()), str(threads)]
        environment = thread_environment(threads) if device == "cpu" else {}
        if folder is not None:  # a version is timed on its kernels, never on the reference
            environment |= {"RNN_CUDA_BACKEND": os.environ.get("RNN_CUDA_BACKEND", "native")}
        with there:
            self._process = subprocess.Popen(
                [*command, device, *([] if folder is None else [str(folder)])],
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output is for results
                env={**os.environ, **environment},
                cwd=REPOSITORY,
                pass_fds=[there.fileno()],
            )
        self._pipe = Connection(here.detach())
        try:
            self._answer(START_PATIENCE)
        except WorkerError:
            self.close()
            raise

    def ask(self, request: str, *arguments: Any, patience: float | None = None) -> Any:
        """Return what a function such as ``quality.errors_of`` returns in that process.

        Raises:
            WorkerError: there is none, and this worker is of no more use.
        """
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send_bytes(pickle.dumps((request, arguments)))
        return self._answer(patience)

    def _answer(self, patience: float | None) -> Any:
        if not self._pipe.poll(patience):
            raise WorkerError(f"hung: killed after {patience:.0f} s")
        try:
            kind, answer = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, ConnectionError):
            status = self._process.wait()
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise WorkerError(f"the measuring process ended with {how}") from None
        if kind == "error":
            raise WorkerError(f"the measuring process failed: {answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()


def ask_once(threads: int, device: str, request: str, *arguments: Any) -> Any:
    """Return the answer of a worker that does nothing else."""
    with contextlib.closing(Worker(threads, device)) as worker:
        return worker.ask(request, *arguments)


def measure_all(
    cases: Sequence[Case],
    names: Sequence[str],
    seconds: float,
    device: str,
    start: Callable[[], Worker],
    *,
    end: float | None = None,
    patience: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the result of each case in turn, until the time is over.

    A case that its process does not survive, because native code crashes or memory runs
    out, is yielded as ``{"case": ..., "failed": how}``; a new process does the rest.

    Args:
        cases: what to measure, the most important first.
        names: who takes part.
        seconds: for the rounds of each case; with ``end`` the most for one, and what is left is
            shared out each time.
        device: "cpu" or "cuda".
        start: starts a worker for it.
        end: when the time is over, by `time.monotonic`. A case is not begun where the longest one
            before it would be cut off, and not yielded if it is.
        patience: seconds that one case may take.

    Raises:
        WorkerError: a worker could not even start.
    """
    worker, lost, longest = None, 0, 0.0
    try:
        for index, case in enumerate(cases):
            begin = time.monotonic()
            left = float("inf") if end is None else end - begin
            if left < longest or left <= 0 or lost >= MOST_LOST:
                return
            share = seconds if end is None else share_of(left, len(cases) - index)
            allowed = None if patience is None else min(patience, left)
            worker = worker or start()
            try:
                yield worker.ask("measure.measure", case, names, share, device, patience=allowed)
            except WorkerError as error:
                if allowed is not None and allowed < (patience or 0) and "hung" in str(error):
                    return  # not the case's fault: the time is over
                worker.close()
                worker, lost = None, lost + 1
                yield {"case": case.as_json(), "failed": str(error)}
            longest = max(longest, time.monotonic() - begin)
    finally:
        if worker is not None:
            worker.close()


def share_of(left: float, cases: int) -> float:
    """Return the seconds for the rounds of a case, where ``left`` seconds are for so many.

    Early ones get more than their share, up to `LONGEST`: they matter more.
    """
    return min(LONGEST, max(SHORTEST, left / (2 * cases)))


# ---- the other side ------------------------------------------------------------------------------


def main() -> None:
    """Answer requests until there are no more."""
    descriptor, threads, device, *folder = sys.argv[1:]
    pipe = Connection(int(descriptor))
    if device == "cpu":
        os.sched_setaffinity(0, usable_cores()[: int(threads)])
    sys.path[:0] = folder  # too late for `benchmarks`, which it has as well

    def answer(kind: str, value: Any) -> None:
        pipe.send_bytes(pickle.dumps((kind, value)))

    try:
        import torch

        import rnn_cuda

        if folder and Path(folder[0]).resolve() not in Path(rnn_cuda.__file__).resolve().parents:
            raise RuntimeError(f"there is no rnn_cuda in {folder[0]}")
        if device == "cpu":
            torch.set_num_threads(int(threads))
            torch.set_num_interop_threads(1)
        answer("answer", None)
        while True:
            request, arguments = pickle.loads(pipe.recv_bytes())
            module, _, function = request.partition(".")
            function = getattr(importlib.import_module(f"benchmarks.{module}"), function)
            answer("answer", function(*arguments))
    except EOFError:
        pass
    except Exception as error:
        answer("error", f"{type(error).__name__}: {str(error)[:200]}")
        raise


if __name__ == "__main__":
    main()
