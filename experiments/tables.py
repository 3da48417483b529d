"""Says in a table and in sentences what the runs of a view measured.

Sentences state what was measured and what it compares with. Every one is made from numbers, and
there is one for the case that what is expected did not happen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.console import as_line, as_text, new_table, say, say_items
from experiments.evaluation import LEARNED_BELOW, LEARNED_BESIDE_BASELINES, SOLVED_BELOW
from experiments.expectations import expectations, statement
from experiments.tasks import TASKS
from experiments.view import Row, View, baselines, decades_per_step, know_nothing_metric

VANISHING_DECADES_PER_STEP = 0.05
"""A steeper mean fall of the gradient than this is called vanishing: 2.5 decades in 50 steps."""

ARMS_TOLD = 4
"""More arms than this are not told one by one."""

ROUNDING = 1e-3
"""A larger relative difference from ``torch.nn.RNN`` is not put down to float32 rounding."""


def say_view(console: Console, view: View) -> None:
    """Print table, conclusions, signatures and failures."""
    if view.records:
        console.print()
        console.print(table(view))
        say(console, "What was measured")
        say_items(console, conclusions(view))
    say_failures(console, view.failures)


def say_failures(console: Console, failures: Mapping[str, str]) -> None:
    """Print the runs without a result, each with the first and the last line of its reason."""
    if not failures:
        return
    say(console, f"{len(failures)} run(s) without a result:")
    for name, reason in failures.items():
        lines = [line for line in reason.splitlines() if line.strip()] or ["no reason is known"]
        say(console, f"  {name}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}")


def table(view: View) -> Table:
    """Return a line per horizon and arm, with what was expected of it below."""
    known = expectations(view)
    seeds = len({record.config["seed"] for record in view.records})
    sizes = sorted({record.result.hidden_size for record in view.records})
    title = f"{view.name}: {', '.join(view.tasks)}, {seeds} seed(s)"
    if len(sizes) == 1:
        title += f", H = {sizes[0]}"
    grid = new_table(title, _caption(view, bool(known)))
    grid.add_column("\nT", justify="right")
    grid.add_column("\narm", overflow="fold", min_width=12)
    if len(sizes) > 1:
        grid.add_column("\nH", justify="right", no_wrap=True)
    for heading in ("log10 ratio\nat init", "\ntrained", f"test\n{view.metric}"):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("\nverdict", no_wrap=True)
    grid.add_column("ms per\nstep", justify="right", no_wrap=True)
    rows = view.rows
    for index, row in enumerate(rows):
        last = index + 1 == len(rows) or _section(rows[index + 1]) != _section(row)
        first = index == 0 or _section(rows[index - 1]) != _section(row)
        time = row.milliseconds_per_step
        expected = [each for each in known if each.is_of(row)]
        grid.add_row(
            str(row.horizon) if first else "",
            as_text(f"{'beside: ' if row.is_contrast else ''}{row.label}"),
            *([numbers(row.values("hidden_size"), "{:.0f}")] if len(sizes) > 1 else []),
            numbers(row.log10_ratios("initial"), "{:.1f}"),
            numbers(row.log10_ratios("trained"), "{:.1f}"),
            metric_range(row),
            verdict_text(row),
            "" if time is None else f"{time:.2f}",
            end_section=last and not expected,
        )
        for number, each in enumerate(expected, start=1):
            cells = (each.cell("log10_ratio"), "", each.cell("test_metric"), each.cell("learned"))
            style = "dim"
            grid.add_row(
                "",
                as_text(f"  {each.origin}", style),
                *([""] if len(sizes) > 1 else []),
                *(as_text(cell, style) for cell in cells),
                "",
                end_section=last and number == len(expected),
            )
    return grid


def _section(row: Row) -> tuple[bool, int]:
    return row.is_contrast, row.horizon


def _caption(view: View, has_expectations: bool) -> str:
    nothing = numbers([know_nothing_metric(record) for record in view.records], "{:.3f}")
    lines = [
        "ratio: |dL/dh_1| / |dL/dh_T|, total adjoint, mean over a batch; low..high over seeds",
        f"knowing nothing: {view.metric} {nothing}; solved / learned: {bounds(view)}",
    ]
    lines += [
        f"{name}: {numbers(values, '{:.3f}')}" for name, values in baselines(view.records).items()
    ]
    if has_expectations:
        lines.append(f"expected, published: {view.expected.get('source', 'see the study')}")
    return "\n".join(as_line(line) for line in lines)


def bounds(view: View) -> str:
    """Say below which errors a run has solved or learned its task."""
    share = f"error below {SOLVED_BELOW:.0%} / "
    if beaten := baselines(view.records):
        bound = f"{LEARNED_BESIDE_BASELINES:.0%} of that of knowing nothing"
        return f"{share}{bound}, and below that of {', '.join(beaten)}"
    return f"{share}{LEARNED_BELOW:.0%} of that of knowing nothing"


def numbers(values: Sequence[float | None], pattern: str) -> str:
    """Return ``low..high``, one value if both read the same; ``None`` is an exact zero or nan."""
    known = sorted(value for value in values if value is not None and math.isfinite(value))
    if not known:
        return "none"
    low, high = pattern.format(known[0]), pattern.format(known[-1])
    text = low if low == high else f"{low}..{high}"
    missing = len(values) - len(known)
    return f"{text} ({missing} without)" if missing else text


def metric_range(row: Row) -> str:
    """Return the lowest and highest test metric over seeds."""
    metrics = {record.result.metric for record in row.records}
    # An error of many sizes, or a number of about one.
    is_error = metrics <= {"MSE", "cross-entropy"}
    return numbers(row.values("test_metric"), "{:.2g}" if is_error else "{:.3f}")


def verdict_text(row: Row) -> str:
    """Return e.g. ``solved 3/3``, ``learned 1/3``, ``failed 3/3``."""
    total = len(row.records)
    if total == 0:
        return "no result"
    if row.count("solved") == total:
        return f"solved {total}/{total}"
    learned, diverged = row.count("solved", "learned"), row.count("diverged")
    text = f"learned {learned}/{total}" if learned else f"failed {total}/{total}"
    return f"{text}, diverged {diverged}" if diverged else text


def conclusions(view: View) -> list[str]:
    """Return what the runs showed, one statement each: by arm, then signatures, then the kernel.

    Of more than ``ARMS_TOLD`` arms the table alone tells.
    """
    rows = [row for row in view.rows if row.records]
    arms = list(dict.fromkeys(row.label for row in rows if not row.is_contrast))
    said = _on_arms(arms, rows) if len(arms) <= ARMS_TOLD else []
    signatures = statement(expectations(view), rows)
    if signatures is not None:
        said.append(signatures)
    for check in view.kernel_checks:
        said += _on_kernel(check)
    return said


def _on_arms(arms: Sequence[str], rows: Sequence[Row]) -> list[str]:
    said = []
    for label in arms:
        ladder = [row for row in rows if row.label == label and not row.is_contrast]
        name = f"{label}: " if len(arms) > 1 else ""
        said += [
            name + statement if name else statement[0].upper() + statement[1:]
            for statement in (*_on_slope(ladder), _on_learning(ladder))
        ]
        if len(arms) == 1 and all(map(_is_telling, ladder)):
            said += _on_smallest_ratio(ladder)
    for contrast in (row for row in rows if row.is_contrast):
        said += _on_contrast(contrast, rows)
    return said


def power(exponent: float | None) -> str:
    """Return ``1e-6.8`` for -6.8: a power of ten that need not be a whole one."""
    return "0 (underflow)" if exponent is None else f"1e{exponent:+.1f}"


def _is_telling(row: Row) -> bool:
    """Return whether the first step's gradient, over the last one's, says how far it comes.

    Not where the first step has a loss of its own, or nothing arrives at the last step: there a
    task scores samples of many lengths.
    """
    profiles = row.profiles("initial")
    if profiles and not any(profile[-1] for profile in profiles):
        return False
    settings = row.records[0].config.get("task", {})
    task = TASKS.get(settings.get("name"))
    return task is None or not task.has_loss_at_first_step(settings)


def _has_ratio(row: Row) -> bool:
    return row.is_measured and _is_telling(row)


def _on_slope(ladder: Sequence[Row]) -> list[str]:
    return [_slope(ladder)] if all(map(_is_telling, ladder)) else []


def _slope(ladder: Sequence[Row]) -> str:
    slope = decades_per_step(ladder)
    ends = dict.fromkeys((ladder[0].horizon, ladder[-1].horizon))
    span = f"T = {' to '.join(map(str, ends))}"
    if slope is None:
        if not any(row.is_measured for row in ladder):
            return "the gradient at initialisation was not measured (no adjoint probe)."
        return f"at initialisation the gradient at the first step is exactly zero ({span})."
    if slope < -VANISHING_DECADES_PER_STEP:
        return (
            f"the gradient vanishes: at initialisation its norm falls by {-slope:.2f} decades per "
            f"time step back ({span}), to {power(ladder[-1].mean_log10_ratio())} of its last value "
            f"at T = {ladder[-1].horizon}."
        )
    if slope > VANISHING_DECADES_PER_STEP:
        return (
            f"the gradient explodes: at initialisation its norm grows by {slope:.2f} decades per "
            f"time step back ({span})."
        )
    return (
        f"the gradient neither vanishes nor explodes: at initialisation its norm changes by "
        f"{slope:+.3f} decades per time step back ({span})."
    )


def _on_learning(ladder: Sequence[Row]) -> str:
    shares = ", ".join(
        f"{row.count('solved', 'learned')} of {len(row.records)} at T = {row.horizon}"
        for row in ladder
    )
    text = f"seeds that learned: {shares}"
    for before, after in pairwise(ladder):
        if before.is_learned and not after.is_learned and _has_ratio(before) and _has_ratio(after):
            return (
                f"{text}; between T = {before.horizon} and {after.horizon} the initial ratio goes "
                f"from {power(before.mean_log10_ratio())} to {power(after.mean_log10_ratio())}."
            )
    return f"{text}."


def _on_smallest_ratio(ladder: Sequence[Row]) -> list[str]:
    """Say from how small a gradient single runs still learned, if some did and some did not."""
    runs = [
        (ratio, record.result.verdict in ("solved", "learned"), row.horizon)
        for row in ladder
        for ratio, record in zip(row.log10_ratios("initial"), row.records, strict=True)
        if ratio is not None
    ]
    learned = [(ratio, horizon) for ratio, good, horizon in runs if good]
    if not learned or len(learned) == len(runs):
        return []
    smallest, horizon = min(learned)
    below = sum(ratio < smallest for ratio, _, _ in runs)
    above = sum(ratio >= smallest and not good for ratio, good, _ in runs)
    return [
        f"The smallest initial ratio from which a run learned is {power(smallest)} (T = "
        f"{horizon}). Of the others, {below} began below it and failed, {above} began above it and "
        "failed."
    ]


def _on_contrast(contrast: Row, rows: Sequence[Row]) -> list[str]:
    text = f"Contrast at T = {contrast.horizon}, {contrast.label}: {_outcome(contrast)}"
    same = [
        row for row in rows if (row.label, row.horizon) == (contrast.contrast_of, contrast.horizon)
    ]
    if not same:
        return [f"{text}."]
    beside = same[0]
    return [f"{text}; {beside.label}: {_outcome(beside)}."]


def _outcome(row: Row) -> str:
    text = f"{verdict_text(row)}, {row.records[0].result.metric} {metric_range(row)}"
    if _has_ratio(row):
        text += f", from an initial ratio of {power(row.mean_log10_ratio())}"
    return text


def _on_kernel(check: Mapping[str, Any]) -> list[str]:
    difference = check["relative_difference"]
    speed = check["torch_milliseconds"] / check["fused_milliseconds"]
    said = [
        f"Beside torch.nn.{check['torch']} from the same seed (T = {check['horizon']}): "
        f"predictions differ by {difference['prediction']:.0e}, parameter gradients by "
        f"{difference['gradients']:.0e}, the adjoint profile by "
        f"{difference['adjoint_profile']:.0e} (relative). A forward and backward pass takes "
        f"{check['fused_milliseconds']:.2f} ms against {check['torch_milliseconds']:.2f} ms "
        f"({speed:.1f}x) on one thread."
    ]
    if max(difference.values()) > ROUNDING:
        said.append(
            f"That is more than float32 rounding explains (above {ROUNDING:.0e}): until it is "
            f"understood, nothing here speaks for the fused kernel."
        )
    return said
