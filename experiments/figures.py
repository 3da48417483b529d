"""Figures of a run and of a comparison, each as PNG and SVG.

Colours are those of Okabe & Ito, and shades of blue where there is an order. Adjoint norms are
drawn as log10, and an exact zero as a cross on the lower edge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, ScalarFormatter

from experiments.ladder import LEARNED_BELOW, SOLVED_BELOW
from rnn_cuda.instruments.plots import COLOURS, MARKERS, STYLE, as_text, legend, save

# For contrast arms, beside a ladder in shades of blue.
CONTRAST_COLOURS = ("#D55E00", "#CC79A7", "#E69F00", "#009E73")

Results = Mapping[str, Any]
Arm = Mapping[str, Any]


def draw_run(
    results: Results, losses: Mapping[str, Sequence[Sequence[float]]], folder: Path
) -> None:
    """Draw ``ladder`` (cliff and profiles) and ``loss_curves`` of one run.

    Args:
        results: what ``results.json`` holds.
        losses: by arm title, the training losses of each seed.
        folder: where the files go.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.6), layout="constrained")
        cliff, profiles = figure.subplots(1, 2)
        _draw_cliff(cliff, results)
        _draw_profiles(profiles, results)
        config = results["config"]
        figure.suptitle(
            f"{_words(config['model']['name'])}, {_task_words(results)}, H = "
            f"{results['arms'][0]['hidden_size']}, {config['training']['steps']} steps, "
            f"{len(config['seeds'])} seed(s)"
        )
        save(figure, folder / "ladder")

        figure = Figure(figsize=(11.5, 5), layout="constrained")
        _draw_losses(figure, results, losses)
        save(figure, folder / "loss_curves")


