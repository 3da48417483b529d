"""What is to hold, and whether it does."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import accuracy, memory
from benchmarks.cases import BASELINE, Case
from benchmarks.reading import (
    Results,
    Table,
    Timing,
    number,
    ratio_of,
    seconds_of,
    shape_text,
    target_of,
    timings_of,
    title_of,
)
from benchmarks.tables_grid import SLOWER, is_slower

WITHIN = 0.9
"""Share of a target that counts as reaching it."""


def gate_table(found: Results) -> Table:
    """Return what is to hold, and whether it does."""
    makers = {
        "table": [_targets_gate, _possible_targets_gate, _ahead_gate],
        "grid": [_grid_gate],
        "accuracy": [_accuracy_gate],
        "memory": [_memory_gate],
    }
    checks = [maker(found) for suite in found["suites"] for maker in makers.get(suite, [])]
    rows = [
        (what, "yes" if not failures else "NO", _words(failures, count))
        for what, failures, count in checks
        if count
    ]
    return Table("Gates", ("what is to hold", "holds", ""), rows)


def _words(failures: Sequence[str], count: int) -> str:
    if not failures:
        return f"all {count}"
    shown = "; ".join(failures[:8]) + ("; ..." if len(failures) > 8 else "")
    return f"{len(failures)} of {count} do not: {shown}"


_Check = tuple[str, list[str], int]


def _name(case: Case, timing: Timing) -> str:
    return f"({shape_text(case)}) {case.mode} {timing['threads']}t"


def _targets_gate(found: Results) -> _Check:
    return _targets_check(found, f"targets reached within {1 - WITHIN:.0%}")


def _possible_targets_gate(found: Results) -> _Check:
    what = "the same of those that this machine's multiply-adds alone leave time for"
    return _targets_check(found, what, only_possible=True)


def _targets_check(found: Results, what: str, *, only_possible: bool = False) -> _Check:
    failures, count = [], 0
    for case, timing in timings_of(found, "table"):
        target, ratio = target_of(case, timing["threads"]), ratio_of(timing)
        if target is None or ratio is None:
            continue
        if only_possible and not _is_possible(timing, target):
            continue
        count += 1
        if ratio < WITHIN * target:
            failures.append(f"{_name(case, timing)} {number(ratio)} for {number(target)}")
    return what, failures, count


def _is_possible(timing: Timing, target: float) -> bool:
    """Whether the multiply-adds at the machine's best rate take less than the target allows.

    True where nothing is known of that rate. A target is a ratio that another machine reached: one
    with twice as many multiply-adds a cycle, or a torch.nn.RNN with more to do beside them.
    """
    unit, floor = seconds_of(timing, BASELINE), timing.get("floor")
    if unit is None or floor is None:
        return True
    return floor["at_peak"] <= unit / (WITHIN * target)


def _ahead_gate(found: Results) -> _Check:
    failures, count = [], 0
    for case, timing in timings_of(found, "table"):
        ours = ratio_of(timing)
        if ours is None:
            continue
        count += 1
        ahead = [
            f"{title_of(found, name)} {number(ratio)}"
            for name in timing["contestants"]
            if (ratio := ratio_of(timing, name)) is not None and ratio > ours
        ]
        if ahead:
            failures.append(f"{_name(case, timing)} {number(ours)} behind {', '.join(ahead)}")
    return "ahead of every peer that could be timed", failures, count


def _grid_gate(found: Results) -> _Check:
    timings = timings_of(found, "grid")
    failures = [
        f"{_name(case, timing)} {number(ratio_of(timing))}"
        for case, timing in timings
        if is_slower(timing)
    ]
    what = f"on the grid no slower than torch.nn.RNN by more than {1 - SLOWER:.0%}"
    return what, failures, len(timings)


def _accuracy_gate(found: Results) -> _Check:
    failures = [
        f"{result['case']['name']} ({', '.join(str(result['case'][size]) for size in 'TBIH')})"
        for result in found["accuracy"]
        if not result.get("passed")
    ]
    what = f"errors at most {accuracy.GATE:.0e} wherever torch.nn.RNN's are"
    return what, failures, len(found["accuracy"])


def _memory_gate(found: Results) -> _Check:
    gated = [
        point
        for point in found["memory"]
        if point["contestant"] == "fused_rnn"
        and point["case"]["mode"] == "train"
        and memory.unit(Case.from_json(point["case"])) >= memory.GATE_FROM
    ]
    what = f"peak memory of a training step at most {memory.GATE} x T*B*H*4 bytes"
    return what, memory.gate_failures(gated), len(gated)
