"""The processes that measure: held to their cores, watched, and replaced when they are lost.

    python -m benchmarks.workers THREADS DEVICE [FOLDER]

is one: it reads requests from its standard input, a function's name and arguments, and writes
answers. With FOLDER, ``rnn_cuda`` is that folder's; ``benchmarks`` is this checkout's.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.machine import REPOSITORY, thread_environment, usable_cores

MOST_LOST = 4
"""After so many processes that crashed or hung, the cases that are left are not tried."""

SHORTEST = 0.06
"""Seconds at least for the rounds of a case; there are five rounds, however long."""


class WorkerError(RuntimeError):
    """A worker was lost; the message says how."""


class Worker(contextlib.AbstractContextManager["Worker"]):
    """A process that does what it is asked."""

    def __init__(self, threads: int, device: str = "cpu", folder: Path | None = None) -> None:
        words = [str(threads), device, *([] if folder is None else [str(folder)])]
        environment = thread_environment(threads) if device == "cpu" else {}
        if folder is not None:  # a version is timed on its kernels, never on the reference
            environment |= {"RNN_CUDA_BACKEND": os.environ.get("RNN_CUDA_BACKEND", "native")}
        self.process: Any = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workers", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            cwd=REPOSITORY,
        )

    def ask(self, request: str, *arguments: Any, patience: float | None = None) -> Any:
        """Return what a function such as ``quality.errors_of`` returns in that process.

        Raises:
            WorkerError: there is none within so many seconds, and this worker is of no more use.
        """
        with contextlib.suppress(BrokenPipeError):  # it may have said already why it ended
            pickle.dump((request, arguments), self.process.stdin)
            self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], patience)[0]:
            raise WorkerError(f"hung: killed after {patience:.0f} s")
        try:
            error, answer = pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError):
            status = self.process.wait()
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise WorkerError(f"the measuring process ended with {how}") from None
        if error:
            raise WorkerError(f"the measuring process failed: {error}")
        return answer

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):  # a request that was never read
            self.process.communicate()


def ask_once(threads: int, device: str, request: str, *arguments: Any) -> Any:
    """Return the answer of a worker that does nothing else."""
    with Worker(threads, device) as worker:
        return worker.ask(request, *arguments)


def measure_all(
    cases: Sequence[Case],
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
        names: who takes part.
        seconds: for the rounds of each case. Less where there is little time: early cases get more
            than their share of it, because they matter more.
        device: "cpu" or "cuda".
        start: starts a worker for it.
        end: when the time is over, by `time.monotonic`. A case is not begun where the longest one
            before it would be cut off, and not yielded if it is.
        patience: seconds that one case may take.
    """
    lost, longest = 0, 0.0
    with contextlib.ExitStack() as stack:
        worker = None
        for index, case in enumerate(cases):
            begin = time.monotonic()
            left = end - begin
            if left < longest or left <= 0 or lost >= MOST_LOST:
                return
            share = min(seconds, max(SHORTEST, left / (2 * (len(cases) - index))))
            allowed = patience and min(patience, left)
            worker = worker or stack.enter_context(start())
            try:
                yield worker.ask("measure.measure", case, names, share, device, patience=allowed)
            except WorkerError as error:
                if time.monotonic() >= end:
                    return  # not the case's fault: the time is over
                stack.close()
                worker, lost = None, lost + 1
                yield {"case": asdict(case), "failed": str(error)}
            longest = max(longest, time.monotonic() - begin)


def main(threads: str, device: str, *folder: str) -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what else is printed is no answer
    if device == "cpu":
        os.sched_setaffinity(0, usable_cores()[: int(threads)])
    sys.path[:0] = folder  # too late for `benchmarks`, which it has as well

    def answer(*error_and_value: Any) -> None:
        pickle.dump(error_and_value, answers)
        answers.flush()

    try:
        import torch

        import rnn_cuda

        if folder and Path(folder[0]).resolve() not in Path(rnn_cuda.__file__).resolve().parents:
            raise RuntimeError(f"there is no rnn_cuda in {folder[0]}")
        if device == "cpu":
            torch.set_num_threads(int(threads))
            torch.set_num_interop_threads(1)
        while True:
            request, arguments = pickle.load(sys.stdin.buffer)
            module, _, function = request.partition(".")
            function = getattr(importlib.import_module(f"benchmarks.{module}"), function)
            answer(None, function(*arguments))
    except EOFError:
        pass
    except Exception as error:
        answer(f"{type(error).__name__}: {str(error)[:200]}", None)
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
