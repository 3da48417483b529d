"""Says in a table and in sentences what a run measured.

Every sentence is made from the run's numbers, and there is one for the case that what theory and
earlier measurements lead one to expect did not happen.
"""

from __future__ import annotations

import io
import math
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.expected import SOURCE, Expected, expected
from experiments.ladder import LEARNED_BELOW, SOLVED_BELOW
from experiments.results import ERRORS

VANISHING_DECADES_PER_STEP = 0.05
"""A steeper mean fall of the gradient than this is called vanishing: 2.5 decades in 50 steps."""

ROUNDING = 1e-3
"""A larger relative difference from ``torch.nn.RNN`` is not put down to float32 rounding."""

Arm = Mapping[str, Any]


class PresentationError(RuntimeError):
    """Results that are on disk could not be printed or drawn."""


def present(*steps: Callable[[], None]) -> None:
    """Call every step, also after one that failed.

    Raises:
        PresentationError: a step failed; it says how.
    """
    errors = []
    for step in steps:
        try:
            step()
        except Exception as error:
            errors.append(error)
    if errors:
        words = "; ".join(f"{type(error).__name__}: {error}" for error in errors)
        raise PresentationError(words) from errors[0]


# Names and labels are the user's. `Text` keeps Rich from reading markup, emoji codes or numbers
# into them.


