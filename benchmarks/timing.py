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

SHORTEST_SAMPLE = 2e-3
"""Seconds: shorter calls are repeated within a sample until it takes this long."""

MIN_ROUNDS, MAX_ROUNDS = 5, 200

_WARM_BELOW = 20e-3  # seconds; a shorter call is called once, untimed, before each sample
_SETTLE = 5e-3  # seconds in which another runtime's threads stop spinning and go to sleep


@dataclass(frozen=True)
class Contestant:
    """Something to time."""

    run: Callable[[], Any]
    """Does the work once and returns when it is done."""

    runtime: str = "torch"
    """Who owns its threads. Between contestants of different runtimes there is a pause, since the
    idle threads of one spin for a while on the cores that the other needs."""


@dataclass(frozen=True)
class Quartiles:
    """The median of some samples and the quartiles around it."""

    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Return the quartiles of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def as_json(self) -> dict[str, float]:
        """Return the three numbers by name."""
        return {"q1": self.q1, "median": self.median, "q3": self.q3}


def interleave(
    contestants: Mapping[str, Contestant],
    seconds: float,
    sample: Callable[[Callable[[], Any], int], float] | None = None,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Time contestants in turn; each has run before, so that nothing is compiled here.

    Args:
        contestants: what to time, by name; in this order.
        seconds: for all rounds together; there are at least `MIN_ROUNDS`, however long they take.
        sample: the clock: does the work so many times and returns the seconds per call; by default
            this process's own.

    Returns:
        samples: seconds per call, one for each round, by name.
        repeats: calls per sample, by name.
    """
    sample = sample or _sample
    gc.collect()
    gc.disable()  # it would strike at random, and whoever allocates most
    try:
        single = {name: _once(contestant, sample) for name, contestant in contestants.items()}
        repeats = {
            name: max(1, math.ceil(SHORTEST_SAMPLE / duration)) for name, duration in single.items()
        }
        one_round = sum(
            single[name] * (repeats[name] + (single[name] < _WARM_BELOW)) for name in contestants
        )
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / one_round)))
        samples: dict[str, list[float]] = {name: [] for name in contestants}
        runtime = None
        for _ in range(rounds):
            for name, contestant in contestants.items():
                if contestant.runtime != runtime:
                    time.sleep(_SETTLE)
                    runtime = contestant.runtime
                if single[name] < _WARM_BELOW:
                    contestant.run()
                samples[name].append(sample(contestant.run, repeats[name]))
    finally:
        gc.enable()
    return samples, repeats


def _once(contestant: Contestant, sample: Callable[[Callable[[], Any], int], float]) -> float:
    """Estimate the time of one call: the shorter of two, never zero."""
    return max(1e-9, min(sample(contestant.run, 1) for _ in range(2)))


def _sample(run: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def summarise(
    samples: Mapping[str, Sequence[float]], baseline: str
) -> dict[str, dict[str, dict[str, float]]]:
    """Return for each contestant the quartiles of its times and of its ratios.

    The ratio of a round is the baseline's time over the contestant's: above 1 is faster than the
    baseline. It is the median of ratios, not the ratio of medians.

    Args:
        samples: seconds, one for each round, by contestant.
        baseline: name of the contestant that is the unit; without it there are no ratios.
    """
    units = samples.get(baseline)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name, values in samples.items():
        result[name] = {"seconds": Quartiles.of(values).as_json()}
        if units is not None:
            ratios = [unit / value for unit, value in zip(units, values, strict=True)]
            result[name]["ratio"] = Quartiles.of(ratios).as_json()
    return result


def geometric_mean(ratios: Sequence[float]) -> float:
    """Return the geometric mean, the mean for which a ratio and its inverse cancel."""
    return math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
