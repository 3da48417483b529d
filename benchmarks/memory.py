"""Peak memory of one pass, each point in a process of its own.

    python -m benchmarks.memory '<job as JSON>'

is that process. It runs the same work on a tiny problem first, so that libraries, kernels and
threads are there; then it makes the problem, notes its resident size, runs the work once, and
prints by how much its resident size peaked above that.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cases import HVP_SHAPE, Case
from benchmarks.machine import REPOSITORY, hold_to, thread_environment

GATE = 1.2
"""Allowed peak of FusedRNN's training step, in units of T * B * H * 4 bytes."""

GATE_FROM = 32 * 2**20
"""Bytes of a unit from which on the gate holds; below, what does not grow with T tells more."""

CONTESTANTS = ("fused_rnn", "torch_rnn", "torch_lstm")
LENGTHS = (256, 512, 1024, 2048, 4096)
B, I, H = 64, 10, 128

_TIMEOUT = 300  # seconds for one point


def training_cases(*, quick: bool = False) -> list[Case]:
    """Return training steps of growing length."""
    if quick:
        return [Case("memory", 32, 8, 4, 64, "train", contestants=CONTESTANTS)]
    return [Case("memory", T, B, I, H, "train", contestants=CONTESTANTS) for T in LENGTHS]


def hvp_case(*, quick: bool = False) -> Case:
    """Return the Hessian-vector product whose memory is measured beside its time."""
    shape = (10, 3, 2, 8) if quick else HVP_SHAPE
    return Case("hvp", *shape, "hvp", contestants=("fused_rnn", "torch_rnn", "rnn_cell_loop"))


def unit(case: Case) -> int:
    """Return the bytes of one float32 sequence of states, T * B * H * 4."""
    return 4 * case.T * case.B * case.H


def peak_of(case: Case, contestant: str, threads: int) -> dict[str, Any]:
    """Measure one point in a process of its own.

    Returns:
        JSON-ready: ``case``, ``contestant``, ``threads`` and ``bytes``; or ``skipped`` and why.
    """
    job = {"case": case.as_json(), "contestant": contestant, "threads": threads}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", json.dumps(job)],
        env={**os.environ, **thread_environment(threads)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {**job, "skipped": f"failed: {reason[:200]}"}
    return {**job, "bytes": int(done.stdout.split()[-1])}


def gate_failures(points: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line for each point of FusedRNN's training step that is above the gate."""
    lines = []
    for point in points:
        case = Case.from_json(point["case"])
        ours = point["contestant"] == "fused_rnn" and case.mode == "train"
        if not ours or "bytes" not in point or unit(case) < GATE_FROM:
            continue
        units = point["bytes"] / unit(case)
        if units > GATE:
            lines.append(f"T = {case.T}, {point['threads']} thread(s): {units:.2f}")
    return lines


def _measure(case: Case, contestant: str, threads: int) -> int:
    """Return the growth of the peak in bytes, in this process."""
    import torch

    from benchmarks.peers import make_peers
    from benchmarks.problems import Problem

    torch.set_num_threads(threads)
    peer = make_peers([contestant], threads)[contestant]
    peer.prepare(Problem(replace(case, T=8, B=max(4, threads)))).run()
    prepared = peer.prepare(Problem(case))
    _return_freed_memory()
    before = _resident()
    _reset_peak()
    prepared.run()
    return max(0, _peak() - before)


def _return_freed_memory() -> None:
    """Give back what was freed: a step that reuses it would seem to need less than it does."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> None:
    """Set the peak that the kernel keeps to the present size, where it allows that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident() -> int:
    return _status("VmRSS") or _peak()


def _peak() -> int:
    return _status("VmHWM") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(field: str) -> int | None:
    match = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(match[1]) if match else None


if __name__ == "__main__":
    _job = json.loads(sys.argv[1])
    hold_to(_job["threads"])
    print(_measure(Case.from_json(_job["case"]), _job["contestant"], _job["threads"]))
