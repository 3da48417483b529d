"""The file of results, and what is made of it: tables, a page, a figure.

    python -m benchmarks.tables FOLDER     # results.md and the figure, from FOLDER/results.json

A file is one JSON object, written whole or not at all:

    complete, quick            false while a run goes on; tiny sizes
    command, device            what was asked for
    machine, contestants       where, who, and ``backend``: what our layers ran on
    timings, unmeasured        one entry for each case and number of threads; how many are left
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import BASELINE, OURS, SUITES, TITLES, Case, target_of
from benchmarks.quality import memory_unit

Results = Mapping[str, Any]
Timing = Mapping[str, Any]

FILE, PAGE = "results.json", "results.md"

BUSY_CORES = 0.1
"""More than this many cores used by others on average, and a measurement is called disturbed."""


def empty_results(**fields: Any) -> dict[str, Any]:
    """Return the results of a run that has measured nothing yet."""
    return {"complete": False, **fields, "timings": [], "unmeasured": 0}


def save(results: Results, folder: Path) -> None:
    """Write the results into a folder: strict JSON, six digits, a line for each measurement."""
    rounded = json.loads(
        json.dumps(results),
        parse_float=lambda digits: float(f"{float(digits):.6g}"),
        parse_constant=lambda _: None,  # an infinity or not a number
    )
    fields = []
    for key, value in rounded.items():
        lines = value if isinstance(value, list) and any(isinstance(v, dict) for v in value) else []
        text = "[\n" + ",\n".join(map(json.dumps, lines)) + "\n]" if lines else json.dumps(value)
        fields.append(f"{json.dumps(key)}: {text}")
    temporary = folder / f".{FILE}.{os.getpid()}"
    temporary.write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")
    os.replace(temporary, folder / FILE)


def load(folder: Path) -> dict[str, Any]:
    """Read the results in a folder."""
    return json.loads((folder / FILE).read_text(encoding="utf-8"))


# ---- text ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Cells as text; prints as Markdown."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __str__(self) -> str:
        rows = [[cell.replace("|", "/") for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
        widths[-1] = 3  # the last cell of a row may be long
        rows.insert(1, ["-" * width for width in widths])
        lines = [" | ".join(map(str.ljust, row, widths)) for row in rows]
        text = "\n".join(f"| {line} |" for line in lines)
        return "\n\n".join(filter(None, [f"## {self.title}", text, self.note]))


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with this many significant digits, "-" for None."""
    if value is None:
        return "-"
    if 0 < abs(value) < 0.1:
        return f"{value:.{digits - 1}g}"
    before_point = len(str(int(abs(value)))) if abs(value) < float("inf") else digits
    return f"{value:.{max(0, digits - before_point)}f}"


def duration(seconds: float | None) -> str:
    """Return a time with its unit, "-" for None."""
    if seconds is None:
        return "-"
    unit, factor = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    return f"{number(seconds * factor)} {unit}"


def spread_of(summary: Mapping[str, float] | None) -> str:
    """Return a median and its interval; results before 2026-11-29 have quartiles in its place."""
    if not summary:
        return "-"
    low, high = (summary.get(a, summary.get(b)) for a, b in (("low", "q1"), ("high", "q3")))
    return f"{number(summary['median'])} ({number(low)} to {number(high)})"


# ---- reading -------------------------------------------------------------------------------------


def timings_of(results: Results, *suites: str) -> list[tuple[Case, Timing]]:
    """Return the timings of some suites or all, by case and threads, without those that failed."""
    pairs = [(Case.from_json(t["case"]), t) for t in results["timings"] if "failed" not in t]
    pairs = [(case, t) for case, t in pairs if not suites or case.suite in suites]
    order = {case: index for index, (case, _) in reversed(list(enumerate(pairs)))}
    return sorted(pairs, key=lambda pair: (order[pair[0]], pair[1].get("threads", 0)))


def ratio_of(timing: Timing, name: str) -> float | None:
    """Return the median of the baseline's time over the contestant's, or None."""
    return timing["contestants"].get(name, {}).get("ratio", {}).get("median")


def errors_in(timing: Timing) -> tuple[dict[str, float], dict[str, float]]:
    """Return the errors of FusedRNN and torch.nn.RNN, by name of the result."""
    found = [timing["contestants"].get(name, {}).get("errors", {}) for name in (OURS, BASELINE)]
    ours, torchs = ({q: float("inf") if e is None else e for q, e in f.items()} for f in found)
    return ours, torchs


# ---- tables --------------------------------------------------------------------------------------


