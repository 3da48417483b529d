"""What must hold, and whether it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.cases import OURS, Case, target_of
from benchmarks.quality import ERROR_GATE, MEMORY_GATE, MEMORY_GATE_FROM, memory_unit
from benchmarks.tables import (
    Table,
    Timing,
    duration,
    number,
    over_floor,
    ratio_of,
    seconds_of,
    timings_of,
)
from benchmarks.timing import geometric_mean

WITHIN = 0.9
"""Share of a CPU's target that counts as reaching it: another machine's prototype set it."""

SLOWER, TINY = 0.98, 50e-6
"""On a CPU, a ratio below it is slower than torch.nn.RNN, but where both take so few seconds."""

GRID_MEAN, FLASHRNN_TARGET, FLOOR_TARGET = 3.0, 2.0, 2.0
"""On a GPU: geometric mean of the grid's ratios, ratio to FlashRNN, most times the floor."""

Check = tuple[str, str, float | None, bool]
"""The gate, what it is checked on, the number (None: nothing to check), whether it holds."""


def gate_table(results: Mapping[str, Any]) -> Table:
    """Return every gate that there are results for."""
    gates: dict[str, list[str | None]] = {}
    checks = [] if results["quick"] else [*_checks_of_times(results), *_other_checks(results)]
    for gate, name, value, holds in checks:
        if value is not None:
            gates.setdefault(gate, []).append(None if holds else f"{name}: {number(value)}")
    rows = []
    for gate, outcomes in gates.items():
        failures = [outcome for outcome in outcomes if outcome]
        words = f"{len(failures)} of {len(outcomes)} do not: {'; '.join(failures[:8])}"
        words += "; ..." if len(failures) > 8 else ""
        rows.append((gate, *(("NO", words) if failures else ("yes", f"all {len(outcomes)}"))))
    if rows and results["unmeasured"]:
        rows.append(("everything measured", "NO", f"{len(results['unmeasured'])} cases were not"))
    return Table("Gates", ("what must hold", "holds", ""), rows)


def _checks_of_times(results: Mapping[str, Any]) -> Iterator[Check]:
    on_gpu = results["device"] == "cuda"
    within, grid = 1.0 if on_gpu else WITHIN, []
    for case, timing in timings_of(results):
        ratio, found = ratio_of(timing, case.ours), timing["contestants"]
        if ratio is None:
            continue
        name = f"{case.name} {timing.get('threads') or ''}".strip()
        if target := target_of(case, timing.get("threads")):
            share = ratio / target
            yield f"ratio / target at least {within:g}", name, share, share >= within
        if case.suite == "table":
            best = max(ratio_of(timing, other) or 0.0 for other in found if other != case.ours)
            yield "ahead of everyone that was timed", name, ratio / best, ratio >= best
        if on_gpu:
            yield "no ratio below 1", name, ratio, ratio >= 1
        elif case.suite == "grid":
            gate = f"no ratio of the grid below {SLOWER}, from {duration(TINY)} on"
            yield gate, name, ratio, not is_slower(case, timing)
        over_flashrnn = found[case.ours].get("over_flashrnn", {}).get("median")
        gate = f"at least {FLASHRNN_TARGET:g} times as fast as FlashRNN"
        yield gate, name, over_flashrnn, (over_flashrnn or 0) >= FLASHRNN_TARGET
        times = over_floor(results, case, timing)
        yield f"within {FLOOR_TARGET:g} times the floor", name, times, (times or 0) <= FLOOR_TARGET
        grid += [ratio] if case.suite == "gpu_grid" else []
    mean = geometric_mean(grid) if grid else None
    gate = f"geometric mean of the grid at least {GRID_MEAN:g}"
    yield gate, "it is", mean, (mean or 0) >= GRID_MEAN


def _other_checks(results: Mapping[str, Any]) -> Iterator[Check]:
    for result in results["accuracy"]:
        errors = [float("inf") if e is None else e for e in result["errors"][OURS].values()]
        gate = f"errors at most {ERROR_GATE:.0e} wherever torch.nn.RNN's are"
        yield gate, result["case"]["name"], max(errors), result["passed"]
    for point in results["memory"]:
        case = Case.from_json(point["case"])
        counts = point["contestant"] == OURS and case.mode == "train"
        if counts and memory_unit(case) >= MEMORY_GATE_FROM:
            units = point.get("bytes", float("inf")) / memory_unit(case)
            gate = f"peak memory of a training step at most {MEMORY_GATE} x T*B*H*4 bytes"
            yield gate, f"T = {case.T}, {point['threads']} threads", units, units <= MEMORY_GATE


def is_slower(case: Case, timing: Timing) -> bool:
    """Return whether ours is slower than the baseline where that matters, on a CPU."""
    ratio = ratio_of(timing, case.ours) or float("inf")
    times = [seconds_of(timing, name) or 0.0 for name in (case.ours, case.baseline)]
    return ratio < SLOWER and max(times) >= TINY
