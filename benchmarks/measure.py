"""One case from start to end: prepare everyone, check their numbers, time them in turn."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cases import Case
from benchmarks.floor import floor_of
from benchmarks.peers import Peer
from benchmarks.problems import Problem
from benchmarks.timing import Contestant, interleave, summarise


def measure(case: Case, peers: Mapping[str, Peer], seconds: float) -> dict[str, Any]:
    """Time every peer that takes the case and computes what it should.

    Args:
        case: what to run.
        peers: contestants by name.
        seconds: time for all rounds.

    Returns:
        JSON-ready: ``contestants``, by name either times and ratios (`timing.summarise`) or
        ``{"skipped": why}``; and what the machine did meanwhile.
    """
    torch.manual_seed(0)
    problem = Problem(case)
    ready: dict[str, Contestant] = {}
    outcome: dict[str, dict[str, Any]] = {}
    for name, peer in peers.items():
        outcome[name] = {}
        try:
            reason = peer.missing() or peer.refuses(case)
            if reason is None:
                run, reason = _prepared(peer, problem)
                if reason is None:
                    ready[name] = Contestant(run, peer.runtime)
        except Exception as error:  # a peer that fails is a result like any other
            reason = f"failed: {type(error).__name__}: {_first_line(error)}"
        if reason is not None:
            outcome[name] = {"skipped": reason}
    problem.forget_expected()
    load, calibration = None, machine.calibrate()
    if ready:
        watch = machine.LoadWatch()
        samples, repeats = interleave(ready, seconds)
        load = watch.read()
        for name, summary in summarise(samples, case.baseline).items():
            outcome[name] = {**summary, "rounds": len(samples[name]), "repeats": repeats[name]}
    result = {
        "case": case.as_json(),
        "threads": torch.get_num_threads(),
        "tokens": problem.tokens,
        "contestants": outcome,
        "load": load,
        "calibration": calibration,
    }
    if case.with_floor:
        result["floor"] = floor_of(case, torch.get_num_threads())
    return result


def _prepared(peer: Peer, problem: Problem) -> tuple[Any, str | None]:
    """Return what to run, and why not to, if its numbers are not those expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other packages' compilers have much to say
        prepared = peer.prepare(problem)
        found = prepared.run()
    if peer.same_numbers:
        difference = problem.disagreement(prepared.as_tensors(found))
        if difference is not None:
            return None, f"computes something else: {difference}"
    return prepared.run, None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
