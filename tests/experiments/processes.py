"""Runs in processes of their own, which can be killed; forked from a server that has torch loaded.

What stands here is imported by name in those processes.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from experiments import checkpoint, distributed
from experiments import train as train_module
from experiments.config import RunConfig
from experiments.record import METRICS, RECORD, MetricsLog

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.experiments.warm"])

BLOCK = 4
"""Steps between two looks at the loss in these tests, for ``CHECK_EVERY``."""

OFTEN = {"checkpoint_seconds": 0.0}
"""A checkpoint after every step."""


def small(**values: Any) -> dict[str, Any]:
    """Return the plain values of a run that takes a few milliseconds."""
    model, training = values.pop("model", {}), values.pop("training", {})
    return {
        "model": {"core": "fused_rnn", "hidden_size": 5, **model},
        "task": {"name": "adding", "test_size": 20},
        "horizon": 6,
        "training": {"steps": 11, "batch_size": 3, **training},
        **values,
        "evaluation": {"probe_size": 2, "train_size": 5, **values.get("evaluation", {})},
    }


def make(values: Mapping[str, Any], root: Path, **options: Any) -> Path:
    """Make a run, or the rest of it, in a folder below ``root``; return the folder."""
    run = RunConfig.parse(values)
    folder = root / run.folder_name
    with blocks_of(BLOCK):
        train_module.train(run, folder, **options)
    return folder


@contextmanager
def blocks_of(steps: int) -> Iterator[None]:
    """Look at the loss every so many steps."""
    before = train_module.CHECK_EVERY
    train_module.CHECK_EVERY = steps
    try:
        yield
    finally:
        train_module.CHECK_EVERY = before


def outcome(folder: Path) -> dict[str, Any]:
    """Return everything that a run left, but wall-clock times and provenance."""
    state = checkpoint.load(folder)
    assert state is not None
    record = json.loads((folder / RECORD).read_bytes())
    del state["seconds"], state["processor_seconds"], record["provenance"]
    return {"state": state, "record": record, "metrics": (folder / METRICS).read_bytes()}


def assert_same(value: Any, other: Any, where: str = "") -> None:
    """Fail unless both are equal to the bit; say where they are not."""
    assert type(value) is type(other), where
    if isinstance(value, dict):
        assert value.keys() == other.keys(), where
        for key in value:
            assert_same(value[key], other[key], f"{where}.{key}")
    elif isinstance(value, list | tuple):
        assert len(value) == len(other), where
        for index, (item, its) in enumerate(zip(value, other, strict=True)):
            assert_same(item, its, f"{where}[{index}]")
    elif isinstance(value, torch.Tensor):
        assert value.dtype == other.dtype, where
        torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True, msg=where)
    else:
        assert value == other or value != value != other, where


class Countdown:
    """Kills this process at the n-th moment at which a file is about to change, or has.

    Moments are: half of a line is in the log; half of a file is written; before and after each
    rename; after each time the disk is waited for.
    """

    def __init__(self, kill_at: int | None) -> None:
        self.count = 0
        self._kill_at = kill_at

    def moment(self, before_death: Callable[[], Any] = lambda: None) -> None:
        """Count a moment, or die in it."""
        self.count += 1
        if self.count == self._kill_at:
            before_death()
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Put moments into the functions that change files; never undone."""
        replace, fsync, log = os.replace, os.fsync, MetricsLog.write

        def counted_replace(*args: Any) -> None:
            self.moment()
            replace(*args)
            self.moment()

        def counted_fsync(file: int) -> None:
            if b"unfinished" in os.readlink(f"/proc/self/fd/{file}").encode():
                self.moment(lambda: os.ftruncate(file, os.fstat(file).st_size // 2))
            fsync(file)
            self.moment()

        def counted_log(metrics: MetricsLog, rows: list[dict[str, Any]]) -> None:
            self.moment(lambda: os.write(metrics._file.fileno(), b'{"step": 1, "lo'))
            log(metrics, rows)

        os.replace, os.fsync = counted_replace, counted_fsync
        MetricsLog.write = counted_log  # type: ignore[method-assign]


def in_process(
    values: Mapping[str, Any], root: Path, kill_at: int | None, options: dict, results: Any
) -> None:
    """Make a run, dying at a moment; else send the number of moments."""
    countdown = Countdown(kill_at)
    countdown.install()
    make(values, root, **options)
    results.send(countdown.count)


def forked(target: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """Call a function in a process of its own, with a pipe to this one as its last argument."""
    ours, theirs = SERVER.Pipe()
    process = SERVER.Process(target=target, args=(*arguments, theirs))
    process.start()
    theirs.close()
    return process, ours


def wait_for(
    holds: Callable[[], Any], process: BaseProcess | None = None, seconds: float = 120.0
) -> None:
    """Wait until something holds, which a process that still runs brings about."""
    end = time.monotonic() + seconds
    while not holds():
        assert process is None or process.is_alive(), "it ended by itself"
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def killed(values: Mapping[str, Any], root: Path, kill_at: int | None, **options: Any) -> int:
    """Make a run in a process that dies at a moment; return how many moments there were, or 0."""
    process, pipe = forked(in_process, values, root, kill_at, options)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return pipe.recv() if process.exitcode == 0 else 0


def printed_by(program: str) -> str:
    """Run a program in a process of its own; return what it prints, its traceback too."""
    process, pipe = forked(_run_program, program)
    printed = pipe.recv()
    process.join()
    return printed


def _run_program(program: str, results: Any) -> None:
    with redirect_stdout(io.StringIO()) as printed:
        try:
            exec(program, {"__name__": "__main__"})
        except Exception:
            traceback.print_exc(file=printed)
    results.send(printed.getvalue())


def as_rank(
    rank: int, size: int, port: int, values: Mapping[str, Any], root: Path, kill_at: int | None
) -> None:
    """Make a run as one of several processes; the main one dies at a moment."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    if rank == 0:
        Countdown(kill_at).install()
    with distributed.initialised():
        make(values, root, **OFTEN)


def together(
    values: Mapping[str, Any], root: Path, size: int = 2, kill_at: int | None = None
) -> list[int | None]:
    """Make a run in several processes; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        SERVER.Process(target=as_rank, args=(rank, size, port, values, root, kill_at))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()  # one that waits for others that are gone, as torchrun does it
        process.join()
    return [process.exitcode for process in ranks]
