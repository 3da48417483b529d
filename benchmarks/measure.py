"""One case from start to end: prepare everyone, check their numbers, time them in turn."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.contestants import CONTESTANTS
from benchmarks.contestants.base import Contestant
from benchmarks.machine import LoadWatch
from benchmarks.problem import Problem, tf32_allowed
from benchmarks.quality import multiply_add_rate
from benchmarks.timing import Work, interleave, seconds_by_clock, seconds_by_events, summarise


def measure(
    case: Case,
    names: Iterable[str],
    seconds: float,
    device: str = "cpu",
    contestants: Mapping[str, Contestant] = CONTESTANTS,
) -> dict[str, Any]:
    """Time everyone who takes the case and computes what it should.

    Args:
        case: what to run.
        names: who may take part; those of the case that do are timed, its baseline always.
        seconds: for the rounds.
        device: "cpu" or "cuda".
        contestants: by name.

    Returns:
        JSON-ready: ``contestants``, by name either times and ratios (`timing.summarise`) or
        ``{"skipped": why}``; and what the machine did meanwhile. A case that cannot be set up, such
        as one too large for the memory, has ``failed`` instead.

    Raises:
        RuntimeError: the device is lost for this process.
    """
    names = {*names, case.baseline}
    taking_part = {name: contestants[name] for name in case.contestants if name in names}
    result: dict[str, Any] = {"case": asdict(case)}
    try:
        with tf32_allowed(case.tf32):
            return result | _measured(case, taking_part, seconds, device)
    except Exception as error:
        return result | {"failed": _failure(error, device)}


def _measured(
    case: Case, contestants: Mapping[str, Contestant], seconds: float, device: str
) -> dict[str, Any]:
    watch = LoadWatch()
    problem = Problem(case, device)
    entries: dict[str, Any] = {}
    works: dict[str, Work] = {}
    for name, contestant in contestants.items():
        try:
            entries[name], work = _prepared(contestant, problem)
            works |= {} if work is None else {name: work}
        except Exception as error:  # a contestant that fails is a result like any other
            entries[name] = {"skipped": _failure(error, device)}
    if works:
        clock = seconds_by_events if device == "cuda" else seconds_by_clock
        for name, summary in summarise(interleave(works, seconds, clock), case.baseline).items():
            entries[name] |= summary
    result = {"contestants": entries, "load": watch.read(), "tokens": problem.tokens}
    if device == "cuda":
        works.clear()
        gc.collect()
        return result | {"plans": plans_of(case)}
    result["threads"] = threads = torch.get_num_threads()
    if case.dtype == "float32" and case.mode != "hvp" and (rate := multiply_add_rate()):
        result["at_peak"] = case.operations(problem.tokens) / (rate * threads)
    return result


def _prepared(contestant: Contestant, problem: Problem) -> tuple[dict[str, Any], Work | None]:
    """Return a contestant's entry and what to time, or why it is skipped and None."""
    case = problem.case
    if why_not := contestant.missing(problem.device) or contestant.refuses(case):
        return {"skipped": why_not}, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other packages' compilers have much to say
        work = contestant.prepare(problem)
        results = work.as_tensors(work.run())
    if not contestant.computes(case):
        return {}, work
    if difference := problem.disagreement(results):
        return {"skipped": f"computes something else: {difference}"}, None
    if case.suite != "accuracy":
        return {}, work
    return {"errors": dict(zip(problem.names(), problem.errors_of(results), strict=True))}, work


def _failure(error: Exception, device: str) -> str:
    """Return the error in a line; raise it where the device is lost with it.

    After such an error nothing runs any more in this process; a new one does the rest.
    """
    if device == "cuda":
        torch.cuda.synchronize()  # raises what the device has to say
    words = str(error).strip().partition("\n")[0][:200]
    return f"failed: {type(error).__name__}: {words}"


def plans_of(case: Case, card: str = "cuda") -> dict[str, Any] | str:
    """Return how FusedRNN's kernels run each pass of the last layer, or why that is not known.

    A training step has two passes, and the backward one has no input product. ``words`` are such as
    "cluster 8 / one_sm", ``seconds`` the planner's estimate for all layers.
    """
    from rnn_cuda.cuda_plan import plan

    passes = [case.I if case.num_layers == 1 else case.H * case.directions]
    passes += [0] if case.mode == "train" else []
    dtype, words, seconds = getattr(torch, case.dtype), [], 0.0
    options: dict[str, Any] = {"directions": case.directions, "device": card}
    for features in passes:
        try:
            sizes = case.T, case.B, features, case.H
            chosen = plan(*sizes, dtype=dtype, allow_tf32=case.tf32, **options)
        except (RuntimeError, ValueError) as error:
            return f"no plan: {str(error).partition(chr(10))[0][:200]}"
        has_blocks = chosen.residency in ("cluster", "grid")
        words.append(f"{chosen.residency} {chosen.blocks}" if has_blocks else chosen.residency)
        seconds += 1e-6 * case.num_layers * chosen.total_us
    return {"words": " / ".join(dict.fromkeys(words)), "seconds": seconds}


# ---- one contestant at a time, for `benchmarks.versions` ---------------------------------------

_prepared_work: list[Work] = []


def prepare(case: Case) -> list[torch.Tensor]:
    """Make the case's contestant ready for :func:`run_prepared`; return its results."""
    gc.enable()
    _prepared_work[:] = [work := CONTESTANTS[case.ours].prepare(Problem(case))]
    results = [tensor.detach().clone() for tensor in work.as_tensors(work.run())]
    gc.collect()
    gc.disable()  # a collection would disturb one of the versions at random
    return results


def run_prepared(repeats: int) -> float:
    """Do what was prepared so many times; return the seconds of one."""
    return seconds_by_clock(_prepared_work[0].run, repeats)
