"""Results of a run for people: plain text for a terminal or a log, and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.cases import BASELINE
from benchmarks.gpu.cases import (
    FLASHRNN,
    FLASHRNN_TARGET,
    FLOOR_TARGET,
    GRID_MEAN,
    NEVER_BELOW,
    OURS,
    REGIMES,
    GpuCase,
)
from benchmarks.gpu.floor import over_floor
from benchmarks.gpu.plans import words
from benchmarks.reading import Table, milliseconds, number
from benchmarks.timing import geometric_mean

Results = Mapping[str, Any]
Timing = Mapping[str, Any]


# ---- reading -------------------------------------------------------------------------------------


def timings_of(found: Results, regime: str | None = None) -> list[tuple[GpuCase, Timing]]:
    """Return what was timed, of one regime or of all, without cases that failed."""
    pairs = [(GpuCase.from_json(t["case"]), t) for t in found["timings"] if "failed" not in t]
    return [(case, t) for case, t in pairs if regime in (None, case.regime)]


def ratio_of(timing: Timing, launch: str = "eager") -> float | None:
    """Return the median of torch.nn.RNN's time over ours, or None."""
    ratio = timing[launch].get(OURS, {}).get("ratio")
    return ratio["median"] if ratio else None


def flashrnn_ratio_of(timing: Timing) -> float | None:
    """Return the median of FlashRNN's time over ours, or None."""
    ratio = timing["eager"].get(OURS, {}).get("ratio_to", {}).get(FLASHRNN)
    return ratio["median"] if ratio else None


def _seconds(timing: Timing, name: str, launch: str = "eager") -> float | None:
    summary = timing[launch].get(name, {}).get("seconds")
    return summary["median"] if summary else None


# ---- tables --------------------------------------------------------------------------------------


def stage_table(found: Results) -> Table:
    """Return what became of each stage."""
    rows = [
        (stage["name"], _verdict(stage), f"{stage['seconds']:.0f}", stage["note"])
        for stage in found["stages"]
    ]
    return Table("Stages", ("stage", "verdict", "s", ""), rows)


def _verdict(stage: Mapping[str, Any]) -> str:
    if stage["status"] != "failed":
        return stage["status"]
    return "FAILED" if stage["required"] else "failed (a lead)"


def gate_table(found: Results) -> Table:
    """Return what is to hold, and whether it does."""
    rows = []
    rehearsal = (found["machine"] or {}).get("rehearsal", False)
    for what, failures, count in () if rehearsal else _gates(found):
        if count:
            shown = "; ".join(failures[:6]) + ("; ..." if len(failures) > 6 else "")
            text = f"{len(failures)} of {count} do not: {shown}" if failures else f"all {count}"
            rows.append((what, "NO" if failures else "yes", text))
    if rows and found["unmeasured"]:
        rows.append(("everything measured", "NO", f"{len(found['unmeasured'])} cases were not"))
    return Table("Gates", ("what is to hold", "holds", ""), rows)


def _gates(found: Results) -> Iterable[tuple[str, list[str], int]]:
    everything = [
        (case, ratio) for case, t in timings_of(found) if (ratio := ratio_of(t)) is not None
    ]
    with_target = [(case, ratio) for case, ratio in everything if case.target is not None]
    yield (
        "targets reached",
        [
            f"{case.label} {number(ratio)} for {number(case.target)}"
            for case, ratio in with_target
            if case.target is not None and ratio < case.target
        ],
        len(with_target),
    )
    yield (
        f"never below {NEVER_BELOW} of torch.nn.RNN",
        [f"{case.label} {number(ratio)}" for case, ratio in everything if ratio < NEVER_BELOW],
        len(everything),
    )
    grid = [ratio for case, ratio in everything if case.regime == "grid"]
    if grid:
        mean = geometric_mean(grid)
        missed = [f"it is {number(mean)}"] if mean < GRID_MEAN else []
        yield f"geometric mean of the grid at least {GRID_MEAN}", missed, 1
    flash = [(c, r) for c, t in timings_of(found) if (r := flashrnn_ratio_of(t)) is not None]
    yield (
        f"at least {FLASHRNN_TARGET} times FlashRNN",
        [f"{case.label} {number(ratio)}" for case, ratio in flash if ratio < FLASHRNN_TARGET],
        len(flash),
    )
    floors = [
        (case, times)
        for case, t in timings_of(found)
        if (times := over_floor(dict(t), found["floor"])) is not None
    ]
    yield (
        f"within {FLOOR_TARGET} times the floor",
        [f"{case.label} {number(times)}" for case, times in floors if times > FLOOR_TARGET],
        len(floors),
    )


