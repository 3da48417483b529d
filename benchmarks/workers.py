"""Starting the processes that measure, and outliving those that end too early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.machine import REPOSITORY, thread_environment


class WorkerError(RuntimeError):
    """A worker ended before its job was done; the message says how."""


def ask(job: dict[str, Any]) -> dict[str, Any]:
    """Return the one answer to a job that has one.

    Raises:
        WorkerError: the worker ended without an answer.
    """
    for answer in _answers(job):
        return answer
    raise WorkerError("the worker ended without an answer")


def run_cases(job: dict[str, Any], cases: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the result of each case in turn.

    If a worker dies, of a crash in someone's native code or for want of memory, the case that it
    was at is yielded as ``{"case": ..., "failed": how}`` and a new worker does the rest.
    """
    done = 0
    while done < len(cases):
        at = None
        try:
            for answer in _answers({**job, "cases": list(cases[done:])}):
                if "started" in answer:
                    at = answer["started"]
                else:
                    at = None
                    yield {key: value for key, value in answer.items() if key != "index"}
                    done += 1
        except WorkerError as error:
            if at is None:  # not a case's fault
                raise
            yield {"case": cases[done], "threads": job["threads"], "failed": str(error)}
            done += 1


def ending(process: subprocess.Popen[str]) -> str:
    """Say how a process ended, once it has."""
    status = process.wait()
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def _answers(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **thread_environment(job["threads"])},
        cwd=REPOSITORY,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin as pipe:
            json.dump(job, pipe)
        for line in process.stdout:
            yield json.loads(line)
        if process.wait() != 0:
            raise WorkerError(f"the measuring process ended with {ending(process)}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
