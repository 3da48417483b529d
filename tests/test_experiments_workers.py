"""Jobs on several processes. Every worker imports this module, so it imports little."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest
import torch
from experiments.workers import WorkerError, noticed_interrupts, run_jobs


def _square(value, report):
    report(value)
    if value == 13:
        raise ValueError("thirteen")
    if value == 99:
        os._exit(3)
    return value * value, torch.get_num_threads()


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_report_and_return_by_their_index(workers):
    told, returned = [], {}
    threads = torch.get_num_threads()
    run_jobs(
        _square,
        [(n,) for n in range(4)],
        workers,
        lambda i, v: told.append((i, v)),
        returned.__setitem__,
    )
    assert sorted(told) == [(n, n) for n in range(4)]
    assert returned == {n: (n * n, 1) for n in range(4)}
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("bad", "words"), [(13, "ValueError: thirteen"), (99, "died")])
def test_a_job_that_fails_or_dies_in_its_process_is_an_error_here(bad, words):
    with pytest.raises(WorkerError, match=words):
        run_jobs(_square, [(bad,), (1,), (2,)], 2, lambda *_: None, lambda *_: None)


def _report_twice(value, report):
    report(value)
    report(value)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_that_somebody_swallows_ends_the_run_all_the_same(workers):
    swallowed = []

    def swallow(index, value):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            swallowed.append(index)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), noticed_interrupts():
        run_jobs(_report_twice, [(n,) for n in range(50)], workers, swallow, lambda *_: None)
    assert 1 <= len(swallowed) < 50
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_that_is_swallowed_after_the_last_job_is_noticed_at_the_end():
    with pytest.raises(KeyboardInterrupt), noticed_interrupts(), suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
