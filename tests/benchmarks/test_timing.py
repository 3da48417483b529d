"""Timing: who runs when, and what is made of the samples."""

import math
import random
import time

import pytest

from benchmarks import machine
from benchmarks.timing import (
    MIN_ROUNDS,
    SHORTEST_SAMPLE,
    Work,
    interleave,
    median_of,
    seconds_by_clock,
    summarise,
)


def test_a_ratio_is_the_median_over_rounds_not_the_ratio_of_medians():
    samples = {"unit": [1.0, 2.0, 9.0], "other": [1.0, 1.0, 3.0]}  # ratios 1, 2, 3
    summary = summarise(samples, "unit")
    assert summary["other"]["ratio"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert summary["other"]["seconds"]["median"] == 1.0
    assert "ratio" not in summarise({"other": [1.0, 2.0]}, "unit")["other"]


@pytest.mark.parametrize("n", [6, 9, 20, 51])
def test_the_interval_holds_the_true_median_as_often_as_it_says(n):
    generator = random.Random(n)
    hits = 0
    for _ in range(2000):
        found = median_of([generator.expovariate(1.0) for _ in range(n)])
        hits += found["low"] <= math.log(2) <= found["high"]
    assert 0.93 < hits / 2000 < 0.995
    assert (median_of(list(range(n)))["low"] == 0) == (n < 9)


def test_rounds_are_interleaved_and_a_sample_of_short_calls_is_long_enough():
    timed = []

    def clock(run, repeats):
        timed.append((run(), repeats))
        return 1e-5

    works = {name: Work(lambda name=name: name, runtime=name) for name in "ab"}
    samples = interleave(works, 0.0, clock)
    assert samples == dict.fromkeys("ab", [1e-5] * MIN_ROUNDS)
    once, rounds = timed[:4], timed[4:]
    assert once == [("a", 1), ("a", 1), ("b", 1), ("b", 1)]
    repeats = pytest.approx(SHORTEST_SAMPLE / 1e-5, abs=1)
    assert rounds == [("a", repeats), ("b", repeats)] * MIN_ROUNDS


def test_seconds_by_the_clock_are_of_one_call():
    calls = []
    seconds = seconds_by_clock(lambda: (calls.append(0), time.sleep(1e-3)), 20)
    assert len(calls) == 20
    assert 1e-3 <= seconds < 20e-3


def test_load_is_what_others_and_the_hypervisor_took_of_the_cores(monkeypatch):
    # user nice system idle iowait irq softirq steal
    stat = iter(["cpu 0 0 0 0 0 0 0 0 0", "cpu 200 10 80 500 70 4 6 100 0"])
    monkeypatch.setattr(machine, "_read", lambda path: next(stat))
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(machine.os, "times", iter([(0.0,) * 5, (0.7, 0.3, 0.0, 0.0, 9.0)]).__next__)
    monkeypatch.setattr(machine.time, "monotonic", iter([10.0, 12.0]).__next__)
    assert machine.LoadWatch().read() == (4.0 - 1.0) / 2
