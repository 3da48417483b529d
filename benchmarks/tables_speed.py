"""Tables of times and ratios, but for the grid's."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import BASELINE, Case
from benchmarks.reading import (
    Results,
    Table,
    Timing,
    microseconds,
    milliseconds,
    number,
    over_best,
    ratio_of,
    seconds_of,
    shape_text,
    skipped,
    target_of,
    timings_of,
    title_of,
    with_quartiles,
)


def main_table(found: Results) -> Table:
    """Return FusedRNN against torch.nn.RNN, the targets and the floor, on the nine shapes."""
    rows = []
    for case, timing in timings_of(found, "table"):
        ours, floor = seconds_of(timing, "fused_rnn"), timing.get("floor")
        rows.append(
            (
                *(shape_text(case), case.mode, str(timing["threads"])),
                milliseconds(seconds_of(timing, BASELINE)),
                milliseconds(ours),
                with_quartiles(timing),
                number(target_of(case, timing["threads"])),
                number(over_best(found, case, timing)),
                number(ours / floor["seconds"] if ours is not None and floor else None),
                number(floor["at_peak"] / ours if ours is not None and floor else None),
            )
        )
    return Table(
        "FusedRNN against torch.nn.RNN",
        (
            *("T, B, I, H", "mode", "threads", "torch.nn.RNN, ms", "FusedRNN, ms"),
            *("ratio (quartiles)", "target", "over torch's best", "time / floor"),
            "share of peak",
        ),
        rows,
        "Ratio: torch.nn.RNN's time over FusedRNN's, median over rounds. Target: what a prototype "
        "reached on two cores with AVX-512. Over torch's best: torch.nn.RNN at the number of "
        "threads, of those measured, at which it is fastest. Floor: products at torch.mm's speed "
        "for these sizes, bytes and barriers, without tanh and page faults; below 1 are products "
        "faster than torch.mm's. Share of peak: of the multiply-adds that as many cores can do "
        "from register to register, which nothing in float32 can exceed." + _barrier_note(found),
    )


def _barrier_note(found: Results) -> str:
    notes = {
        timing["floor"]["barrier"]
        for timing in found["timings"]
        if isinstance(timing.get("floor", {}).get("barrier"), str)
    }
    return "".join(f" Barriers: {note}." for note in sorted(notes))


def peer_table(found: Results) -> Table:
    """Return everyone's ratio to torch.nn.RNN on the nine shapes."""
    timings = timings_of(found, "table")
    names = [
        name
        for name in found["peers"]
        if name != BASELINE and any(ratio_of(timing, name) is not None for _, timing in timings)
    ]
    rows = [
        (
            *(shape_text(case), case.mode, str(timing["threads"])),
            *(number(ratio_of(timing, name)) for name in names),
        )
        for case, timing in timings
    ]
    return Table(
        "Everyone against torch.nn.RNN",
        ("T, B, I, H", "mode", "threads", *(title_of(found, name) for name in names)),
        rows,
        "Ratio of times: torch.nn.RNN's over the other's, in one process in turn. An LSTM has four "
        "times the recurrent weights, a GRU three times. " + skipped(timings, found),
    )


def variant_table(found: Results) -> Table:
    """Return packed sequences, directions, layers, nonlinearities and dtypes."""
    rows = []
    timings = timings_of(found, "variants")
    for case, timing in timings:
        rows.append(
            (
                *(case.label, shape_text(case), case.mode, str(timing["threads"])),
                milliseconds(seconds_of(timing, case.baseline)),
                milliseconds(seconds_of(timing, "fused_rnn")),
                with_quartiles(timing) + ("" if case.baseline == BASELINE else " *"),
                number(_token_cost(case, timing)),
            )
        )
    return Table(
        "Variants",
        (
            *("variant", "T, B, I, H", "mode", "threads", "unit, ms", "FusedRNN, ms"),
            *("ratio (quartiles)", "cost of a token"),
        ),
        rows,
        "The unit is torch.nn.RNN in the same configuration and dtype. * torch.nn.RNN has no such "
        "nonlinearity: the unit is FusedRNN's tanh. Packed: lengths uniform in 1..T; cost of a "
        "token: time per time step and sample over that of the dense sequence. "
        + skipped(timings, found),
    )


def _token_cost(case: Case, timing: Timing) -> float | None:
    packed, dense = seconds_of(timing, "fused_rnn"), seconds_of(timing, "fused_rnn_dense")
    if packed is None or dense is None:
        return None
    return (packed / timing["tokens"]) / (dense / (case.T * case.B))


def _everyone_table(
    found: Results, suite: str, title: str, cell: Callable[[Case, float], str], note: str
) -> Table:
    timings = timings_of(found, suite)
    names = [
        name
        for name in found["peers"]
        if any(seconds_of(timing, name) is not None for _, timing in timings)
    ]
    floors = any("floor" in timing for _, timing in timings)
    rows = []
    for case, timing in timings:
        times = [seconds_of(timing, name) for name in names]
        times += [timing["floor"]["seconds"]] if floors else []
        cells = ["-" if seconds is None else cell(case, seconds) for seconds in times]
        rows.append((shape_text(case), case.mode, str(timing["threads"]), *cells))
    titles = [title_of(found, name) for name in names] + (["floor"] if floors else [])
    columns = ("T, B, I, H", "mode", "threads", *titles)
    return Table(title, columns, rows, f"{note} {skipped(timings, found)}".strip())


def scaling_table(found: Results) -> Table:
    """Return the time per step against H."""
    return _everyone_table(
        found,
        "scaling",
        "Time per step against H",
        lambda case, seconds: microseconds(seconds / case.T),
        "Microseconds for one time step, forward, or forward and backward.",
    )


def overhead_table(found: Results) -> Table:
    """Return single steps and tiny shapes."""
    return _everyone_table(
        found,
        "overhead",
        "Overhead",
        lambda _, seconds: microseconds(seconds),
        "Microseconds for a whole call.",
    )


def cell_table(found: Results) -> Table:
    """Return loops over cells, step by step."""
    rows = []
    for case, timing in timings_of(found, "cell"):
        times = [seconds_of(timing, name) for name in case.contestants]
        per_step = [microseconds(None if s is None else s / case.T) for s in times]
        ratio = with_quartiles(timing, case.contestants[1])
        rows.append((shape_text(case), case.mode, str(timing["threads"]), *per_step, ratio))
    return Table(
        "Loops over cells",
        ("T, B, I, H", "mode", "threads", "nn.RNNCell", "FusedRNNCell", "ratio (quartiles)"),
        rows,
        "Microseconds for one time step, forward, or forward and backward. Ratio: nn.RNNCell's "
        "time over FusedRNNCell's.",
    )
