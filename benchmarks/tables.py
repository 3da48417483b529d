"""Results as tables, in plain text and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import BASELINE, OURS, SUITES, TITLES, Case, target_of
from benchmarks.quality import memory_unit
from benchmarks.timing import geometric_mean

Results = Mapping[str, Any]
Timing = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells as text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def text(self, width: int = 150) -> str:
        """Return plain text, its lines cut to the width."""
        rows = [self.columns, *self.rows]
        sizes = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        lines = [
            "  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        lines = [line if len(line) <= width else f"{line[: width - 3]}..." for line in lines]
        return "\n".join([self.title, *lines, *filter(None, [self.note])])

    def markdown(self) -> str:
        """Return a section of a page."""
        rows = [self.columns, ["---"] * len(self.columns), *self.rows]
        lines = [f"| {' | '.join(map(escaped, row))} |" for row in rows]
        note = [escaped(self.note), ""] if self.note else []
        return "\n".join([f"## {self.title}", "", *lines, "", *note])


def escaped(text: str) -> str:
    """Return text in which Markdown sees no table and no emphasis."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("\n", " ")


# ---- reading -------------------------------------------------------------------------------------


def timings_of(results: Results, *suites: str) -> list[tuple[Case, Timing]]:
    """Return the timings of some suites or all, by case and threads, without those that failed."""
    pairs = [(Case.from_json(t["case"]), t) for t in results["timings"] if "failed" not in t]
    pairs = [(case, t) for case, t in pairs if not suites or case.suite in suites]
    order = {case: index for index, (case, _) in reversed(list(enumerate(pairs)))}
    return sorted(pairs, key=lambda pair: (order[pair[0]], pair[1].get("threads") or 0))


def seconds_of(timing: Timing, name: str, launch: str = "contestants") -> float | None:
    """Return the median time of a contestant, or None if it was not timed."""
    return timing.get(launch, {}).get(name, {}).get("seconds", {}).get("median")


def ratio_of(timing: Timing, name: str, launch: str = "contestants") -> float | None:
    """Return the median of the baseline's time over the contestant's, or None."""
    return timing.get(launch, {}).get(name, {}).get("ratio", {}).get("median")


def over_floor(results: Results, case: Case, timing: Timing) -> float | None:
    """Return our time over the floor, in a graph where there is one; None where there is none."""
    floor = ((results.get("floor") or {}).get("cases") or {}).get(case.name)
    ours = seconds_of(timing, case.ours, "graphed") or seconds_of(timing, case.ours)
    return ours / floor["seconds"] if floor and ours else None


def _over_best(timings: Sequence[tuple[Case, Timing]], case: Case, timing: Timing) -> float | None:
    """Return the ratio to the baseline at the number of threads at which that is fastest."""
    ours = seconds_of(timing, case.ours)
    units = [seconds_of(t, case.baseline) for other, t in timings if other == case]
    known = [seconds for seconds in units if seconds]
    return min(known) / ours if ours and len(known) > 1 else None


def _token_cost(case: Case, timing: Timing) -> float | None:
    """Return the time of a step of a sample over that of the dense sequence."""
    packed, dense = seconds_of(timing, OURS), seconds_of(timing, "fused_rnn_dense")
    if packed is None or dense is None:
        return None
    return (packed / timing["tokens"]) / (dense / (case.T * case.B))


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


def duration(seconds: float | None) -> str:
    """Return a time with its unit, "-" for None."""
    if seconds is None:
        return "-"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{number(seconds * factor)} {unit}"
    return f"{number(seconds * 1e6)} us"


def spread_of(summary: Mapping[str, float] | None) -> str:
    """Return a median and its interval; results before 2026-11-29 have quartiles in its place."""
    if not summary:
        return "-"
    low, high = (summary.get(a, summary.get(b)) for a, b in (("low", "q1"), ("high", "q3")))
    return f"{number(summary['median'])} ({number(low)} to {number(high)})"


def _plan_cells(case: Case, timing: Timing) -> tuple[str, str]:
    """Return the plans of all passes in a word or two, such as ``cluster 8``, and their time."""
    plans = timing.get("plans")
    if not isinstance(plans, Mapping):
        return "-", "-"
    words = []
    for plan in plans.values():
        several = plan["residency"] in ("cluster", "grid")
        words.append(f"{plan['residency']} {plan['blocks']}" if several else plan["residency"])
    seconds = 1e-6 * case.num_layers * sum(plan["total_us"] for plan in plans.values())
    return " / ".join(dict.fromkeys(words)), duration(seconds)


# ---- times ---------------------------------------------------------------------------------------


def speed_table(results: Results, suite: str) -> Table:
    """Return everything that is known of the times of a suite; columns without a number go."""
    timings = timings_of(results, suite)
    titles = {name: about["title"] for name, about in results["contestants"].items()}
    rows: list[dict[str, str]] = []
    for case, timing in timings:
        ours, peak = seconds_of(timing, case.ours), timing.get("at_peak")
        plan, planned = _plan_cells(case, timing)
        others = [n for n in case.contestants if n not in (case.ours, case.baseline)]
        rows.append(
            {
                "T, B, I, H": case.shape_text,
                "": case.label,
                "mode": case.mode,
                "threads": str(timing.get("threads") or "-"),
                titles[case.baseline]: duration(seconds_of(timing, case.baseline)),
                titles[case.ours]: duration(ours),
                "a step": duration(ours and ours / case.T),
                "ratio": spread_of(timing["contestants"].get(case.ours, {}).get("ratio")),
                "target": number(target_of(case, timing.get("threads"))),
                "over torch's best": number(_over_best(timings, case, timing)),
                "share of peak": number(peak / ours if ours and peak else None),
                "cost of a token": number(_token_cost(case, timing)),
                "in graphs": number(ratio_of(timing, case.ours, "graphed")),
                "time / floor": number(over_floor(results, case, timing)),
                "plan": plan,
                "planned": planned,
                **{f"{titles[name]}'s ratio": number(ratio_of(timing, name)) for name in others},
            }
        )
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [c for c in columns if any(row.get(c, "-") not in ("-", "") for row in rows)]
    return Table(TITLES[suite], columns, [[row.get(c, "-") for c in columns] for row in rows])


