"""One case from start to end: prepare everyone, check their numbers, time them in turn."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.contestants import CONTESTANTS
from benchmarks.contestants.base import Contestant
from benchmarks.machine import LoadWatch
from benchmarks.problem import Problem, tf32_allowed
from benchmarks.quality import multiply_add_rate
from benchmarks.timing import (
    Work,
    captured,
    interleave,
    median_of,
    seconds_by_clock,
    seconds_by_events,
    summarise,
)

PLAN_FIELDS = ("residency", "arithmetic", "fuse_input", "blocks", "columns", "engine_columns")
PLAN_FIELDS += ("row_warps", "depth_split", "total_us")
"""Of `rnn_cuda.cuda_plan.Plan`: what decides how a recurrence runs, and the time on paper."""


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
        seconds: for the rounds of each kind of launch.
        device: "cpu" or "cuda"; there, each is timed as a CUDA graph too.
        contestants: by name.

    Returns:
        JSON-ready: ``contestants`` (and ``graphed``), by name either times and ratios
        (`timing.summarise`) or ``{"skipped": why}``; and what the machine did meanwhile. A case
        that cannot be set up, such as one too large for the memory, has ``failed`` instead.

    Raises:
        RuntimeError: the device is lost for this process.
    """
    try:
        with tf32_allowed(case.tf32):
            return _measure(case, set(names), seconds, device, contestants)
    except Exception as error:
        return {"case": case.as_json(), "failed": _failure(error, device)}


def _measure(
    case: Case,
    names: set[str],
    seconds: float,
    device: str,
    contestants: Mapping[str, Contestant],
) -> dict[str, Any]:
    torch.manual_seed(0)
    problem = Problem(case, device)
    wanted = [name for name in case.contestants if name in names or name == case.baseline]
    skipped: dict[str, str | None] = {}
    works: dict[str, Work] = {}

    def admit(name: str, ready: dict[str, Work], prepare: Callable[[], Work]) -> None:
        """Add what is prepared if its numbers are those expected; else note why not."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other packages' compilers have much to say
                work = prepare()
                tensors = work.as_tensors(work.run())
            if contestants[name].same_numbers and (words := problem.disagreement(tensors)):
                skipped[name] = f"computes something else: {words}"
            else:
                ready[name] = work
        except Exception as error:  # a contestant that fails is a result like any other
            skipped[name] = _failure(error, device)

    def timed(ready: Mapping[str, Work]) -> dict[str, Any]:
        outcome = _timed(case, ready, seconds, device)
        return {name: outcome.get(name, {"skipped": skipped.get(name)}) for name in wanted}

    for name in wanted:
        contestant = contestants[name]
        skipped[name] = contestant.missing(device) or contestant.refuses(case)
        if skipped[name] is None:
            admit(name, works, lambda c=contestant: c.prepare(problem))
    if device == "cpu":
        problem.forget_expected()
    watch = LoadWatch()
    result: dict[str, Any] = {
        "case": case.as_json(),
        "tokens": problem.tokens,
        "contestants": timed(works),
        "load": watch.read(),
    }
    if device == "cpu":
        threads = torch.get_num_threads()
        result["threads"] = threads
        counted = case.dtype == "float32" and case.mode != "hvp"
        rate = multiply_add_rate() if counted else None
        if rate is not None:
            result["at_peak"] = sum(case.operations(problem.tokens)) / (rate * threads)
        return result
    replays: dict[str, Work] = {}
    for name, work in works.items():
        admit(name, replays, lambda w=work: captured(w))
    result |= {"graphed": timed(replays), "plans": plans_of(case)}
    gc.collect()  # a graph's memory goes back with it
    return result


def _timed(
    case: Case, works: Mapping[str, Work], seconds: float, device: str
) -> dict[str, dict[str, Any]]:
    if not works:
        return {}
    clock = seconds_by_events if device == "cuda" else seconds_by_clock
    samples, repeats = interleave(works, seconds, clock)
    outcome: dict[str, dict[str, Any]] = {
        name: {**summary, "rounds": len(samples[name]), "repeats": repeats[name]}
        for name, summary in summarise(samples, case.baseline).items()
    }
    if case.ours in samples and "flashrnn" in samples:  # for which there is a target too
        pairs = zip(samples["flashrnn"], samples[case.ours], strict=True)
        outcome[case.ours]["over_flashrnn"] = median_of([theirs / own for theirs, own in pairs])
    return outcome


def _failure(error: Exception, device: str) -> str:
    """Return the error in a line; raise it where the device is lost with it.

    After such an error nothing runs any more in this process; a new one does the rest.
    """
    if device == "cuda":
        torch.cuda.synchronize()  # raises what the device has to say
    words = str(error).strip().partition("\n")[0][:200]
    return f"failed: {type(error).__name__}: {words}"


def plans_of(case: Case, card: str = "cuda") -> dict[str, dict[str, Any]] | str:
    """Return how FusedRNN's kernels run each pass of the last layer, or why that is not known.

    A training step has two passes: ``forward``, and ``backward``, which has no input product.
    """
    from rnn_cuda.cuda_plan import plan

    passes = {"forward": case.I if case.num_layers == 1 else case.H * case.directions}
    if case.mode == "train":
        passes["backward"] = 0
    plans = {}
    for name, features in passes.items():
        try:
            chosen = plan(
                *(case.T, case.B, features, case.H),
                dtype=getattr(torch, case.dtype),
                directions=case.directions,
                device=card,
                allow_tf32=case.tf32,
            )
        except (RuntimeError, ValueError) as error:
            return f"no plan: {str(error).partition(chr(10))[0][:200]}"
        plans[name] = {field: getattr(chosen, field) for field in PLAN_FIELDS}
        plans[name]["batch_tiles"] = chosen.geometry["batch_tiles"]
    return plans