def suite_table(results: Results, suite: str) -> Table:
    """Return everything that is known of a suite; columns without a value go."""
    titles = {name: about["title"] for name, about in results["contestants"].items()}
    cells_of = {"memory": _memory_cells, "accuracy": _error_cells}.get(suite, _speed_cells)
    rows = [
        {
            "T, B, I, H": ", ".join(map(str, case.shape)),
            "": case.label,
            "mode": case.mode,
            "threads": str(timing.get("threads", "-")),
            **cells_of(case, timing, titles),
        }
        for case, timing in timings_of(results, suite)
    ]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [c for c in columns if any(row.get(c, "-") not in ("-", "") for row in rows)]
    cells = [[row.get(c, "-") for c in columns] for row in rows]
    return Table(TITLES[suite], columns, cells, _NOTES.get(suite, ""))


def _speed_cells(case: Case, timing: Timing, titles: Mapping[str, str]) -> dict[str, str]:
    entries, peak, plans = timing["contestants"], timing.get("at_peak"), timing.get("plans")
    seconds = {
        name: entry["seconds"]["median"] for name, entry in entries.items() if "seconds" in entry
    }
    ours, dense = seconds.get(case.ours), seconds.get("fused_rnn_dense")
    dense_tokens = case.T * case.B / timing["tokens"]
    cells = {
        "baseline": duration(seconds.get(case.baseline)),
        "ours": duration(ours),
        "a step": duration(ours and ours / case.T),
        "ratio": spread_of(entries.get(case.ours, {}).get("ratio")),
        "target": number(target_of(case, timing.get("threads"))),
        "share of peak": number(peak / ours if ours and peak else None),
        "cost of a token": number(ours / dense * dense_tokens if ours and dense else None),
    }
    if isinstance(plans, Mapping):
        cells |= {"plan": plans["words"], "planned": duration(plans["seconds"])}
    others = case.contestants[2:]
    return cells | {f"{titles[name]}'s ratio": number(ratio_of(timing, name)) for name in others}


def _memory_cells(case: Case, timing: Timing, titles: Mapping[str, str]) -> dict[str, str]:
    peaks = {name: entry.get("bytes") for name, entry in timing["contestants"].items()}
    return {
        titles[name]: f"{number(peak / 2**20)} ({number(peak / memory_unit(case))})"
        for name, peak in peaks.items()
        if peak is not None
    }


def _error_cells(case: Case, timing: Timing, titles: Mapping[str, str]) -> dict[str, str]:
    ours, torchs = errors_in(timing)
    return {name: f"{ours[name]:.1e} / {torchs[name]:.1e}" for name in ours}


_NOTES = {
    "memory": "MiB by which the resident size of a fresh process grows at its peak, and in "
    "brackets in sequences of states, 4 T B H bytes.",
    "accuracy": "FusedRNN / torch.nn.RNN, float32, |difference| / |exact| over the whole tensor: "
    "of the output, then of gradients. inf: not finite, or not zero where the exact answer is.",
}


def summary_table(results: Results) -> Table:
    """Return a line for each suite, cell, mode and number of threads."""
    groups: dict[tuple[str, ...], dict[Case, float]] = {}
    for case, timing in timings_of(results):
        if ratio := ratio_of(timing, case.ours):
            key = case.suite, case.cell, case.mode, str(timing.get("threads", "-"))
            groups.setdefault(key, {})[case] = ratio
    rows = []
    for key, ratios in groups.items():
        values, worst = ratios.values(), min(ratios, key=lambda case: ratios[case])
        numbers = map(number, (statistics.geometric_mean(values), max(values), min(values)))
        rows.append((*key, str(len(ratios)), *numbers, f"{worst.shape} {worst.label}"))
    columns = ("suite", "cell", "mode", "threads", "cases", "geometric mean", "greatest", "least")
    return Table("Ratios, by suite", (*columns, "where"), rows)


MOST_UNITS, MOST_ERROR = 1.2, 2e-6
"""Sequences of states that a training step of FusedRNN may hold at its peak; what it may err by
wherever torch.nn.RNN itself does not err by more."""


def shortfall_table(results: Results) -> Table:
    """Return every case in which our layer is slower, larger or less exact than is claimed.

    Slower is what has its whole interval below 1.
    """
    rows = [
        (case.name, str(timing.get("threads", "-")), words)
        for case, timing in timings_of(results)
        for words in _shortfalls(case, timing)
    ]
    return Table("Slower, larger or less exact than it should be", ("case", "threads", ""), rows)