def summary_table(results: Results) -> Table:
    """Return a line for each suite, mode and number of threads."""
    groups: dict[tuple[str, str, str], list[tuple[float, Case]]] = {}
    for case, timing in timings_of(results):
        ratio = ratio_of(timing, case.ours)
        if ratio is not None:
            key = case.suite, case.mode, str(timing.get("threads") or "-")
            groups.setdefault(key, []).append((ratio, case))
    rows = []
    for key, pairs in groups.items():
        ratios = [ratio for ratio, _ in pairs]
        least, worst = min(pairs, key=lambda pair: pair[0])
        where = f"({worst.shape_text}) {worst.label}".strip()
        numbers = map(number, (geometric_mean(ratios), max(ratios), least))
        rows.append((*key, str(len(pairs)), *numbers, where))
    columns = ("suite", "mode", "threads", "cases", "geometric mean", "greatest", "least", "where")
    return Table("Ratios, by suite", columns, rows)


# ---- errors and memory ---------------------------------------------------------------------------


def accuracy_table(results: Results) -> Table:
    """Return the errors of FusedRNN and torch.nn.RNN."""

    def cell(errors: Mapping[str, float | None], quantity: str) -> str:
        if quantity not in errors:
            return "-"
        error = errors[quantity]
        return "inf" if error is None else f"{error:.1e}" if error else "0"

    quantities = list(
        dict.fromkeys(q for result in results["accuracy"] for q in result["errors"][OURS])
    )
    rows = []
    for result in results["accuracy"]:
        case, errors = result["case"], result["errors"]
        cells = [f"{cell(errors[OURS], q)} / {cell(errors[BASELINE], q)}" for q in quantities]
        shape = ", ".join(str(case[size]) for size in "TBIH")
        rows.append((case["name"], shape, *cells, "yes" if result["passed"] else "NO"))
    columns = ("data", "T, B, I, H", *quantities, "gate")
    note = (
        "Float32, |difference| / |exact| over the whole tensor: of the output, then of gradients. "
        "inf: not finite, or not zero where the exact answer is."
    )
    return Table("Errors against float64, FusedRNN / torch.nn.RNN", columns, rows, note)


def memory_table(results: Results) -> Table:
    """Return the peak memory of a training step and of a Hessian-vector product."""
    by_case: dict[tuple[Case, int], dict[str, str]] = {}
    for point in results["memory"]:
        case, text = Case.from_json(point["case"]), "failed"
        if "bytes" in point:
            units = number(point["bytes"] / memory_unit(case))
            text = f"{number(point['bytes'] / 2**20)} ({units})"
        by_case.setdefault((case, point["threads"]), {})[point["contestant"]] = text
    names = list(dict.fromkeys(point["contestant"] for point in results["memory"]))
    rows = [
        (case.shape_text, case.mode, str(threads), *(cells.get(name, "-") for name in names))
        for (case, threads), cells in by_case.items()
    ]
    titles = [results["contestants"][name]["title"] for name in names]
    note = (
        "MiB by which the resident size of a fresh process grows at its peak, and in brackets in "
        "sequences of states, T*B*H*4 bytes."
    )
    return Table("Peak memory", ("T, B, I, H", "mode", "threads", *titles), rows, note)


# ---- everything ----------------------------------------------------------------------------------


def stage_table(results: Results) -> Table:
    """Return what became of each stage of a run on a GPU."""
    rows = []
    for stage in results.get("stages", []):
        failed = stage["status"] == "failed" and stage["required"]
        verdict = "FAILED" if failed else stage["status"]
        rows.append((stage["name"], verdict, f"{stage['seconds']:.0f}", stage["note"]))
    return Table("Stages", ("stage", "verdict", "s", ""), rows)


def not_timed_table(results: Results) -> Table:
    """Return who was not timed, and why; each reason once, with one of its cases."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for timing in results["timings"]:
        name = Case.from_json(timing["case"]).name
        if "failed" in timing:
            reasons.setdefault(("everyone", timing["failed"]), []).append(name)
        for launch, words in (("contestants", ""), ("graphed", ", in a graph")):
            for contestant, entry in timing.get(launch, {}).items():
                if "skipped" in entry:
                    who = results["contestants"][contestant]["title"] + words
                    reasons.setdefault((who, str(entry["skipped"])), []).append(name)
    for name in results["unmeasured"]:
        reasons.setdefault(("everyone", "no time was left"), []).append(name)
    for about in results["contestants"].values():
        if about["missing"]:
            reasons[about["title"], about["missing"]] = ["any case"]
    rows = [(who, why, str(len(names)), names[0]) for (who, why), names in reasons.items()]
    return Table("Not timed", ("who", "why", "cases", "such as"), rows)


def tables_of(results: Results) -> list[Table]:
    """Return every table that has a row, but for the gates."""
    suites = {case.suite for case, _ in timings_of(results)}
    order = [name for device in ("cpu", "cuda") for name in SUITES[device] if name in suites]
    tables = [
        *(stage_table(results), summary_table(results)),
        *(speed_table(results, suite) for suite in order),
        *(accuracy_table(results), memory_table(results), not_timed_table(results)),
    ]
    return [table for table in tables if table.rows]
