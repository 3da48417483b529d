"""Timing in turn, and what is made of the samples.

A speed is a ratio of two times measured moments apart in one process: contestants run A B C A B C,
each round gives a ratio, and the median over rounds is reported. What else the machine does then
hits all of them alike, or spoils a round that the median ignores.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SHORTEST_SAMPLE = 2e-3
"""Seconds: shorter calls are repeated within a sample until it takes this long."""

MIN_ROUNDS, MAX_ROUNDS = 5, 200

_WARM_BELOW = 20e-3  # seconds; a shorter call is called once, untimed, before each sample
_SETTLE = 5e-3  # seconds in which another runtime's threads stop spinning and go to sleep

Clock = Callable[[Callable[[], Any], int], float]
"""Does the work so many times and returns the seconds of one call."""


@dataclass(frozen=True)
class Work:
    """Something to time."""

    run: Callable[[], Any]
    """Does the work once; on a CPU, returns when it is done."""

    as_tensors: Callable[[Any], Any] = list
    """From what ``run`` returned to the list described in `benchmarks.problem`; not timed."""

    runtime: str = "torch"
    """Who owns its threads. Between works of different runtimes there is a pause, since the idle
    threads of one spin for a while on the cores that the other needs."""


def seconds_by_clock(run: Callable[[], Any], repeats: int) -> float:
    """Return seconds per call by this process's clock."""
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def seconds_by_events(run: Callable[[], Any], repeats: int) -> float:
    """Return seconds per call, from events recorded around the calls in the current CUDA stream.

    Where Python is slower than the device, that is the time Python takes, as a user would see it.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end) / repeats


def interleave(
    works: Mapping[str, Work], seconds: float, clock: Clock = seconds_by_clock
) -> dict[str, list[float]]:
    """Time works in turn; each has run before, so that nothing is compiled here.

    Args:
        works: what to time, by name; in this order.
        seconds: for all rounds together; there are at least `MIN_ROUNDS`, however long they take.
        clock: what takes the time.

    Returns:
        Seconds per call, one for each round, by name.
    """
    gc.collect()
    gc.disable()  # a collection would disturb one of them at random
    try:
        # The shorter of two calls, never zero.
        once = {
            name: max(1e-9, min(clock(work.run, 1) for _ in range(2)))
            for name, work in works.items()
        }
        repeats = {name: max(1, math.ceil(SHORTEST_SAMPLE / once[name])) for name in works}
        a_round = sum(once[name] * (repeats[name] + (once[name] < _WARM_BELOW)) for name in works)
        samples: dict[str, list[float]] = {name: [] for name in works}
        runtime = None
        for _ in range(min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / a_round)))):
            for name, work in works.items():
                if work.runtime != runtime:
                    time.sleep(_SETTLE)
                    runtime = work.runtime
                if once[name] < _WARM_BELOW:
                    work.run()
                samples[name].append(clock(work.run, repeats[name]))
    finally:
        gc.enable()
    return samples


# ---- statistics ----------------------------------------------------------------------------------


def median_of(values: Sequence[float]) -> dict[str, float]:
    """Return the median, and ``low`` and ``high``: its confidence interval of 95 %.

    The interval is between two of the values, and supposes nothing of how they are distributed.
    Below six values even the least and the greatest have a little less.
    """
    ordered, n = sorted(values), len(values)
    # The chance that the true median is below the k-th value or above its mirror.
    outside = [2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range((n + 1) // 2)]
    k = max(0, sum(chance <= 0.05 for chance in outside) - 1)
    return {"median": statistics.median(ordered), "low": ordered[k], "high": ordered[n - 1 - k]}


def summarise(samples: Mapping[str, Sequence[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """Return for each contestant the medians of its times and of its ratios.

    The ratio of a round is the baseline's time over the contestant's: above 1 is faster than the
    baseline. It is the median of ratios, not the ratio of medians.

    Args:
        samples: seconds, one for each round, by contestant.
        baseline: name of the contestant that is the unit; without it there are no ratios.
    """
    summary: dict[str, dict[str, Any]] = {}
    for name, values in samples.items():
        summary[name] = {"seconds": median_of(values), "rounds": len(values)}
        if baseline in samples:
            pairs = zip(samples[baseline], values, strict=True)
            summary[name]["ratio"] = median_of([unit / value for unit, value in pairs])
    return summary
