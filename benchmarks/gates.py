"""What must hold, and whether it does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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

Check = tuple[str, float | None, bool]
"""What for, the number, and whether it holds; without a number there is nothing to hold."""


def gate_table(results: Mapping[str, Any]) -> Table:
    """Return every gate that there are results for."""
    rows = []
    for what, checks in () if results["quick"] else _gates(results):
        checks = [check for check in checks if check[1] is not None]
        failures = [f"{name}: {number(value)}" for name, value, holds in checks if not holds]
        if not checks:
            continue
        words = f"all {len(checks)}"
        if failures:
            more = "; ..." if len(failures) > 8 else ""
            words = f"{len(failures)} of {len(checks)} do not: {'; '.join(failures[:8])}{more}"
        rows.append((what, "NO" if failures else "yes", words))
    if rows and results["unmeasured"]:
        rows.append(("everything measured", "NO", f"{len(results['unmeasured'])} cases were not"))
    return Table("Gates", ("what must hold", "holds", ""), rows)


def _gates(results: Mapping[str, Any]) -> Iterator[tuple[str, Iterable[Check]]]:
    timed = [(c, t, r) for c, t in timings_of(results) if (r := ratio_of(t, c.ours)) is not None]
    names = {id(t): f"{c.name} {t.get('threads') or ''}".strip() for c, t, _ in timed}
    on_gpu = results["device"] == "cuda"
    within = 1.0 if on_gpu else WITHIN
    targets = [(t, r, target_of(c, t.get("threads"))) for c, t, r in timed]
    yield (
        f"ratio / target at least {within:g}",
        [(names[id(t)], r / target, r >= within * target) for t, r, target in targets if target],
    )
    best = [
        (t, r, max(ratio_of(t, name) or 0.0 for name in t["contestants"] if name != c.ours))
        for c, t, r in timed
        if c.suite == "table"
    ]
    yield "ahead of everyone that was timed", [(names[id(t)], r / b, r >= b) for t, r, b in best]
    grid = [each for each in timed if each[0].suite in ("grid", "gpu_grid")]
    yield (
        "no ratio below 1"
        if on_gpu
        else f"no ratio of the grid below {SLOWER}, from {duration(TINY)} on",
        [(names[id(t)], r, not is_slower(c, t)) for c, t, r in (timed if on_gpu else grid)],
    )
    if on_gpu and grid:
        mean = geometric_mean([r for *_, r in grid])
        yield (
            f"geometric mean of the grid at least {GRID_MEAN:g}",
            [("it is", mean, mean >= GRID_MEAN)],
        )
    flash = [
        (t, t["contestants"][c.ours].get("over_flashrnn", {}).get("median")) for c, t, _ in timed
    ]
    yield (
        f"at least {FLASHRNN_TARGET:g} times as fast as FlashRNN",
        [(names[id(t)], r, (r or 0) >= FLASHRNN_TARGET) for t, r in flash],
    )
    floors = [(t, over_floor(results, c, t)) for c, t, _ in timed]
    yield (
        f"within {FLOOR_TARGET:g} times the floor",
        [(names[id(t)], times, (times or 0) <= FLOOR_TARGET) for t, times in floors],
    )
    yield (
        f"errors at most {ERROR_GATE:.0e} wherever torch.nn.RNN's are",
        [
            (r["case"]["name"], _largest(r["errors"][OURS]), r["passed"])
            for r in results["accuracy"]
        ],
    )
    points = [(Case.from_json(p["case"]), p) for p in results["memory"] if p["contestant"] == OURS]
    units = [
        (c, p, p.get("bytes", float("inf")) / memory_unit(c))
        for c, p in points
        if c.mode == "train" and memory_unit(c) >= MEMORY_GATE_FROM
    ]
    yield (
        f"peak memory of a training step at most {MEMORY_GATE} x T*B*H*4 bytes",
        [(f"T = {c.T}, {p['threads']} threads", n, n <= MEMORY_GATE) for c, p, n in units],
    )


def _largest(errors: Mapping[str, float | None]) -> float:
    return max(float("inf") if error is None else error for error in errors.values())


def is_slower(case: Case, timing: Timing) -> bool:
    """Return whether ours is slower than the baseline where that matters."""
    ratio, ours, unit = (
        ratio_of(timing, case.ours) or float("inf"),
        seconds_of(timing, case.ours) or 0.0,
        seconds_of(timing, case.baseline) or 0.0,
    )
    if "graphed" in timing:  # on a GPU
        return ratio < 1
    return ratio < SLOWER and not (ours < TINY and unit < TINY)
