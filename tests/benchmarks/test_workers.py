"""The processes that measure: what they survive, and what outlives them."""

import contextlib
import os
import signal
import time
from dataclasses import asdict

import pytest

from benchmarks import quality, tables
from benchmarks.cases import Case
from benchmarks.workers import MOST_LOST, Worker, WorkerError, measure_all

CASES = [Case("grid", T, 1, 1, 1, "forward") for T in range(1, 9)]


class FakeWorker(contextlib.AbstractContextManager):
    """Fails at some lengths T in the ways that a process has."""

    def __init__(self, ends=(), hangs=(), seconds=0.0):
        self.ends, self.hangs, self.seconds, self.closed = ends, hangs, seconds, False

    def ask(self, measure, case, names, share, device, patience=None):
        time.sleep(self.seconds)
        if case.T in self.ends:
            raise WorkerError("the measuring process ended with signal 11")
        if case.T in self.hangs:
            raise WorkerError(f"hung: killed after {patience:.0f} s")
        return {"case": asdict(case), "share": share}

    def __exit__(self, *_):
        self.closed = True


def measured(cases=CASES, **options):
    limits = {name: options.pop(name) for name in ("end", "patience") if name in options}
    started = []

    def start():
        started.append(FakeWorker(**options))
        return started[-1]

    results = list(measure_all(cases, None, ["fused_rnn"], 0.1, "cpu", start, **limits))
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
    results, _ = measured(hangs=(2,), seconds=0.1, patience=5.0, end=time.monotonic() + 0.15)
    assert [r["case"]["T"] for r in results] == [1]


def test_after_several_lost_processes_the_rest_is_not_tried():
    results, started = measured(ends=range(10))
    assert len(results) == started == MOST_LOST


def test_rounds_get_their_share_of_what_is_left_and_early_cases_more():
    results, _ = measured(end=time.monotonic() + 1.2)
    shares = [r["share"] for r in results]
    assert shares[0] == pytest.approx(1.2 / 16, abs=0.01)
    assert shares[-1] == 0.1  # no more than was asked for
    # When the time is over, what was measured stays.
    assert 1 <= len(measured(seconds=0.1, end=time.monotonic() + 0.35)[0]) < len(CASES)


def test_a_worker_answers_dies_and_hangs():
    with Worker(1) as worker:
        assert worker.ask(tables.number, 2.0) == "2.00"
        os.kill(worker.process.pid, signal.SIGSTOP)
        with pytest.raises(WorkerError, match="hung: killed after 0 s"):
            worker.ask(tables.number, 1.0, patience=0.2)
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="ended with signal 9"):
            worker.ask(tables.number, 1.0)


def test_peak_memory_counts_what_a_training_step_holds():
    case = Case("memory", 512, 32, 4, 128, "train")  # a unit of 8 MiB
    with Worker(1) as worker:
        units = worker.ask(quality.peak_bytes, case, "torch_rnn") / quality.memory_unit(case)
        assert 1 < units < 12  # the states themselves; torch keeps about five such sequences
        with pytest.raises(WorkerError, match="KeyError: 'nobody'"):
            worker.ask(quality.peak_bytes, case, "nobody")
