"""Figures of a training run: loss, gradient norms, the recurrent matrix, where learning stops.

Shape legend: K recorded training steps, S seeds, N horizons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rnn_cuda.instruments.plots._canvas import (
    as_text,
    canvas,
    canvases,
    figure_of,
    finish,
    look,
    mark_zeros,
)
from rnn_cuda.instruments.plots._series import (
    Band,
    Series,
    as_seeds,
    check_band,
    check_points,
    check_series,
    draw_seeds,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def loss_curves(
    losses: Series,
    steps: Any = None,
    *,
    know_nothing: float | None = None,
    band: Band | None = (0.0, 1.0),
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the task's loss against the training step, a line per label.

    Args:
        losses: by label, ``(K,)`` or ``(S, K)``; what is not finite (diverged) is left out.
        steps: training step of each value, ``(K,)``; 1 to K by default.
        know_nothing: loss of the best prediction that ignores the input; drawn dashed.
        band: as in :func:`adjoint_profile`.
        title: of the axes.
        ax: axes to draw in; a new figure by default.

    Returns:
        The figure; the vertical axis is logarithmic, a cross at its foot an exact zero.

    Raises:
        TypeError, ValueError, ImportError: as in :func:`adjoint_profile`.

    """
    check_series("losses", losses)
    check_band(band)
    with canvas(ax) as axes:
        axes.set_yscale("log")
        _draw_over_training(axes, "losses", losses, steps, band, log=True)
        if know_nothing is not None:
            axes.axhline(
                know_nothing, color="black", linewidth=1, linestyle="--", label="knowing nothing"
            )
        return finish(axes, title, xlabel="training step", ylabel="loss")


