"""The build stage: everything that the others need, side by side."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu.cases import FLASH, FLASHRNN
from benchmarks.gpu.context import Context, StageError
from benchmarks.gpu.native import CHECKER, FLOOR, build_program

# Loads it too, and asks whether a GPU's tensors find a kernel.
_EXTENSION = """
import torch
from rnn_cuda import backend
backend.use_native({device!r}, torch.float32)
"""

_FLASHRNN = """
from benchmarks.gpu.problems import prebuild_flashrnn
prebuild_flashrnn({H}, "cuda")
"""


def build(context: Context) -> None:
    """Compile the extension, the checker and the floor at once.

    Raises:
        StageError: the extension or the checker failed; the message names which and ends with what
            the compiler said.
    """
    jobs: dict[str, Callable[[], object]] = {
        "extension": lambda: _python(_EXTENSION.format(device=context.device), context.seconds)
    }
    optional: dict[str, Callable[[], object]] = {}
    if not context.rehearsal:
        jobs["checker"] = lambda: build_program(CHECKER, context.work)
        optional["floor"] = lambda: build_program(FLOOR, context.work)
        from benchmarks.gpu.problems import CONTENDERS

        if CONTENDERS[FLASHRNN].missing() is None:
            # Each size is compiled when it is first called, which would take the benchmark's time.
            for *_, H in FLASH:
                optional[f"FlashRNN {H}"] = lambda H=H: _python(
                    _FLASHRNN.format(H=H), context.seconds - 5
                )
    with ThreadPoolExecutor(len(jobs) + len(optional)) as pool:
        pending = {
            name: pool.submit(_timed, name, work) for name, work in (jobs | optional).items()
        }
        failures = {name: future.result() for name, future in pending.items()}
    broken = [name for name in jobs if failures[name] is not None]
    for name, failure in failures.items():
        if failure is not None:
            print(f"{name} failed:\n{failure}")
    if broken:
        raise StageError(f"failed: {', '.join(broken)}")
    missing = [name for name in optional if failures[name] is not None]
    built = ", ".join(name for name in failures if name not in missing)
    print(f"built: {built}" + (f"; failed: {', '.join(missing)}" if missing else ""))


def _timed(name: str, work: Callable[[], object]) -> str | None:
    """Return why it failed, or None."""
    begin = time.monotonic()
    try:
        work()
    except (StageError, OSError, subprocess.SubprocessError) as error:
        return str(error)
    print(f"{name}: {time.monotonic() - begin:.0f} s")
    return None


def _python(program: str, seconds: float) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=seconds,
    )
    if done.returncode != 0:
        raise StageError(done.stdout[-4000:])
