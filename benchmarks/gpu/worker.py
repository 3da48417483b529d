"""The process that measures.

    python -m benchmarks.gpu.worker < job.json

Results go to standard output, one JSON object per line, as they come; everything else that is
printed goes to standard error. It ends when there is too little time for another case.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

SHORTEST, LONGEST = 0.06, 0.5
"""Seconds for the rounds of a case and kind of launch; there are five rounds, however long."""

MEASURING_SHARE = 0.5
"""Of a case's time, at a guess; the rest is preparation."""


def main() -> None:
    """Do the job on standard input."""
    job = json.load(sys.stdin)
    # Only results may come through the pipe, whoever else in this process prints.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import torch

    from benchmarks.gpu.cases import LAUNCHES, GpuCase
    from benchmarks.gpu.measure import measure

    if job["device"] == "cpu":
        torch.set_num_threads(1)
    _write(results, {"ready": True})
    longest = 0.0
    for index, fields in enumerate(job["cases"]):
        begin = time.monotonic()
        left = job["end"] - begin
        if left < longest:
            break  # it would be cut off, and has the device's memory to clear
        seconds = seconds_for_each(left, (len(job["cases"]) - index) * len(LAUNCHES))
        _write(results, {"started": index})
        try:
            result = measure(GpuCase.from_json(fields), job["device"], seconds)
        except Exception as error:  # the device is lost, and this process with it
            _write(results, {"why": f"{type(error).__name__}: {str(error)[:200]}"})
            raise
        took = time.monotonic() - begin
        longest = min(max(longest, took), job["patience"])
        _write(results, {"index": index, "took": took, **result})


def seconds_for_each(left: float, measurements: int) -> float:
    """Return the seconds for the rounds of one measurement, of so many that are still to be done.

    Early ones get more than their share, up to `LONGEST`: they matter more, and what is left over
    is shared out again each time.
    """
    return min(LONGEST, max(SHORTEST, 2 * MEASURING_SHARE * left / measurements))


def _write(results: TextIO, value: Any) -> None:
    results.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    main()