def gradient_norms(
    norms: Series,
    threshold: float,
    steps: Any = None,
    *,
    band: Band | None = (0.0, 1.0),
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the gradient's norm before clipping, the threshold, and the share that was clipped.

    Args:
        norms: by label, ``(K,)`` or ``(S, K)``, the global norm before it is clipped.
        threshold: what larger norms are clipped to.
        steps: as in :func:`loss_curves`.
        band: as in :func:`adjoint_profile`.
        title: of the axes.
        ax: axes to draw in; a new figure by default.

    Returns:
        The figure; the legend gives the share of all steps and seeds above the threshold (what is
        not finite counts as above). Crosses at the foot are exact zeros.

    Raises:
        TypeError, ValueError, ImportError: as in :func:`adjoint_profile`.

    """
    check_series("norms", norms)
    check_band(band)
    if not threshold > 0:
        raise ValueError(f"threshold: expected a number above 0, got {threshold}")
    named = {}
    for label, values in norms.items():
        array = as_seeds(f"norms[{label!r}]", values)
        clipped = (~(array <= threshold)).mean()
        named[f"{label} ({clipped:.0%} clipped)"] = array
    with canvas(ax) as axes:
        axes.set_yscale("log")
        _draw_over_training(axes, "norms", named, steps, band, log=True)
        axes.axhline(threshold, color="black", linewidth=1, linestyle="--", label="threshold")
        return finish(axes, title, xlabel="training step", ylabel="gradient norm before clipping")


def recurrent_weights(
    first_adjoint: Series,
    spectral_radius: Series,
    margin: Series,
    steps: Any = None,
    *,
    margin_label: str | None = None,
    band: Band | None = (0.0, 1.0),
    ax: Sequence[Axes] | None = None,
) -> Figure:
    """Draw, over training, the norm of dL/dh_0, the spectral radius of U, and a margin to a bound.

    Args:
        first_adjoint: by label, ``(K,)`` or ``(S, K)``: norm of the adjoint at the first step.
        spectral_radius: the same for the largest absolute eigenvalue of U.
        margin: the same for the distance to a bound; zero is the bound. Without a
            ``margin_label``, ``1 - sigma_max(U) max f'``: above zero the gradient is sure to
            vanish (Pascanu, Mikolov & Bengio, 2013).
        steps: as in :func:`loss_curves`.
        margin_label: what the margin is.
        band: as in :func:`adjoint_profile`.
        ax: three axes to draw in; a new figure by default.

    Returns:
        The figure, three panels. Only the first is logarithmic; crosses at its foot are zeros.

    Raises:
        TypeError, ValueError, ImportError: as in :func:`adjoint_profile`.

    """
    if margin_label is None:
        margin_words = r"margin $1 - \sigma_{\max}(U)\, \max f'$"
    else:
        margin_words = as_text(margin_label)
    panels = (
        ("first_adjoint", first_adjoint, r"$\|\partial L/\partial h_0\|$", None),
        ("spectral_radius", spectral_radius, r"spectral radius $\rho(U)$", 1.0),
        ("margin", margin, margin_words, 0.0),
    )
    for name, series, _, _ in panels:
        check_series(name, series)
    check_band(band)
    with canvases(ax, 3, (11.5, 3.6), sharex=True) as grid:
        for axes, (name, series, words, bound) in zip(grid, panels, strict=True):
            if bound is None:
                axes.set_yscale("log")
            else:
                axes.axhline(bound, color="black", linewidth=0.8)
            _draw_over_training(axes, name, series, steps, band, log=bound is None)
            finish(axes, None, xlabel="training step", ylabel=words)
        return figure_of(grid[0])


def horizon_cliff(
    errors: Series,
    horizons: Sequence[int],
    *,
    share_solved: bool = False,
    learned_below: float = 0.25,
    solved_below: float = 0.1,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw where learning stops: the error, or the share of seeds that solve it, against T.

    Args:
        errors: by label, ``(N,)`` or ``(S, N)``: test error over that of knowing nothing, at each
            horizon. nan (no such run) is left out; inf (diverged) counts as not solved.
        horizons: T, ``(N,)``.
        share_solved: draw the share of seeds below ``solved_below`` instead of the errors.
        learned_below: drawn dotted in the figure of errors.
        solved_below: as above.
        title: of the axes.
        ax: axes to draw in; a new figure by default.

    Returns:
        The figure. Errors: every seed as a dot, a line through the medians, 1 (knowing nothing)
        dashed, crosses at the foot for exact zeros.

    Raises:
        TypeError, ValueError, ImportError: as in :func:`adjoint_profile`.

    """
    check_series("errors", errors)
    x = check_points("horizons", horizons, len(horizons))
    with canvas(ax) as axes:
        _set_horizons(axes, x)
        if not share_solved:
            axes.set_yscale("log")
        for index, (label, values) in enumerate(errors.items()):
            array = as_seeds(f"errors[{label!r}]", values, len(x))
            # Ever thinner, so that a line stays visible under one with the same numbers.
            width = 1.5 + 2 * (1 - (index + 1) / len(errors))
            style = {**look(index), "linewidth": width, "markersize": 3 + 1.5 * width}
            if share_solved:
                counts = (~np.isnan(array)).sum(axis=0)
                solved = (array < solved_below).sum(axis=0)
                share = np.divide(solved, counts, out=np.full(len(x), np.nan), where=counts > 0)
                axes.plot(x, share, label=as_text(label), **style)
                continue
            dots = np.where(array > 0, array, np.nan)
            dots_style = {**style, "linestyle": "none", "alpha": 0.45, "markeredgecolor": "none"}
            axes.plot(np.tile(x, len(array)), dots.ravel(), **dots_style)
            draw_seeds(axes, x, array, label=label, band=None, log=True, **style)
        if share_solved:
            axes.set_ylim(-0.05, 1.05)
            words = f"share of seeds with error below {solved_below:g}"
            return finish(axes, title, xlabel=_HORIZON, ylabel=words)
        axes.axhline(1, color="black", linewidth=1, linestyle="--", label="knowing nothing")
        for bound, words in ((learned_below, "learned, solved"), (solved_below, None)):
            axes.axhline(bound, color="0.5", linewidth=0.8, linestyle=":", label=words)
        return finish(axes, title, xlabel=_HORIZON, ylabel="error / error of knowing nothing")


def quality_by_horizon(
    scores: Series,
    horizons: Sequence[int],
    *,
    score_label: str,
    references: Series | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw a score in its own unit against T, a line per label, beside simple methods.

    Args:
        scores: by label, ``(N,)`` or ``(S, N)``; what is nan (no such run) is left out.
        horizons: T, ``(N,)``.
        score_label: what the score is, with its unit.
        references: by label, ``(N,)``: the scores of simple methods; drawn dashed, in grey.
        title: of the axes.
        ax: axes to draw in; a new figure by default.

    Returns:
        The figure: every seed as a dot, a line through the medians.

    Raises:
        TypeError, ValueError, ImportError: as in :func:`adjoint_profile`.

    """
    check_series("scores", scores)
    x = check_points("horizons", horizons, len(horizons))
    with canvas(ax) as axes:
        _set_horizons(axes, x)
        for index, (label, values) in enumerate(scores.items()):
            array = as_seeds(f"scores[{label!r}]", values, len(x))
            style = look(index)
            axes.plot(np.tile(x, len(array)), array.ravel(), **{**style, "linestyle": "none"})
            draw_seeds(axes, x, array, label=label, band=None, log=False, **style)
        for index, (label, values) in enumerate((references or {}).items()):
            (array,) = as_seeds(f"references[{label!r}]", values, len(x))
            dashes = {"linestyle": (0, (4, 1 + 2 * index)), "linewidth": 1, "color": "0.35"}
            if len(x) == 1:
                axes.axhline(array[0], label=as_text(label), **dashes)
            else:
                axes.plot(x, array, label=as_text(label), **dashes)
        return finish(axes, title, xlabel=_HORIZON, ylabel=as_text(score_label))


def solved_by_ratio(
    log10_ratios: Series,
    errors: Series,
    *,
    solved_below: float = 0.1,
    decades: float = 1.0,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the share of runs that solve their task against the gradient that they began with.

    Args:
        log10_ratios: by label, one number per run, ``(R,)``: log10 of the adjoint's norm at the
            first step over that at the last, at initialisation. -inf for an exact zero; what is nan
            is left out.
        errors: the same labels: test error over that of knowing nothing. inf (diverged) counts as
            not solved; what is nan is left out.
        solved_below: what counts as solved.
        decades: runs are taken together whose ratios lie in the same interval of this width.
        title: of the axes.
        ax: axes to draw in; a new figure by default.

    Returns:
        The figure: a point at the middle of every interval that has runs, with a line per label.
        Crosses at the foot say that a label has runs with a ratio of exactly zero; these are not in
        any share.

    Raises:
        TypeError, ValueError, ImportError: as in :func:`adjoint_profile`.

    """
    check_series("log10_ratios", log10_ratios)
    check_series("errors", errors)
    if not decades > 0:
        raise ValueError(f"decades: expected a number above 0, got {decades}")
    if set(log10_ratios) != set(errors):
        odd = sorted(set(log10_ratios) ^ set(errors))
        raise ValueError(f"errors: expected the labels of log10_ratios, but these differ: {odd}")
    with canvas(ax) as axes:
        smallest = 0.0
        for index, (label, values) in enumerate(log10_ratios.items()):
            ratios = as_seeds(f"log10_ratios[{label!r}]", values)[0]
            error = as_seeds(f"errors[{label!r}]", errors[label], len(ratios))[0]
            known = np.isfinite(ratios) & ~np.isnan(error)
            bins = np.floor(ratios[known] / decades)
            middles = np.unique(bins)
            share = [(error[known][bins == each] < solved_below).mean() for each in middles]
            x = (middles + 0.5) * decades
            smallest = min([smallest, *x])
            axes.plot(x, share, label=as_text(label), **look(index))
            if np.isneginf(ratios).any():
                mark_zeros(axes, np.array([smallest - decades]), look(index)["color"])
        axes.set_ylim(-0.05, 1.05)
        return finish(
            axes,
            title,
            xlabel=rf"$\log_{{10}}$ of the initial ratio (by {decades:g} decades)",
            ylabel=f"share of runs with error below {solved_below:g}",
        )


_HORIZON = "horizon $T$ (time steps)"


def _set_horizons(axes: Axes, x: Any) -> None:
    """Make a logarithmic axis of horizons, each with its number."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(x.tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())


def _draw_over_training(
    axes: Axes, name: str, series: Series, steps: Any, band: Band | None, *, log: bool
) -> None:
    for index, (label, values) in enumerate(series.items()):
        array = as_seeds(f"{name}[{label!r}]", values)
        x = check_points("steps", steps, array.shape[1])
        thin = {**look(index), "linewidth": 1.1}
        draw_seeds(axes, x, array, label=label, band=band, log=log, **thin)