def new_console() -> Console:
    """Return a console on stdout; what its encoding lacks is printed as an escape."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=ERRORS)
    return Console()


def as_line(words: str) -> str:
    """Return ``words`` without line breaks and control characters: they become escapes."""
    breaks = ("Cc", "Cs", "Zl", "Zp")
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in breaks else c
        for c in words
    )


def as_text(words: str, style: str = "") -> Text:
    """Return one line for a table, or to print."""
    return Text(as_line(words), style)


def say(console: Console, words: str) -> None:
    """Print one line as it is; a path in it stays in one piece."""
    console.print(as_text(words), soft_wrap=True)


def say_items(console: Console, items: Sequence[str]) -> None:
    """Print a list, an item per line; a terminal gets it wrapped."""
    for item in items:
        console.print(as_text(f"  * {item}"), soft_wrap=not console.is_terminal)


def write_report(path: Path, tell: Callable[[Console], None]) -> None:
    """Leave in a file what ``tell`` prints on a console."""
    with path.open("w", encoding="utf-8", errors=ERRORS) as file:
        tell(Console(file=file, width=140, force_terminal=False))


def say_results(console: Console, results: Mapping[str, Any]) -> None:
    """Print table and conclusions."""
    console.print()
    console.print(ladder_table(results))
    say(console, "What to conclude")
    say_items(console, results["conclusions"])


def new_table(title: str, caption: str) -> Table:
    """Return an empty table in the style of the laboratory."""
    return Table(
        title=as_text(title, "table.title"),
        caption=caption,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )


def ladder_table(results: Mapping[str, Any]) -> Table:
    """Return the run's arms, with what was measured before beside them where settings agree."""
    config, arms = results["config"], results["arms"]
    metric = results["task"]["metric"]
    before = [expected(config, arm) for arm in arms]
    model = config["model"]["name"]
    title = f"{model} on {results['task']['name']}, {len(config['seeds'])} seed(s)"
    table = new_table(title, _caption(results, before))
    table.add_column("\narm", overflow="fold")
    for heading in ("log10 ratio\nat init", "\ntrained", f"test\n{metric}"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("\nverdict", no_wrap=True)
    table.add_column("ms per\nstep", justify="right", no_wrap=True)
    for arm, b in zip(arms, before, strict=True):
        step = f"{arm['median_milliseconds_per_step']:.2f}"
        last = _ends_ladder(arms, arm)
        row = (as_text(arm["title"]), *measured_cells(arm, metric), verdict_text(arm), step)
        table.add_row(*row, end_section=last and b == Expected())
        if b != Expected():
            was = ("  expected", b.log10_ratio, "", b.metric, b.learned)
            table.add_row(*was, style="dim", end_section=last)
    return table


def measured_cells(arm: Arm, metric: str) -> tuple[str, str, str]:
    """Return, over seeds: log10 gradient ratio at initialisation, the same trained, test metric."""
    ratios = (
        format_range([run[stage]["log10_ratio"] for run in arm["runs"]], "{:.1f}")
        for stage in ("initial", "trained")
    )
    return *ratios, metric_range(arm, metric)


def metric_range(arm: Arm, metric: str) -> str:
    """Return the lowest and highest test metric over seeds."""
    pattern = "{:.3f}" if metric == "accuracy" else "{:.2g}"
    return format_range([run["test_metric"] for run in arm["runs"]], pattern)


def _caption(results: Mapping[str, Any], before: Sequence[Expected]) -> str:
    lines = [
        "ratio: |dL/dh_1| / |dL/dh_T|, total adjoint, mean over a batch; low..high over seeds",
        f"knowing nothing: {results['task']['metric']} {_know_nothing(results)}; solved / learned: "
        f"error below {SOLVED_BELOW:.0%} / {LEARNED_BELOW:.0%} of that of knowing nothing",
    ]
    if any(b != Expected() for b in before):
        lines.append(f"expected: {SOURCE}")
    return "\n".join(lines)


def _ends_ladder(arms: Sequence[Arm], arm: Arm) -> bool:
    return arm is [a for a in arms if not a["is_contrast"]][-1]


def _know_nothing(results: Mapping[str, Any]) -> str:
    errors = [arm["know_nothing_error"] for arm in results["arms"]]
    if results["task"]["metric"] == "accuracy":
        errors = [1 - error for error in errors]
    return format_range(errors, "{:.3f}")


def format_range(values: Sequence[float | None], pattern: str) -> str:
    """Return ``low..high``, one value if both read the same; ``None`` is an exact zero or nan."""
    known = sorted(value for value in values if value is not None and math.isfinite(value))
    if not known:
        return "none"
    low, high = pattern.format(known[0]), pattern.format(known[-1])
    text = low if low == high else f"{low}..{high}"
    missing = len(values) - len(known)
    return f"{text} ({missing} without)" if missing else text


def verdict_text(arm: Arm) -> str:
    """Return e.g. ``solved 3/3``, ``learned 1/3``, ``failed 3/3``."""
    total = len(arm["runs"])
    if arm["solved"] == total:
        return f"solved {total}/{total}"
    text = f"learned {arm['learned']}/{total}" if arm["learned"] else f"failed {total}/{total}"
    return f"{text}, diverged {arm['diverged']}" if arm["diverged"] else text


def conclusions(results: Mapping[str, Any]) -> list[str]:
    """Return what a reader should take from the run, one statement each."""
    ladder = [arm for arm in results["arms"] if not arm["is_contrast"]]
    contrasts = [arm for arm in results["arms"] if arm["is_contrast"]]
    slope = decades_per_step(ladder)
    said = [_on_slope(ladder, slope), _on_end_of_learning(ladder), *_on_smallest_ratio(ladder)]
    said += [_on_contrast(results, ladder, contrast) for contrast in contrasts]
    if results["kernel_check"] is not None:
        said += _on_kernel(results["kernel_check"], ladder, slope)
    return said


def decades_per_step(arms: Sequence[Arm]) -> float | None:
    """Return the mean slope of log10 of the adjoint norm against lag at initialisation.

    That is the median over arms and seeds of the first-to-last ratio over the number of lags;
    ``None`` if no ratio has a logarithm. Negative: the gradient vanishes going back in time.
    """
    slopes = [
        run["initial"]["log10_ratio"] / arm["lags"]
        for arm in arms
        if arm["lags"] > 0
        for run in arm["runs"]
        if run["initial"]["log10_ratio"] is not None
    ]
    return median(slopes) if slopes else None


def mean_log10_ratio(arm: Arm, stage: str = "initial") -> float | None:
    """Return the mean over seeds of log10 of the first-to-last ratio; ``None``: none has one."""
    values = [run[stage]["log10_ratio"] for run in arm["runs"]]
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def power(exponent: float | None) -> str:
    """Return ``1e-6.8`` for -6.8: a power of ten that need not be a whole one."""
    return "0 (underflow)" if exponent is None else f"1e{exponent:+.1f}"


def _on_slope(ladder: Sequence[Arm], slope: float | None) -> str:
    span = f"T = {ladder[0]['horizon']} to {ladder[-1]['horizon']}"
    if slope is None:
        return f"At initialisation the gradient at the first step is exactly zero ({span})."
    if slope < -VANISHING_DECADES_PER_STEP:
        return (
            f"The gradient vanishes: at initialisation its norm falls by {-slope:.2f} decades per "
            f"time step back ({span}), to {power(mean_log10_ratio(ladder[-1]))} of its last value "
            f"at T = {ladder[-1]['horizon']}."
        )
    if slope > VANISHING_DECADES_PER_STEP:
        return (
            f"The gradient explodes: at initialisation its norm grows by {slope:.2f} decades per "
            f"time step back ({span})."
        )
    return (
        f"The gradient neither vanishes nor explodes: at initialisation its norm changes by "
        f"{slope:+.3f} decades per time step back ({span})."
    )


def _on_end_of_learning(ladder: Sequence[Arm]) -> str:
    failed = [arm for arm in ladder if not arm["majority_learned"]]
    if not failed:
        last = ladder[-1]
        return (
            f"Learning does not end on this ladder: every horizon up to T = {last['horizon']} was "
            f"learned by most seeds, that one from a ratio of {power(mean_log10_ratio(last))}."
        )
    first_failed = failed[0]
    if first_failed is ladder[0]:
        return (
            f"Learning ends before the ladder begins: T = {first_failed['horizon']} failed in most "
            f"seeds, from an initial ratio of {power(mean_log10_ratio(first_failed))}. Without a "
            f"first rung that is learned, the ladder says nothing about vanishing gradients: use "
            f"shorter horizons or more steps."
        )
    last_learned = ladder[ladder.index(first_failed) - 1]
    text = (
        f"Learning ends between T = {last_learned['horizon']} ({verdict_text(last_learned)}, "
        f"initial ratio {power(mean_log10_ratio(last_learned))}) and T = {first_failed['horizon']} "
        f"({verdict_text(first_failed)}, {power(mean_log10_ratio(first_failed))})"
    )
    again = [arm for arm in ladder[ladder.index(first_failed) :] if arm["majority_learned"]]
    if again:
        horizons = ", ".join(f"T = {arm['horizon']}" for arm in again)
        return (
            f"{text}, but not for good: {horizons} learned again, which vanishing does not explain."
        )
    return f"{text}, and no longer horizon was learned."


def _on_smallest_ratio(ladder: Sequence[Arm]) -> list[str]:
    """Say from how small a gradient single runs still learned, if some did and some did not."""
    runs = [
        (run["initial"]["log10_ratio"], run["verdict"] in ("solved", "learned"), arm["horizon"])
        for arm in ladder
        for run in arm["runs"]
        if run["initial"]["log10_ratio"] is not None
    ]
    learned = [(ratio, horizon) for ratio, good, horizon in runs if good]
    if not learned or len(learned) == len(runs):
        return []
    smallest, horizon = min(learned)
    below = sum(ratio < smallest for ratio, _, _ in runs)
    above = sum(ratio >= smallest and not good for ratio, good, _ in runs)
    return [
        f"The smallest initial ratio from which a run learned is {power(smallest)} (T = "
        f"{horizon}); all {below} runs that began below it failed, and {above} that began above it."
    ]


def _on_contrast(results: Mapping[str, Any], ladder: Sequence[Arm], contrast: Arm) -> str:
    horizon, label = contrast["horizon"], contrast["label"]
    metric = results["task"]["metric"]
    flow = f"initial ratio {power(mean_log10_ratio(contrast))}"
    same = next((arm for arm in ladder if arm["horizon"] == horizon), None)
    outcome = (
        f"Contrast at T = {horizon}, {label} ({flow}): {verdict_text(contrast)}, "
        f"{metric} {metric_range(contrast, metric)}"
    )
    if same is None:
        return f"{outcome}. The ladder has no rung at this horizon to compare it with."
    against = (
        f"against {verdict_text(same)}, {metric_range(same, metric)} on the ladder "
        f"({power(mean_log10_ratio(same))})"
    )
    if not any(arm["majority_learned"] for arm in results["arms"]):
        return f"{outcome}, {against}. No arm of this run learned, so nothing can be concluded."
    more_gradient = _has_more_gradient(contrast, same)
    if contrast["majority_learned"] and same["majority_learned"]:
        return f"{outcome}, {against}. Both learn: this horizon does not tell them apart."
    if same["majority_learned"]:
        return f"{outcome}, {against}. The change does harm here."
    if contrast["majority_learned"]:
        return f"{outcome}, {against}. " + (
            "Same module, task and budget, and more gradient: what fails on the ladder is the flow "
            "of gradient, not the code."
            if more_gradient
            else "It learned, but not because more gradient arrives at the first step."
        )
    if more_gradient and _is_clearly_better(contrast, same):
        return (
            f"{outcome}, {against}. More gradient arrives and every seed does better for it, if "
            f"not well enough to count as learned."
        )
    return f"{outcome}, {against}. " + (
        "More gradient arrives, and most seeds still fail: good gradient flow is not sufficient."
        if more_gradient
        else "It did not help, and it did not mend the flow of gradient either."
    )


def _has_more_gradient(arm: Arm, other: Arm) -> bool:
    """Whether an arm's initial ratio is at least ten times that of another."""
    ours, theirs = mean_log10_ratio(arm), mean_log10_ratio(other)
    return ours is not None and (theirs is None or ours > theirs + 1)


def _is_clearly_better(arm: Arm, other: Arm) -> bool:
    """Whether an arm's worst seed has less than 0.9 times the error of another's best."""
    worst, best = (
        choose((math.inf if share is None else share) for share in _shares(a))
        for choose, a in ((max, arm), (min, other))
    )
    return worst < 0.9 * best


def _shares(arm: Arm) -> list[float | None]:
    return [run["error_over_know_nothing"] for run in arm["runs"]]


def _on_kernel(check: Mapping[str, Any], ladder: Sequence[Arm], slope: float | None) -> list[str]:
    difference = check["relative_difference"]
    speed = check["torch_milliseconds"] / check["fused_milliseconds"]
    said = [
        f"Beside torch.nn.RNN from the same seed (T = {check['horizon']}): predictions differ by "
        f"{difference['prediction']:.0e}, parameter gradients by {difference['gradients']:.0e}, "
        f"the adjoint profile by {difference['adjoint_profile']:.0e} (relative). A forward and "
        f"backward pass takes {check['fused_milliseconds']:.2f} ms against "
        f"{check['torch_milliseconds']:.2f} ms ({speed:.1f}x) on one thread."
    ]
    if max(difference.values()) > ROUNDING:
        said.append(
            f"That is more than float32 rounding explains (above {ROUNDING:.0e}): until it is "
            f"understood, nothing here speaks for the fused kernel."
        )
        return said
    vanishes = slope is None or slope < -VANISHING_DECADES_PER_STEP
    learned = [arm["majority_learned"] for arm in ladder]
    if vanishes and learned[0] and not all(learned):
        pace = "faster" if speed > 1.05 else "no faster, on this machine"
        said.append(f"The fused kernel shows vanishing {pace}; it does not cure it.")
    return said
