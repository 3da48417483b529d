"""One case from start to end: prepare everyone, check their numbers, time them in turn."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
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
PLAN_FIELDS += ("row_warps", "depth_split")
"""Of `rnn_cuda.cuda_plan.Plan`: what decides how a recurrence runs."""


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
    torch.manual_seed(0)
    problem = Problem(case, device)
    works: dict[str, Work] = {}

    def timed(prepare: Mapping[str, Callable[[], Work]], why_not: Mapping[str, str | None]) -> Any:
        """Time those whose numbers are those expected; say of the others why they are not."""
        entries: dict[str, Any] = {name: {"skipped": why_not.get(name)} for name in contestants}
        ready, errors = {}, {}
        for name in prepare:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # other packages' compilers have much to say
                    work = prepare[name]()
                    tensors = work.as_tensors(work.run())
                if contestants[name].same_numbers and (words := problem.disagreement(tensors)):
                    entries[name] = {"skipped": f"computes something else: {words}"}
                else:
                    ready[name] = work
                    # How exact they are is of interest where everything is float32.
                    is_exact = case.suite == "accuracy" and contestants[name].same_numbers
                    found = problem.errors_of(tensors) if is_exact else []
                    errors[name] = dict(zip(problem.names(), found, strict=False))
            except Exception as error:  # a contestant that fails is a result like any other
                entries[name] = {"skipped": _failure(error, device)}
        works.update(ready)
        if not ready:
            return entries
        clock = seconds_by_events if device == "cuda" else seconds_by_clock
        samples = interleave(ready, seconds, clock)
        for name, summary in summarise(samples, case.baseline).items():
            entries[name] = {**summary, "errors": errors[name]}
        if case.ours in samples and "flashrnn" in samples:  # for which there is a target too
            pairs = zip(samples["flashrnn"], samples[case.ours], strict=True)
            entries[case.ours]["over_flashrnn"] = median_of([their / our for their, our in pairs])
        return entries

    watch = LoadWatch()
    why_not = {name: c.missing(device) or c.refuses(case) for name, c in contestants.items()}
    prepare = {
        name: lambda c=contestants[name]: c.prepare(problem)
        for name, reason in why_not.items()
        if reason is None
    }
    result: dict[str, Any] = {"contestants": timed(prepare, why_not), "load": watch.read()}
    result["tokens"] = problem.tokens
    if device == "cuda":
        replays = {name: lambda work=work: captured(work) for name, work in works.items()}
        result |= {"graphed": timed(replays, {}), "plans": plans_of(case)}
        gc.collect()  # a graph's memory goes back with it
        return result
    result["threads"] = torch.get_num_threads()
    if case.dtype == "float32" and case.mode != "hvp" and (rate := multiply_add_rate()):
        result["at_peak"] = sum(case.operations(problem.tokens)) / (rate * result["threads"])
    return result


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
        plans[name] = {field: getattr(chosen, field) for field in (*PLAN_FIELDS, "total_us")}
        plans[name]["batch_tiles"] = chosen.geometry["batch_tiles"]
    return plans
