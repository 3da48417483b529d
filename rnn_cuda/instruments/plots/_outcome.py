"""Figures of states and outcomes: histograms, remedies beside each other, speed against accuracy.

Shape legend: S seeds; states and gates may have any shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rnn_cuda.instruments.plots._canvas import (
    COLOURS,
    as_text,
    canvas,
    canvases,
    figure_of,
    finish,
    look,
    mark_zeros,
)
from rnn_cuda.instruments.plots._series import Array, Series, as_array, check_series, median
from rnn_cuda.instruments.saturation import Saturation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def saturation_histograms(
    states: Series,
    gates: Series | None = None,
    *,
    saturated_above: float = 0.95,
    bins: int = 40,
    ax: Sequence[Axes] | None = None,
) -> Figure:
    """Draw histograms of hidden states and of gates, with the share that is saturated.

    Args:
        states: by label, values of h (or tanh of the cell), any shape; or their
            `rnn_cuda.instruments.Saturation`, whose bins and share are drawn as they are.
        gates: by label, values of gates in [0, 1], any shape, or their ``Saturation``; a second
            panel.
        saturated_above: a state with ``|h|`` above it is saturated; so is a gate above it (open) or
            below one minus it (shut).
        bins: number of bins over [-1, 1] and over [0, 1]; states beyond, as of a relu, widen
            the range.
        ax: one axes, or two with ``gates``; a new figure by default.

    Returns:
        The figure; the legend gives the shares. Bars are densities: their area is 1.

    Raises:
        TypeError, ValueError, ImportError: as in :func:`adjoint_profile`.

    """
    check_series("states", states)
    panels = 1
    if gates is not None:
        check_series("gates", gates)
        panels = 2
    with canvases(ax, panels, (5.4 * panels, 3.8)) as grid:
        for axes in grid:
            axes.margins(y=0.25)  # room for the legend
        everything = (*states.values(), *(gates or {}).values())
        is_binned = any(isinstance(v, Saturation) for v in everything)
        values = {
            label: v if isinstance(v, Saturation) else _finite(f"states[{label!r}]", v)
            for label, v in states.items()
        }
        raw_values = (v for v in values.values() if not isinstance(v, Saturation))
        reach = max([1.0, *(np.abs(v).max(initial=0) for v in raw_values)])
        for index, (label, v) in enumerate(values.items()):
            if isinstance(v, Saturation):
                _draw_binned(grid[0], v, index, label)
                continue
            share = (np.abs(v) > saturated_above).mean()
            _histogram(grid[0], v, (-reach, reach), bins, index, f"{label}: {share:.0%}")
        legend = "share saturated" if is_binned else f"share with $|h|$ > {saturated_above:g}"
        finish(grid[0], None, legend_title=legend, xlabel="hidden state $h$", ylabel="density")
        if gates is not None:
            for index, (label, raw) in enumerate(gates.items()):
                if isinstance(raw, Saturation):
                    _draw_binned(grid[1], raw, index, label)
                    continue
                v = _finite(f"gates[{label!r}]", raw)
                if v.min() < 0 or v.max() > 1:
                    raise ValueError(
                        f"gates[{label!r}]: expected values in [0, 1], got {v.min()} to {v.max()}"
                    )
                shut, opened = (v < 1 - saturated_above).mean(), (v > saturated_above).mean()
                words = f"{label}: {shut:.0%}, {opened:.0%}"
                _histogram(grid[1], v, (0.0, 1.0), bins, index, words)
            low = f"{1 - saturated_above:.3g}"
            if not is_binned:
                legend = f"share < {low} (shut), > {saturated_above:g} (open)"
            finish(grid[1], None, legend_title=legend, xlabel="gate", ylabel="density")
        return figure_of(grid[0])


def _finite(name: str, values: Any) -> Array:
    array = as_array(name, values).ravel()
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values, got {array.size} with some that are not")
    return array


def _histogram(
    axes: Axes, values: Array, reach: tuple[float, float], bins: int, index: int, label: str
) -> None:
    density, edges = np.histogram(values, bins=bins, range=reach, density=True)
    _draw_density(axes, density, edges, index, label)


def _draw_binned(axes: Axes, values: Saturation, index: int, label: str) -> None:
    counts, edges = as_array("counts", values.counts), as_array("edges", values.edges)
    density = counts / (counts.sum() * np.diff(edges))
    words = label if np.isnan(values.share) else f"{label}: {values.share:.0%}"
    _draw_density(axes, density, edges, index, words)


def _draw_density(axes: Axes, density: Array, edges: Array, index: int, label: str) -> None:
    colour = look(index)["color"]
    dashes = ("-", "--", "-.", ":")[index % 4]
    axes.stairs(density, edges, color=colour, label=as_text(label), linewidth=1.6, linestyle=dashes)
    axes.stairs(density, edges, color=colour, alpha=0.12, fill=True)


def remedy_bars(
    scores: Series,
    *,
    score_label: str = "accuracy",
    know_nothing: float | None = None,
    log: bool = False,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw a bar per remedy, the median over its seeds, with every seed as a dot.

    Args:
        scores: by name of the remedy (drawn in this order, from the top), one number or ``(S,)``.
            What is not finite is left out.
        score_label: what is measured.
        know_nothing: score of the best prediction that ignores the input; drawn dashed.
        log: whether the axis is logarithmic; a cross at its foot is then an exact zero.
        title: of the axes.
        ax: axes to draw in; a new figure by default.

    Raises:
        TypeError, ValueError, ImportError: as in :func:`adjoint_profile`.

    """
    check_series("scores", scores)
    columns = [_seeds(f"scores[{name!r}]", values) for name, values in scores.items()]
    if log and any((column < 0).any() for column in columns):
        raise ValueError("scores: expected no negative value on a log axis")
    with canvas(ax, (6.4, 1.2 + 0.34 * len(scores))) as axes:
        if log:
            axes.set_xscale("log")
        rows = np.arange(len(columns))
        bars = [median(column[:, None], log=log)[0] for column in columns]
        axes.barh(rows, bars, height=0.62, color=COLOURS[0], alpha=0.35)
        for row, column in zip(rows, columns, strict=True):
            shown = column[column > 0] if log else column
            axes.plot(shown, np.full(len(shown), row), "o", color=COLOURS[0], markersize=4)
        if log:
            mark_zeros(axes, [r for r in rows if (columns[r] == 0).any()], COLOURS[0], left=True)
        if know_nothing is not None:
            axes.axvline(
                know_nothing, color="black", linewidth=1, linestyle="--", label="knowing nothing"
            )
        # A longer name would leave no room for the bars.
        axes.set_yticks(rows, [as_text(name, longest=40) for name in scores])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        return finish(axes, title, xlabel=as_text(score_label))


