"""One case from start to end: prepare everyone, check their numbers, time them in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import BASELINE
from benchmarks.gpu.cases import LAUNCHES, OURS, GpuCase
from benchmarks.gpu.plans import plans_of
from benchmarks.gpu.problems import CONTENDERS, Contender, DeviceProblem, Work, tf32_allowed
from benchmarks.gpu.timing import Graph, seconds_by_clock, seconds_by_events
from benchmarks.timing import Contestant, Quartiles, interleave, summarise


def measure(
    case: GpuCase,
    device: str,
    seconds: float,
    contenders: Mapping[str, Contender] = CONTENDERS,
) -> dict[str, Any]:
    """Return :func:`measurements`, or the case with ``failed``: why there are none.

    Raises:
        RuntimeError: the device is lost for this process.
    """
    try:
        return measurements(case, device, seconds, contenders)
    except Exception as error:  # such as too little memory
        return {"case": case.as_json(), "failed": failure(error)}


def measurements(
    case: GpuCase,
    device: str,
    seconds: float,
    contenders: Mapping[str, Contender] = CONTENDERS,
) -> dict[str, Any]:
    """Time every contestant that computes what it should, called from Python and as a graph.

    Args:
        case: what to run.
        device: "cuda"; "cpu" is the stand-in, where nothing can be captured.
        seconds: for the rounds of each kind of launch.
        contenders: by name.

    Returns:
        JSON-ready: for each of `LAUNCHES` the contestants by name, with times and ratios or with
        ``{"skipped": why}``; and our plans.
    """
    result: dict[str, Any] = {"case": case.as_json()}
    with tf32_allowed(case.tf32):
        problem = DeviceProblem(case, device)
        result["tokens"] = problem.tokens
        result["plans"] = plans_of(case, device)
        wanted = {name: contenders[name] for name in case.case.contestants}
        works, skipped = _prepared(wanted, problem)
        for launch in LAUNCHES:
            runs, outcome = works, {name: {"skipped": why} for name, why in skipped.items()}
            if launch == "graphed":
                runs, refused = _captured(works, problem, device)
                outcome |= {name: {"skipped": why} for name, why in refused.items()}
            outcome |= timed(runs, seconds, device)
            result[launch] = {name: outcome[name] for name in wanted}
        problem.forget_expected()
    gc.collect()  # a graph's memory goes back with it
    return result


def timed(
    runs: Mapping[str, Callable[[], Any]], seconds: float, device: str
) -> dict[str, dict[str, Any]]:
    """Return times and ratios to the baseline, and to every other one of ours, by contestant."""
    if not runs:
        return {}
    clock = seconds_by_clock if device == "cpu" else seconds_by_events
    contestants = {name: Contestant(run) for name, run in runs.items()}
    samples, repeats = interleave(contestants, seconds, clock)
    outcome: dict[str, dict[str, Any]] = {
        name: {**summary, "rounds": len(samples[name]), "repeats": repeats[name]}
        for name, summary in summarise(samples, BASELINE).items()
    }
    if OURS in samples:
        outcome[OURS]["ratio_to"] = ratios_to(samples, OURS)
    return outcome


def ratios_to(samples: Mapping[str, Sequence[float]], ours: str) -> dict[str, dict[str, float]]:
    """Return, for each other contestant, the quartiles of its time over ours, round by round."""
    return {
        name: Quartiles.of(
            [theirs / own for theirs, own in zip(values, samples[ours], strict=True)]
        ).as_json()
        for name, values in samples.items()
        if name not in (ours, BASELINE)
    }


def _prepared(
    contenders: Mapping[str, Contender], problem: DeviceProblem
) -> tuple[dict[str, Work], dict[str, str]]:
    """Return who computes the right numbers, and why the others are not timed."""
    works: dict[str, Work] = {}
    skipped: dict[str, str] = {}
    for name, contender in contenders.items():
        if reason := contender.missing():
            skipped[name] = reason
            continue
        try:
            work = contender.work(problem)
            reason = wrong_numbers(problem, work())
        except Exception as error:
            skipped[name] = failure(error)
            continue
        if reason is None:
            works[name] = work
        else:
            skipped[name] = reason
    return works, skipped


def _captured(
    works: Mapping[str, Work], problem: DeviceProblem, device: str
) -> tuple[dict[str, Work], dict[str, str]]:
    """Return replays of the same works, their numbers checked once more."""
    if device == "cpu":
        return {}, dict.fromkeys(works, "a CUDA graph needs a GPU")
    replays: dict[str, Work] = {}
    refused: dict[str, str] = {}
    for name, work in works.items():
        try:
            graph = Graph(work)
            reason = wrong_numbers(problem, graph.replay())
        except Exception as error:
            refused[name] = failure(error)
            continue
        if reason is None:
            replays[name] = graph.replay
        else:
            refused[name] = reason
    return replays, refused


def wrong_numbers(problem: DeviceProblem, found: Iterable[Tensor]) -> str | None:
    """Return how the numbers differ from those expected, or None."""
    difference = problem.disagreement(list(found))
    return None if difference is None else f"computes something else: {difference}"


def failure(error: Exception) -> str:
    """Return the error in a line; raise it where the device is lost with it.

    After such an error nothing runs any more in this process; a new one does the rest.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # raises what the device has to say
    words = str(error).strip().partition("\n")[0][:200]
    return f"failed: {type(error).__name__}: {words}"
