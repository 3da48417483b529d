"""The benchmark: starts the process that measures, outlives it, and keeps to its time.

A kernel that waits for something that never comes hangs its process for good. So whoever measures
is watched: after `PATIENCE` seconds without a word it is killed, the case is a failure, and a new
process does the rest.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from benchmarks.cases import BASELINE
from benchmarks.gpu.cases import LAUNCHES, OURS, GpuCase, all_cases, rehearsal_cases
from benchmarks.gpu.context import Context, StageError
from benchmarks.machine import REPOSITORY
from benchmarks.reading import number
from benchmarks.timing import geometric_mean

PATIENCE = 40.0
"""Seconds that one case may take."""

START_PATIENCE = 60.0
"""Seconds that a process may take to import everything and find the device."""

MOST_LOST_WORKERS = 4
"""After so many processes that crashed or hung, the others are not tried."""

LAST_SECONDS = 6.0
"""Kept for ending: a process that uses the device takes its time to go."""

Start = Callable[[], Any]


def bench(context: Context) -> None:
    """Time what there is time for; leave ``timings.jsonl``, and what was not measured.

    Raises:
        StageError: nothing was timed, or FusedRNN failed on a case or computed something else.
    """
    cases = rehearsal_cases() if context.rehearsal else all_cases()
    seconds = max(1.0, context.seconds - LAST_SECONDS)
    results = []
    left = {case.label for case in cases}
    context.write("unmeasured.json", [case.label for case in cases])
    with (context.work / "timings.jsonl").open("w", encoding="utf-8", buffering=1) as stream:
        for result in run_cases(cases, context.device, seconds):
            stream.write(json.dumps(result) + "\n")
            results.append(result)
            left.discard(GpuCase.from_json(result["case"]).label)
            # At once: this process may be ended before the next one.
            context.write("unmeasured.json", [c.label for c in cases if c.label in left])
            print(progress_line(result))
    summary, bad = summary_of(results, len(cases))
    if bad:
        raise StageError(f"{summary}; wrong: {'; '.join(bad[:3])}")
    print(summary)


def progress_line(result: dict[str, Any]) -> str:
    """Return a line that says what was just measured."""
    label = GpuCase.from_json(result["case"]).label
    if "failed" in result:
        return f"{label}: {result['failed']}"
    words = []
    for launch in LAUNCHES:
        for name, found in result[launch].items():
            if "ratio" in found and name != BASELINE:
                milliseconds = number(1e3 * found["seconds"]["median"])
                words.append(f"{launch} {name} {number(found['ratio']['median'])} ({milliseconds})")
            elif "skipped" in found and not found["skipped"].startswith("not installed"):
                words.append(f"{launch} {name}: {found['skipped']}")
    return f"{label}: {', '.join(words)}"


def summary_of(results: Sequence[dict[str, Any]], planned: int) -> tuple[str, list[str]]:
    """Return the line for the table, and the cases in which FusedRNN itself is at fault.

    A capture that fails is FusedRNN's fault only where torch.nn.RNN can be captured.
    """
    ratios, bad = [], []
    for result in results:
        label = GpuCase.from_json(result["case"]).label
        if "failed" in result:
            bad.append(f"{label}: {result['failed']}")
            continue
        for launch in LAUNCHES:
            ours, torchs = result[launch].get(OURS, {}), result[launch][BASELINE]
            if "skipped" in ours and (launch == "eager" or "seconds" in torchs):
                bad.append(f"{label} {launch}: {ours['skipped']}")
        ratio = result["eager"].get(OURS, {}).get("ratio")
        if ratio is not None:
            ratios.append(ratio["median"])
    if not ratios:
        return f"none of {planned} cases was timed", bad or ["nothing"]
    mean, slower = number(geometric_mean(ratios)), sum(ratio < 1 for ratio in ratios)
    line = f"{len(results)} of {planned} cases, geometric mean {mean}, {slower} below 1"
    return line, bad


def start_worker() -> subprocess.Popen[str]:
    """Start the process that measures."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        text=True,
    )


def run_cases(
    cases: Sequence[GpuCase],
    device: str,
    seconds: float,
    start: Start = start_worker,
    patience: float = PATIENCE,
) -> Iterator[dict[str, Any]]:
    """Yield the result of each case in turn until the time is over.

    Args:
        cases: what to measure, the most important first.
        device: see `benchmarks.gpu.measure`.
        seconds: for everything.
        start: starts a process that is given a job and answers with lines of JSON.
        patience: seconds that one case may take.

    Yields:
        What `measure` returned, or ``{"case": ..., "failed": how}`` of a case that its process did
        not survive. Cases for which no time was left are not among them.
    """
    end = time.monotonic() + seconds
    done, lost = 0, 0
    while done < len(cases) and time.monotonic() < end and lost < MOST_LOST_WORKERS:
        job = {
            "device": device,
            "end": end,
            "patience": patience,
            "cases": [case.as_json() for case in cases[done:]],
        }
        at: int | None = None  # the case under way, counted in this job
        finished, why = 0, ""
        try:
            for answer in _answers(start, job, end, patience):
                if "started" in answer:
                    at = answer["started"]
                elif "why" in answer:
                    why = f": {answer['why']}"
                elif "index" in answer:
                    at, finished = None, finished + 1
                    yield {key: value for key, value in answer.items() if key != "index"}
            return  # all done, or too little time for the next one
        except _WorkerLostError as error:
            if error.out_of_time:
                return
            if at is None and finished == 0:
                raise RuntimeError(f"the measuring process {error}{why}") from None
            lost += 1
            done += finished
            if at is not None:
                yield {"case": cases[done].as_json(), "failed": f"{error}{why}"}
                done += 1


class _WorkerLostError(Exception):
    """The process ended before its job, or was ended."""

    def __init__(self, how: str, *, out_of_time: bool = False) -> None:
        super().__init__(how)
        self.out_of_time = out_of_time


def _answers(
    start: Start, job: dict[str, Any], end: float, patience: float
) -> Iterator[dict[str, Any]]:
    process = start()
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    allowed = START_PATIENCE
    try:
        with process.stdin as pipe:
            json.dump(job, pipe)
        while True:
            left = end - time.monotonic()
            try:
                line = lines.get(timeout=max(0.01, min(allowed, left)))
            except queue.Empty:
                if left <= allowed:
                    raise _WorkerLostError("out of time", out_of_time=True) from None
                raise _WorkerLostError(f"hung: killed after {allowed:.0f} s") from None
            if line is None:
                break
            allowed = patience
            yield json.loads(line)
        status = process.wait()
        if status != 0:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise _WorkerLostError(f"ended with {how}")
    except BrokenPipeError:
        raise _WorkerLostError("ended before it was told what to do") from None
    finally:
        process.kill()
        process.wait()
        reader.join(timeout=1)


def _read(stream: TextIO, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