def draw_comparison(runs: Sequence[Results], horizon: int, folder: Path) -> None:
    """Draw ``comparison``: the cliff of every run, and profiles at one horizon, before and after.

    Args:
        runs: results of several runs on one task.
        horizon: a horizon that every run's ladder has.
        folder: where the files go.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.4), layout="constrained")
        cliff, before, after = figure.subplots(1, 3)
        after.sharey(before)
        for index, run in enumerate(runs):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            # Ever thinner, so that a run stays visible under one that gave the same numbers.
            width = 1.4 + 3.6 * (len(runs) - 1 - index) / (len(runs) - 1)
            ladder = _ladder(run)
            _draw_shares(cliff, ladder, colour, marker, run["label"], width)
            arm = next(a for a in ladder if a["horizon"] == horizon)
            for axes, stage in ((before, "initial"), (after, "trained")):
                _draw_profile(axes, arm, stage, colour, "-", run["label"], width)
        _finish_cliff(cliff, runs[0], [a["horizon"] for run in runs for a in _ladder(run)])
        legend(cliff, loc="best")
        for axes, stage in ((before, "at initialisation"), (after, "after training")):
            _finish_profiles(axes, f"Total adjoint {stage}, T = {horizon}")
        legend(before, loc="lower left")
        title = f"{_task_words(runs[0])}, {runs[0]['config']['training']['steps']} steps"
        if any(run["config"]["model"]["core"] == "lstm" for run in runs):
            title += "; adjoint of an LSTM: of the joint state (h, c)"
        figure.suptitle(title)
        save(figure, folder / "comparison")


def _task_words(results: Results) -> str:
    return results["task"]["name"].replace("_", " ") + " task"


def _words(words: str) -> str:
    """Return a name or label as text, and no longer than there is room for."""
    return as_text(words, longest=40)


def _ladder(results: Results) -> list[Arm]:
    return [arm for arm in results["arms"] if not arm["is_contrast"]]


def _cycle(values: Sequence[str]) -> Sequence[str]:
    return tuple(values) * 8


def _draw_cliff(axes: Axes, results: Results) -> None:
    _draw_shares(axes, _ladder(results), COLOURS[0], MARKERS[0], results["config"]["model"]["name"])
    contrasts: dict[str, list[Arm]] = {}
    for arm in results["arms"]:
        if arm["is_contrast"]:
            contrasts.setdefault(arm["label"], []).append(arm)
    for (label, arms), colour, marker in zip(
        contrasts.items(), _cycle(CONTRAST_COLOURS), _cycle(MARKERS[1:]), strict=False
    ):
        _draw_shares(axes, arms, colour, marker, f"contrast: {label}")
    _finish_cliff(axes, results, [arm["horizon"] for arm in results["arms"]])
    legend(axes, loc="best")


def _draw_shares(
    axes: Axes, arms: Sequence[Arm], colour: str, marker: str, label: str, width: float = 1.6
) -> None:
    """Draw every seed as a point, and a line through the medians."""
    shares = [
        (arm["horizon"], run["error_over_know_nothing"])
        for arm in arms
        for run in arm["runs"]
        if run["error_over_know_nothing"] is not None
        and math.isfinite(run["error_over_know_nothing"])
    ]
    axes.plot(
        [horizon for horizon, share in shares if share > 0],
        [share for _, share in shares if share > 0],
        marker,
        color=colour,
        alpha=0.45,
        ms=5,
        mec="none",
    )
    _draw_zeros(axes, [horizon for horizon, share in shares if share == 0], colour)
    horizons = sorted({horizon for horizon, _ in shares})
    medians = [median(share for at, share in shares if at == horizon) for horizon in horizons]
    look = {"marker": marker, "ms": 5.5 + width, "mfc": "none", "lw": width}
    axes.plot(horizons, medians, color=colour, label=_words(label), **look)


def _finish_cliff(axes: Axes, results: Results, horizons: Sequence[int]) -> None:
    metric = results["task"]["metric"]
    error = "error rate" if metric == "accuracy" else metric
    axes.set_title("Where learning stops (median and every seed)")
    axes.set(xscale="log", yscale="log", xlabel="horizon T (time steps)")
    axes.set_ylabel(f"test {error} / {error} of knowing nothing")
    ticks = sorted(set(horizons))
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    low, high = axes.get_ylim()
    # Without a point (every seed diverged) the limits are not those of a logarithmic axis.
    axes.set_ylim(min(low, 0.05) if low > 0 else 0.05, max(high, 1.6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axhline(1, color="black", lw=1, ls="--")
    axes.axhline(LEARNED_BELOW, color="0.5", lw=0.8, ls=":")
    axes.axhline(SOLVED_BELOW, color="0.5", lw=0.8, ls=":")
    # Outside the axes, where no data can be under them.
    names = {1: "knowing\nnothing", LEARNED_BELOW: "learned", SOLVED_BELOW: "solved"}
    for bound, name in names.items():
        axes.annotate(
            name,
            (1.01, bound),
            xycoords=axes.get_yaxis_transform(),
            va="center" if bound == 1 else "top",
            fontsize=7.5,
            color="0.3",
        )


def _draw_profiles(axes: Axes, results: Results) -> None:
    ladder = _ladder(results)
    shades = mpl.colormaps["Blues"]
    for index, arm in enumerate(ladder):
        colour = shades(0.35 + 0.65 * index / max(1, len(ladder) - 1))
        _draw_profile(axes, arm, "initial", colour, "-", f"T = {arm['horizon']}")
        _draw_profile(axes, arm, "trained", colour, "--", None)
    contrasts = [arm for arm in results["arms"] if arm["is_contrast"]]
    for arm, colour in zip(contrasts, _cycle(CONTRAST_COLOURS), strict=False):
        _draw_profile(axes, arm, "initial", colour, "-", arm["title"])
        _draw_profile(axes, arm, "trained", colour, "--", None)
    _finish_profiles(axes, "Total adjoint, at initialisation (solid) and trained (dashed)")
    legend(axes, loc="best", ncols=2)


def _draw_profile(
    axes: Axes,
    arm: Arm,
    stage: str,
    colour: Any,
    line: str,
    label: str | None,
    width: float = 1.6,
) -> None:
    """Draw the mean over seeds of log10 of the norm, relative to the last step, against lag."""
    curves = [_log10_by_lag(run[stage]["state_norm"]) for run in arm["runs"]]
    lags = range(len(curves[0]))
    columns = [
        [v for v in column if v is not None and math.isfinite(v)]
        for column in zip(*curves, strict=True)
    ]
    means = [mean(column) if column else math.nan for column in columns]
    # A dot on the last lag: lines of different horizons lie on each other where slopes agree.
    # The shorter on top, or the longest would hide the rest.
    dot = {"marker": "o", "ms": 2.5 + width, "markevery": [-1], "zorder": 3 - len(lags) / 1e4}
    words = None if label is None else _words(label)
    axes.plot(lags, means, line, color=colour, lw=width, label=words, **dot)
    if len(curves) > 1:
        lows = [min(column) if column else math.nan for column in columns]
        highs = [max(column) if column else math.nan for column in columns]
        axes.fill_between(lags, lows, highs, color=colour, alpha=0.12, lw=0)
    zeros = [lag for lag in lags if any(curve[lag] is None for curve in curves)]
    _draw_zeros(axes, zeros, colour)


def _draw_zeros(axes: Axes, at: Sequence[float], colour: Any) -> None:
    """Draw a cross on the lower edge for each value that has no logarithm."""
    edge = axes.get_xaxis_transform()
    axes.plot(at, [0.02] * len(at), "x", color=colour, ms=4, transform=edge)


def _log10_by_lag(profile: Sequence[float | None]) -> list[float | None]:
    """Return log10 of norm over last norm by lag; ``None``: an exact zero, nan: not a number."""
    # Numbers that were not finite come back from JSON as None.
    norms = [math.nan if norm is None else norm for norm in reversed(profile)]
    last = norms[0] if norms[0] > 0 else math.nan
    return [None if norm == 0 else math.log10(norm / last) for norm in norms]


def _finish_profiles(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("lag $T - t$ (time steps back from the last)")
    axes.set_ylabel(r"$\log_{10}\ \|\partial L/\partial h_t\|\ /\ \|\partial L/\partial h_T\|$")
    axes.axhline(0, color="black", lw=0.8)


def _draw_losses(
    figure: Figure, results: Results, losses: Mapping[str, Sequence[Sequence[float]]]
) -> None:
    ladder = _ladder(results)
    contrasts = [arm for arm in results["arms"] if arm["is_contrast"]]
    rows = [row for row in (ladder, contrasts) if row]
    grid = figure.subplots(len(rows), max(map(len, rows)), sharex=True, sharey=True, squeeze=False)
    ceiling = 10 * max(arm["know_nothing_loss"] for arm in results["arms"])
    for row, panels in zip(rows, grid, strict=True):
        for axes in panels[len(row) :]:
            axes.set_axis_off()
        for axes, arm in zip(panels, row, strict=False):
            for seed, loss, colour in zip(
                results["config"]["seeds"], losses[arm["title"]], _cycle(COLOURS), strict=False
            ):
                axes.plot(*_smoothed(loss), color=colour, lw=1, label=f"seed {seed}")
            axes.axhline(arm["know_nothing_loss"], color="black", lw=1, ls="--")
            axes.set(title=_words(arm["title"]), yscale="log")
            axes.xaxis.set_tick_params(labelbottom=True)
    # What is above, an exploding first step, would flatten everything else.
    grid[0, 0].set_ylim(top=min(grid[0, 0].get_ylim()[1], ceiling))
    legend(grid[0, 0], loc="lower left")
    figure.supxlabel("training step")
    figure.supylabel("training loss")
    figure.suptitle(
        f"{_words(results['config']['model']['name'])}, {_task_words(results)}: loss of fresh "
        f"batches, a line per seed, mean of {_WINDOW} steps; dashed: knowing nothing"
    )


_WINDOW = 20


def _smoothed(loss: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return block means over ``_WINDOW`` steps and the last step of each block."""
    blocks = [loss[i : i + _WINDOW] for i in range(0, len(loss), _WINDOW)]
    ends = [min(len(loss), _WINDOW * (i + 1)) for i in range(len(blocks))]
    return ends, [mean(block) for block in blocks]
