"""Reading results: what a table or a figure asks of them, and numbers as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import BASELINE, TARGETS, Case

Results = Mapping[str, Any]
Timing = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells as text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def timings_of(found: Results, suite: str) -> list[tuple[Case, Timing]]:
    """Return the suite's timings, by case and then threads, without those that failed."""
    pairs = [
        (Case.from_json(timing["case"]), timing)
        for timing in found["timings"]
        if timing["case"]["suite"] == suite and "failed" not in timing
    ]
    order = {case: index for index, case in reversed(list(enumerate(case for case, _ in pairs)))}
    return sorted(pairs, key=lambda pair: (order[pair[0]], pair[1]["threads"]))


def seconds_of(timing: Timing, contestant: str) -> float | None:
    """Return the median time of a contestant, or None if it was not timed."""
    summary = timing["contestants"].get(contestant, {})
    return summary["seconds"]["median"] if "seconds" in summary else None


def ratio_of(timing: Timing, contestant: str = "fused_rnn") -> float | None:
    """Return the median of the baseline's time over the contestant's, or None."""
    ratio = timing["contestants"].get(contestant, {}).get("ratio")
    return ratio["median"] if ratio else None


def over_best(found: Results, case: Case, timing: Timing) -> float | None:
    """Return the ratio to torch.nn.RNN at the number of threads at which that is fastest."""
    ours = seconds_of(timing, "fused_rnn")
    torch_times = [
        seconds
        for other, at_threads in timings_of(found, case.suite)
        if other == case and (seconds := seconds_of(at_threads, BASELINE)) is not None
    ]
    return min(torch_times) / ours if ours is not None and torch_times else None


def target_of(case: Case, threads: int) -> float | None:
    """Return the ratio to be reached, or None where there is no target."""
    by_mode = TARGETS.get(case.shape, {}).get(case.mode)
    return by_mode[threads - 1] if by_mode and threads <= len(by_mode) else None


def title_of(found: Results, contestant: str) -> str:
    """Return a contestant's name for people."""
    return found["peers"][contestant]["title"]


def skipped(timings: Iterable[tuple[Case, Timing]], found: Results) -> str:
    """Say which of the suite's contestants were not timed, and why."""
    reasons: dict[str, list[str]] = {}
    for case, timing in timings:
        for name in case.contestants:
            known = reasons.setdefault(name, [])
            why = found["peers"][name]["missing"]
            why = why or timing["contestants"].get(name, {}).get("skipped")
            if why and why not in known:
                known.append(why)
    parts = [f"{title_of(found, name)}: {'; '.join(why)}" for name, why in reasons.items() if why]
    return f"Not timed: {'. '.join(parts)}." if parts else ""


# ---- cells ---------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with this many significant digits, "-" for None."""
    if value is None:
        return "-"
    if 0 < abs(value) < 0.1:
        return f"{value:.{digits - 1}g}"
    decimals = 0
    while decimals < digits - 1 and abs(value) < 10 ** (digits - 1 - decimals):
        decimals += 1
    return f"{value:.{decimals}f}"


def milliseconds(seconds: float | None) -> str:
    """Return a time in milliseconds."""
    return number(None if seconds is None else 1e3 * seconds)


def microseconds(seconds: float | None) -> str:
    """Return a time in microseconds."""
    return number(None if seconds is None else 1e6 * seconds)


def with_quartiles(timing: Timing, contestant: str = "fused_rnn") -> str:
    """Return the median ratio and its quartiles."""
    ratio = timing["contestants"].get(contestant, {}).get("ratio")
    if ratio is None:
        return "-"
    return f"{number(ratio['median'])} ({number(ratio['q1'])} to {number(ratio['q3'])})"


def shape_text(case: Case) -> str:
    """Return the four sizes, by commas."""
    return ", ".join(map(str, case.shape))


def threads_text(number_of: int) -> str:
    """Return the number and the word, in the singular for one."""
    return "1 thread" if number_of == 1 else f"{number_of} threads"
