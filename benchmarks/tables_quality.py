"""Tables of derivatives of second order, errors and memory."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks import accuracy, memory
from benchmarks.cases import Case
from benchmarks.reading import (
    Results,
    Table,
    milliseconds,
    number,
    seconds_of,
    shape_text,
    skipped,
    timings_of,
    title_of,
    with_quartiles,
)


def hvp_table(found: Results) -> Table:
    """Return time and memory of a Hessian-vector product."""
    peaks = {
        (point["contestant"], point["threads"]): point["bytes"]
        for point in found["memory"]
        if point["case"]["mode"] == "hvp" and "bytes" in point
    }
    rows = []
    timings = timings_of(found, "hvp")
    for case, timing in timings:
        for name in timing["contestants"]:
            peak = peaks.get((name, timing["threads"]))
            rows.append(
                (
                    *(shape_text(case), title_of(found, name), str(timing["threads"])),
                    milliseconds(seconds_of(timing, name)),
                    with_quartiles(timing, name),
                    number(None if peak is None else peak / 2**20),
                )
            )
    return Table(
        "Hessian-vector product",
        ("T, B, I, H", "", "threads", "ms", "ratio (quartiles)", "peak memory, MiB"),
        rows,
        "In all parameters, by differentiating a gradient. " + skipped(timings, found),
    )


def accuracy_table(found: Results) -> Table:
    """Return the errors of both implementations."""
    rows = []
    for result in found["accuracy"]:
        case, errors = result["case"], result.get("errors")
        shape = ", ".join(str(case[size]) for size in "TBIH")
        if errors is None:
            cells = ["failed"] * len(accuracy.QUANTITIES)
        else:
            cells = [
                " / ".join(_error(errors[name], quantity) for name in ("fused_rnn", "torch_rnn"))
                for quantity in accuracy.QUANTITIES
            ]
        rows.append((case["name"], shape, *cells, "yes" if result.get("passed") else "NO"))
    titles = ["output", *(f"grad {quantity}" for quantity in accuracy.QUANTITIES[1:])]
    return Table(
        "Errors against float64, FusedRNN / torch.nn.RNN",
        ("data", "T, B, I, H", *titles, "gate"),
        rows,
        "Float32, |difference| / |exact| over the whole tensor. inf: not finite, or not zero where "
        f"the exact answer is. Gate: FusedRNN at most {accuracy.GATE:.0e} where torch.nn.RNN is.",
    )


def _error(errors: Mapping[str, float | None], quantity: str) -> str:
    if quantity not in errors:
        return "-"
    error = errors[quantity]
    return "inf" if error is None else f"{error:.1e}" if error else "0"


def memory_table(found: Results) -> Table:
    """Return the peak memory of a training step."""
    points = [point for point in found["memory"] if point["case"]["mode"] == "train"]
    by_case: dict[tuple[Case, int], dict[str, str]] = {}
    for point in points:
        case = Case.from_json(point["case"])
        units = number(point["bytes"] / memory.unit(case)) if "bytes" in point else "failed"
        by_case.setdefault((case, point["threads"]), {})[point["contestant"]] = units
    names = list(dict.fromkeys(point["contestant"] for point in points))
    rows = [
        (
            *(shape_text(case), str(threads), number(memory.unit(case) / 2**20)),
            *(cells.get(name, "-") for name in names),
        )
        for (case, threads), cells in by_case.items()
    ]
    return Table(
        "Peak memory of a training step",
        ("T, B, I, H", "threads", "T*B*H*4 bytes, MiB", *(title_of(found, n) for n in names)),
        rows,
        "Growth of the resident size of a fresh process at its peak, in units of T*B*H*4 bytes. "
        f"Gate: FusedRNN at most {memory.GATE} where the unit is {memory.GATE_FROM >> 20} MiB or "
        "more.",
    )