SPEED_COLUMNS = (
    *("T, B, I, H", "dtype", "mode", "torch ms", "ours ms", "ratio", "quartiles", "target", ""),
    *("in graphs", "time / floor", "plan"),
)


def speed_table(found: Results, regime: str) -> Table:
    """Return the ratios of one regime."""
    rows = [_speed_row(case, timing, found) for case, timing in timings_of(found, regime)]
    return Table(f"{regime}: {REGIMES[regime]}", SPEED_COLUMNS, rows)


def _speed_row(case: GpuCase, timing: Timing, found: Results) -> tuple[str, ...]:
    ratio, target = ratio_of(timing), case.target
    quartiles = timing["eager"].get(OURS, {}).get("ratio")
    spread = f"{number(quartiles['q1'])} to {number(quartiles['q3'])}" if quartiles else "-"
    verdict = "" if ratio is None or target is None else "yes" if ratio >= target else "NO"
    if ratio is not None and ratio < NEVER_BELOW:
        verdict = "NO"
    return (
        ", ".join(map(str, case.case.shape)),
        case.dtype_label,
        case.case.mode,
        milliseconds(_seconds(timing, BASELINE)),
        milliseconds(_seconds(timing, OURS)),
        number(ratio),
        spread,
        number(target),
        verdict,
        number(ratio_of(timing, "graphed")),
        number(over_floor(dict(timing), found["floor"])),
        words(timing.get("plans")),
    )


def flashrnn_table(found: Results) -> Table:
    """Return the ratios to FlashRNN."""
    rows = [
        (
            ", ".join(map(str, case.case.shape)),
            case.dtype_label,
            case.case.mode,
            milliseconds(_seconds(timing, FLASHRNN)),
            milliseconds(_seconds(timing, OURS)),
            number(ratio),
            number(FLASHRNN_TARGET),
        )
        for case, timing in timings_of(found, "flashrnn")
        if (ratio := flashrnn_ratio_of(timing)) is not None
    ]
    columns = ("T, B, I, H", "dtype", "mode", "FlashRNN ms", "ours ms", "ratio", "target")
    return Table("Against FlashRNN's Elman, its input product counted", columns, rows)


def summary_table(found: Results) -> Table:
    """Return a line for each regime: short enough for the end of a log."""
    rows = []
    for regime, what in REGIMES.items():
        measured = [(c, r) for c, t in timings_of(found, regime) if (r := ratio_of(t)) is not None]
        if not measured:
            continue
        ratios = [ratio for _, ratio in measured]
        targets = [ratio >= case.target for case, ratio in measured if case.target is not None]
        worst = min(measured, key=lambda pair: pair[1])[0]
        rows.append(
            (
                regime,
                str(len(measured)),
                number(geometric_mean(ratios)),
                number(min(ratios)),
                f"{sum(targets)} of {len(targets)}" if targets else "-",
                worst.label.removeprefix(f"{regime} "),
                what,
            )
        )
    columns = ("regime", "cases", "mean ratio", "least", "targets", "the least", "")
    return Table("torch.nn.RNN's time over FusedRNN's, eager", columns, rows)


