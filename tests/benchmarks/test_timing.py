"""Timing: who runs when, and what is made of the samples."""

import math
import random

import pytest

from benchmarks.machine import disturbances
from benchmarks.timing import (
    MIN_ROUNDS,
    SHORTEST_SAMPLE,
    Work,
    geometric_mean,
    interleave,
    median_of,
    summarise,
)


def test_a_ratio_is_the_median_over_rounds_not_the_ratio_of_medians():
    samples = {"unit": [1.0, 2.0, 9.0], "other": [1.0, 1.0, 3.0]}  # ratios 1, 2, 3
    summary = summarise(samples, "unit")
    assert summary["other"]["ratio"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert summary["other"]["seconds"]["median"] == 1.0
    assert "ratio" not in summarise({"other": [1.0, 2.0]}, "unit")["other"]
    assert math.isclose(geometric_mean([4.0, 0.25, 1.0]), 1.0)


@pytest.mark.parametrize("n", [6, 9, 20, 51])
def test_the_interval_holds_the_true_median_as_often_as_it_says(n):
    generator = random.Random(n)
    hits = 0
    for _ in range(2000):
        found = median_of([generator.expovariate(1.0) for _ in range(n)])
        hits += found["low"] <= math.log(2) <= found["high"]
    assert 0.93 < hits / 2000 < 0.995
    assert (median_of(list(range(n)))["low"] == 0) == (n < 9)


def test_rounds_are_interleaved_and_short_calls_repeated():
    calls: list[str] = []
    works = {name: Work(lambda name=name: calls.append(name), runtime=name) for name in "ab"}
    samples, repeats = interleave(works, seconds=0.0)
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys(
        "ab", MIN_ROUNDS
    )
    assert all(count > 1 for count in repeats.values())
    turns = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    assert "".join(turns).endswith("ab" * MIN_ROUNDS)


def test_any_clock_will_do_and_a_sample_of_short_calls_is_long_enough_for_it():
    taken = []

    def clock(run, repeats):
        run()
        taken.append(1e-5 * repeats)
        return 1e-5

    samples, _ = interleave({"a": Work(lambda: None)}, 0.0, clock)
    assert samples["a"] == [1e-5] * MIN_ROUNDS
    assert taken[-1] == pytest.approx(SHORTEST_SAMPLE)


def test_a_busy_machine_is_remarked_on():
    quiet = {"others": 0.0, "stolen": 0.01}
    assert disturbances([quiet, None]) == []
    words = disturbances([quiet, {"others": 0.7, "stolen": 0.4}])
    assert len(words) == 2
    assert (
        "in 1 of 2 measurements other processes used more than 0.1 cores (up to 0.70)" in words[0]
    )
