"""The processes that measure: what they survive, and what outlives them."""

import contextlib
import os
import signal
import time

import pytest

from benchmarks.cases import Case
from benchmarks.quality import memory_unit
from benchmarks.workers import MOST_LOST, Worker, WorkerError, ask_once, measure_all

CASES = [Case("grid", T, 1, 1, 1, "forward") for T in range(1, 9)]


class FakeWorker:
    """Fails at some lengths T in the ways that a process has."""

    def __init__(self, ends=(), hangs=(), seconds=0.0):
        self.ends, self.hangs, self.seconds, self.closed = ends, hangs, seconds, False

    def ask(self, request, case, names, share, device, patience=None):
        time.sleep(self.seconds)
        if case.T in self.ends:
            raise WorkerError("the measuring process ended with signal 11")
        if case.T in self.hangs:
            raise WorkerError(f"hung: killed after {patience:.0f} s")
        return {"case": case.as_json(), "share": share}

    def close(self):
        self.closed = True


def measured(cases=CASES, **options):
    limits = {name: options.pop(name) for name in ("end", "patience") if name in options}
    started = []

    def start():
        started.append(FakeWorker(**options))
        return started[-1]

    results = list(measure_all(cases, ["fused_rnn"], 0.1, "cpu", start, **limits))
    assert all(worker.closed for worker in started)
    return results, len(started)


def test_a_crash_costs_one_case_and_a_new_process_does_the_rest():
    results, started = measured(ends=(3,))
    assert [r["case"]["T"] for r in results] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [r["failed"] for r in results if "failed" in r] == [
        "the measuring process ended with signal 11"
    ]
    assert started == 2


def test_a_hang_is_that_cases_fault_unless_the_time_was_over():
    results, _ = measured(hangs=(2,), patience=5.0, end=time.monotonic() + 1000)
    assert results[1]["failed"] == "hung: killed after 5 s"
    results, _ = measured(hangs=(2,), patience=500.0, end=time.monotonic() + 100)
    assert [r["case"]["T"] for r in results] == [1]


def test_after_several_lost_processes_the_rest_is_not_tried():
    results, started = measured(ends=range(10))
    assert len(results) == started == MOST_LOST


def test_when_the_time_is_over_what_was_measured_stays():
    results, _ = measured(seconds=0.1, end=time.monotonic() + 0.35)
    assert 1 <= len(results) < len(CASES)


def test_a_worker_answers_dies_and_hangs():
    with contextlib.closing(Worker(1)) as worker:
        assert worker.ask("timing.geometric_mean", [2.0, 8.0]) == 4.0
        os.kill(worker._process.pid, signal.SIGSTOP)
        with pytest.raises(WorkerError, match="hung: killed after 0 s"):
            worker.ask("timing.geometric_mean", [1.0], patience=0.2)
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="ended with signal 9"):
            worker.ask("timing.geometric_mean", [1.0])


def test_peak_memory_counts_what_a_training_step_holds():
    case = Case("memory", 512, 32, 4, 128, "train")  # a unit of 8 MiB
    units = ask_once(1, "cpu", "quality.peak_bytes", case, "torch_rnn") / memory_unit(case)
    assert 1 < units < 12  # the states themselves; torch keeps about five such sequences
    with pytest.raises(WorkerError, match="KeyError: 'nobody'"):
        ask_once(1, "cpu", "quality.peak_bytes", case, "nobody")