def _shortfalls(case: Case, timing: Timing) -> Iterator[str]:
    ours = timing["contestants"].get(case.ours, {})
    if ours.get("ratio", {}).get("high", 1) < 1:
        yield f"ratio {spread_of(ours['ratio'])}, {duration(ours['seconds']['median'])}"
    # Below 32 MiB, most memory does not grow with T.
    if case.suite == "memory" and memory_unit(case) >= 32 * 2**20:
        units = timing["contestants"].get(OURS, {}).get("bytes", 0) / memory_unit(case)
        yield from [f"{number(units)} sequences of states"] if units > MOST_UNITS else []
    errors, torchs = errors_in(timing)
    wrong = {q: e for q, e in errors.items() if torchs[q] <= MOST_ERROR < e}
    yield from [f"{name} errs by {error:.1e}" for name, error in wrong.items()]


def tables_of(results: Results) -> list[Table]:
    """Return every table that has rows."""
    suites = {case.suite for case, _ in timings_of(results)}
    order = [name for device in SUITES for name in SUITES[device] if name in suites]
    tables = [summary_table(results), shortfall_table(results)]
    return [table for table in [*tables, *(suite_table(results, s) for s in order)] if table.rows]


# ---- for people ----------------------------------------------------------------------------------

_LEGEND = """\
A ratio is the baseline's time over another's, so above 1 is faster than the baseline: the median
over rounds in which all ran in turn in one process, with the interval that holds the true median
with 95 % confidence (before 2026-11-29: the quartiles). dtype, TF32 setting and number of threads,
each bound to a core, are the same for all. Forward passes are without gradients; a training step is
the forward pass and the gradients of all parameters, of the input too where I >= 64. The baseline
is torch's layer; of cells, a loop over torch's cell; of leaky units, FusedRNN of the same sizes.

Target: what a prototype reached on two cores with AVX-512; on a GPU, what is to be reached. Share
of peak: of the multiply-adds that as many cores can do from register to register. Cost of a token:
a time step of a sample of a packed sequence over one of the dense sequence. Planned: the planner's
estimate. An LSTM has four times the recurrent weights, a GRU three times."""


def render(folder: Path) -> None:
    """Print tables, draw the figure where matplotlib is installed, write the page."""
    results = load(folder)
    print("\n\n".join(map(str, tables_of(results))))
    print("".join(f"\nnote: {warning}" for warning in warnings_of(results)))
    figures = []
    if importlib.util.find_spec("matplotlib"):
        from benchmarks.figures import draw

        figures = draw(results, folder)
    (folder / PAGE).write_text(page_of(results, figures), encoding="utf-8")
    print(f"written: {folder}")


def page_of(results: Results, figures: Iterable[str] = ()) -> str:
    """Return the whole report as Markdown; figures are names of bitmaps beside it."""
    about, contestants = results["machine"], results["contestants"].values()
    facts = [f"{name} {value}" for name, value in about.items() if value is not None]
    facts += [f"{c['title']} {c['version']}" for c in contestants if c["version"]]
    parts = [
        f"<!-- Generated by `{results['command'].partition(' --')[0]}`; do not edit. -->",
        f"# Measured speed, accuracy and memory: {about.get('card') or about['cpu']}",
        f"{', '.join(facts)}. FusedRNN's backend: {results['backend']}.",
        f"    {results['command']}",
        _LEGEND,
        *(f"> **Note:** {warning}" for warning in warnings_of(results)),
        *(f"![{name}]({name})" for name in figures),
        *map(str, tables_of(results)),
    ]
    return "\n\n".join(parts) + "\n"


def warnings_of(results: Results) -> list[str]:
    """Return what a reader must know before believing the numbers."""
    lines = []
    if not results["complete"]:
        lines.append("the run was ended before it finished: this is what there was until then")
    if results["unmeasured"]:
        lines.append(f"{results['unmeasured']} cases were not measured")
    if results["quick"]:
        lines.append("a run of tiny sizes: it shows that everything runs, not how fast")
    if results["backend"] != "native":
        lines.append(f"FusedRNN ran on the {results['backend']}, not on its kernels")
    loads = [timing.get("load", 0.0) for timing in results["timings"]]
    if busy := [load for load in loads if load > BUSY_CORES]:
        where = f"in {len(busy)} of {len(loads)} measurements"
        lines.append(f"{where} others used more than {BUSY_CORES} cores (up to {max(busy):.2f})")
    return lines


if __name__ == "__main__":
    render(Path(sys.argv[1]))
