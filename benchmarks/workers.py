"""The processes that measure: held to their cores, watched, and replaced when they are lost."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.machine import REPOSITORY, thread_environment, usable_cores

MOST_LOST = 4
"""After so many processes that crashed or hung, the cases that are left are not tried."""


class WorkerError(RuntimeError):
    """A worker was lost; the message says how."""


class Worker(contextlib.AbstractContextManager["Worker"]):
    """A process that does what it is asked.

    With a folder, ``rnn_cuda`` is that folder's; ``benchmarks`` is this checkout's.
    """

    def __init__(self, threads: int, device: str = "cpu", folder: Path | None = None) -> None:
        # Messages are pickled here: connections would share the memory of tensors instead.
        self._connection, its = Pipe()
        words = [its.fileno(), threads, device, *([] if folder is None else [folder])]
        environment = thread_environment(threads) if device == "cpu" else {}
        if folder is not None:  # a version is timed on its kernels, never on the reference
            environment |= {"RNN_CUDA_BACKEND": os.environ.get("RNN_CUDA_BACKEND", "native")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workers", *map(str, words)],
            pass_fds=[its.fileno()],
            env={**os.environ, **environment},
            cwd=REPOSITORY,
        )
        its.close()

    def ask(
        self, function: Callable[..., Any], *arguments: Any, patience: float | None = None
    ) -> Any:
        """Return what a function returns in that process; it must be importable there.

        Raises:
            WorkerError: there is none within so many seconds, and this worker is of no more use.
        """
        try:
            with contextlib.suppress(BrokenPipeError):  # it may have said already why it ended
                self._connection.send_bytes(pickle.dumps((function, arguments)))
            if not self._connection.poll(patience):
                raise WorkerError(f"hung: killed after {patience:.0f} s")
            error, answer = pickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            status = self.process.wait()
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise WorkerError(f"the measuring process ended with {how}") from None
        if error:
            raise WorkerError(f"the measuring process failed: {error}")
        return answer

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._connection.close()


def ask_once(threads: int, device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the answer of a worker that does nothing else."""
    with Worker(threads, device) as worker:
        return worker.ask(function, *arguments)


def measure_all(
    cases: Sequence[Case],
    measure: Callable[..., dict[str, Any]],
    names: Sequence[str],
    seconds: float,
    device: str,
    start: Callable[[], Worker],
    *,
    end: float = float("inf"),
    patience: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the result of each case in turn, until the time is over.

    A case that its process does not survive, because native code crashes or memory runs
    out, is yielded as ``{"case": ..., "failed": how}``; a new process does the rest.

    Args:
        cases: what to measure, the most important first.
        measure: is asked of a worker, as `measure.measure`, with the next three.
        names: who takes part.
        seconds: for the rounds of each case. Less where there is little time: early cases get more
            than their share of it, because they matter more.
        device: "cpu" or "cuda".
        start: starts a worker for it.
        end: when the time is over, by `time.monotonic`; a case that does not end by then is lost.
        patience: seconds that one case may take.
    """
    lost, worker = 0, None
    with contextlib.ExitStack() as stack:
        for index, case in enumerate(cases):
            left = end - time.monotonic()
            if left <= 0 or lost >= MOST_LOST:
                return
            share = min(seconds, left / (2 * (len(cases) - index)))
            allowed = patience and min(patience, left)
            worker = worker or stack.enter_context(start())
            try:
                yield worker.ask(measure, case, names, share, device, patience=allowed)
            except WorkerError as error:
                if time.monotonic() >= end:
                    return  # not the case's fault: the time is over
                stack.close()
                worker, lost = None, lost + 1
                yield {"case": asdict(case), "failed": str(error)}


def main(pipe: str, threads: str, device: str, *folder: str) -> None:
    """Answer requests until there are no more."""
    connection = Connection(int(pipe))
    if device == "cpu":
        os.sched_setaffinity(0, usable_cores()[: int(threads)])
    sys.path[:0] = folder  # too late for `benchmarks`, which it has as well
    try:
        import torch

        import rnn_cuda

        if folder and Path(folder[0]).resolve() not in Path(rnn_cuda.__file__).resolve().parents:
            raise RuntimeError(f"there is no rnn_cuda in {folder[0]}")
        if device == "cpu":
            torch.set_num_threads(int(threads))
            torch.set_num_interop_threads(1)
        while True:
            function, arguments = pickle.loads(connection.recv_bytes())
            connection.send_bytes(pickle.dumps((None, function(*arguments))))
    except EOFError:
        pass
    except Exception as error:
        connection.send_bytes(pickle.dumps((f"{type(error).__name__}: {str(error)[:200]}", None)))
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
