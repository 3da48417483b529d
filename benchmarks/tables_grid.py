"""Tables of the grid of shapes, which ask whether any is slower than torch.nn.RNN."""

from __future__ import annotations

from benchmarks.cases import BASELINE
from benchmarks.reading import (
    Results,
    Table,
    Timing,
    microseconds,
    number,
    ratio_of,
    seconds_of,
    shape_text,
    threads_text,
    timings_of,
    with_quartiles,
)
from benchmarks.timing import geometric_mean

SLOWER = 0.98
"""A ratio below it is called slower than torch.nn.RNN ..."""

TINY = 50e-6
"""... except where both take less than this many seconds."""


def is_slower(timing: Timing) -> bool:
    """Return whether FusedRNN is slower than torch.nn.RNN where that matters."""
    ratio, ours, torchs = (
        ratio_of(timing),
        seconds_of(timing, "fused_rnn"),
        seconds_of(timing, BASELINE),
    )
    if ratio is None or ours is None or torchs is None:
        return False
    return ratio < SLOWER and not (ours < TINY and torchs < TINY)


def grid_summary(found: Results) -> Table:
    """Return counts and the geometric mean over the grid."""
    groups: dict[tuple[str, int], list[Timing]] = {}
    for case, timing in timings_of(found, "grid"):
        if ratio_of(timing) is not None:
            groups.setdefault((case.mode, timing["threads"]), []).append(timing)
    rows = []
    for (mode, threads), timings in groups.items():
        ratios = [ratio for timing in timings if (ratio := ratio_of(timing)) is not None]
        rows.append(
            (
                *(mode, str(threads), str(len(ratios)), number(geometric_mean(ratios))),
                *(number(min(ratios)), number(max(ratios))),
                str(sum(map(is_slower, timings))),
            )
        )
    return Table(
        "Grid of shapes, summary",
        ("mode", "threads", "shapes", "geometric mean", "least", "greatest", "slower than torch"),
        rows,
        f"Slower: a ratio below {SLOWER}, except where both take less than {1e6 * TINY:.0f} "
        "microseconds.",
    )


def slower_table(found: Results) -> Table:
    """Return the cases of the grid in which FusedRNN is slower than torch.nn.RNN."""
    rows = [
        (
            *(shape_text(case), case.mode, str(timing["threads"])),
            microseconds(seconds_of(timing, BASELINE)),
            microseconds(seconds_of(timing, "fused_rnn")),
            with_quartiles(timing),
        )
        for case, timing in timings_of(found, "grid")
        if is_slower(timing)
    ]
    columns = ("T, B, I, H", "mode", "threads", "torch.nn.RNN, us", "FusedRNN, us", "ratio")
    return Table("Grid of shapes: slower than torch.nn.RNN", columns, rows)


def grid_table(found: Results) -> Table:
    """Return the ratio of each shape of the grid."""
    ratios: dict[str, dict[tuple[str, int], str]] = {}
    for case, timing in timings_of(found, "grid"):
        key = (case.mode, timing["threads"])
        ratios.setdefault(shape_text(case), {})[key] = number(ratio_of(timing))
    keys = sorted({key for row in ratios.values() for key in row})
    rows = [(shape, *(row.get(key, "-") for key in keys)) for shape, row in ratios.items()]
    columns = ("T, B, I, H", *(f"{mode}, {threads_text(threads)}" for mode, threads in keys))
    return Table("Grid of shapes", columns, rows, "Ratio of times, torch.nn.RNN's over FusedRNN's.")