def not_timed_table(found: Results) -> Table:
    """Return what was planned and not timed, and why."""
    rows = []
    for timing in found["timings"]:
        label = GpuCase.from_json(timing["case"]).label
        if "failed" in timing:
            rows.append((label, timing["failed"]))
            continue
        for launch in ("eager", "graphed"):
            for name, entry in timing[launch].items():
                if "skipped" in entry:
                    rows.append((f"{label}, {launch}, {name}", entry["skipped"]))
    rows += [(label, "no time was left") for label in found["unmeasured"]]
    return Table("Not timed", ("case", "why"), rows)


def rate_table(found: Results) -> Table:
    """Return the card's measured rates."""
    rates = (found["floor"] or {}).get("rates", {})
    units = {"copy": "10^12 bytes/s, read and written"}
    rows = [
        (name, number(rate / 1e12), units.get(name, "10^12 operations/s"))
        for name, rate in rates.items()
    ]
    return Table("Measured rates of this card", ("", "", ""), rows)


def all_tables(found: Results) -> list[Table]:
    """Return every table that has a row."""
    tables = [
        stage_table(found),
        gate_table(found),
        summary_table(found),
        *(speed_table(found, regime) for regime in REGIMES),
        flashrnn_table(found),
        rate_table(found),
        not_timed_table(found),
    ]
    return [table for table in tables if table.rows]


# ---- text ----------------------------------------------------------------------------------------


def plain(table: Table, width: int = 150) -> str:
    """Return a table in plain text, its last column cut to the width."""
    rows = [table.columns, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    lines = [table.title]
    for row in rows:
        line = "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()
        lines.append(line if len(line) <= width else f"{line[: width - 3]}...")
    lines.insert(2, "-" * min(width, max(map(len, lines[1:]))))
    return "\n".join(lines)


def last_words(found: Results) -> str:
    """Return what a log should end with: targets, gates, stages and the verdict."""
    tables = [summary_table(found), gate_table(found), stage_table(found)]
    shown = [plain(table) for table in tables if table.rows]
    verdict = "PASSED" if found["passed"] else "FAILED"
    return "\n\n".join([*shown, f"{verdict} in {found['seconds']:.0f} s"])


def markdown(found: Results) -> str:
    """Return the whole report."""
    about = found["machine"] or {}
    lines = [
        "<!-- Generated by `python -m benchmarks.gpu`; do not edit. -->",
        "",
        f"# Measured on a GPU: {about.get('card', 'no card')}",
        "",
        *_notes(found),
        *[f"* {key}: {value}" for key, value in about.items() if value is not None],
        f"* command: `{found['command']}`",
        "",
        "A ratio is torch.nn.RNN's time on cuDNN over FusedRNN's, the median over rounds in which "
        "both ran in turn in one process, timed by CUDA events; dtype and TF32 setting are the "
        "same on both sides, and TF32 is off but where the dtype says tf32. Forward passes are "
        "without gradients and in evaluation mode; a training step is the forward pass and the "
        "gradients of all parameters (of the input too where I >= 64). Times are medians. In "
        "graphs: both captured in a CUDA graph and replayed. Floor: see "
        "`benchmarks/gpu/floor.py`.",
        "",
    ]
    for table in all_tables(found):
        lines += [f"## {table.title}", "", _row(table.columns), "|---" * len(table.columns) + "|"]
        lines += [_row(row) for row in table.rows]
        lines.append("")
    return "\n".join(lines)


def _notes(found: Results) -> list[str]:
    notes = []
    if not found["complete"]:
        notes.append("the run was ended before it finished")
    if (found["machine"] or {}).get("rehearsal"):
        notes.append("a rehearsal without a GPU, on tiny problems: no number here means anything")
    if found["unmeasured"]:
        notes.append(f"{len(found['unmeasured'])} cases were not measured; they are listed below")
    return [line for note in notes for line in (f"> **Note:** {note}", "")]


def _row(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|").replace("*", "\\*").replace("\n", " ") for cell in cells]
    return "| " + " | ".join(escaped) + " |"