def speed_against_accuracy(
    seconds: Series,
    scores: Series,
    *,
    score_label: str = "accuracy",
    seconds_label: str = "seconds per training step",
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw what each model costs against what it reaches: medians, and every seed as a dot.

    Args:
        seconds: by label, one number or ``(S,)``, above 0.
        scores: the same labels; one number or ``(S,)``.
        score_label: what is measured.
        seconds_label: what the time is of.
        title: of the axes.
        ax: axes to draw in; a new figure by default.

    Returns:
        The figure; the time axis is logarithmic. Seeds are paired in order if there are as many of
        both, else each is drawn with the median of the other.

    Raises:
        TypeError, ValueError, ImportError: as in :func:`adjoint_profile`.

    """
    check_series("seconds", seconds)
    check_series("scores", scores)
    if set(seconds) != set(scores):
        odd = sorted(set(seconds) ^ set(scores))
        raise ValueError(f"scores: expected the labels of seconds, but these differ: {odd}")
    with canvas(ax) as axes:
        axes.set_xscale("log")
        for index, label in enumerate(seconds):
            x = _seeds(f"seconds[{label!r}]", seconds[label])
            y = _seeds(f"scores[{label!r}]", scores[label])
            if not (x > 0).all():
                raise ValueError(f"seconds[{label!r}]: expected numbers above 0, got {x.min()}")
            middle_x, middle_y = median(x[:, None], log=True)[0], median(y[:, None], log=False)[0]
            if len(x) != len(y):
                x = np.concatenate([x, np.full(len(y), middle_x)])
                y = np.concatenate([np.full(len(x) - len(y), middle_y), y])
            style = {**look(index), "linestyle": "none"}
            axes.plot(x, y, **{**style, "alpha": 0.4, "markersize": 4, "markeredgecolor": "none"})
            axes.plot([middle_x], [middle_y], label=as_text(label), **{**style, "markersize": 8})
        return finish(axes, title, xlabel=as_text(seconds_label), ylabel=as_text(score_label))


def _seeds(name: str, values: Any) -> Array:
    """Return ``(S,)`` from one number or one per seed; what is not finite becomes nan."""
    array = np.atleast_1d(as_array(name, values))
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: expected a number or shape (seeds,), got {array.shape}")
    return np.where(np.isfinite(array), array, np.nan)
