"""Figures of the gradient on its way back: adjoints, Jacobians, Lyapunov exponents.

Shape legend: T time steps, K recorded training steps, S seeds (or samples), L lags, n values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rnn_cuda.instruments.plots._canvas import (
    as_text,
    canvas,
    figure_of,
    finish,
    look,
    matplotlib,
)
from rnn_cuda.instruments.plots._series import (
    Array,
    Band,
    Series,
    as_array,
    as_seeds,
    check_band,
    check_points,
    check_series,
    draw_seeds,
    median,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ADJOINT = r"$\|\partial L/\partial h_t\|$"
LAST_ADJOINT = r"$\|\partial L/\partial h_T\|$"


def adjoint_profile(
    norms: Series,
    trained: Series | None = None,
    *,
    relative: bool = False,
    stages: tuple[str, str] = ("at initialisation", "trained"),
    band: Band | None = (0.0, 1.0),
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the norm of the total adjoint dL/dh_t against the lag, a line per model.

    Args:
        norms: by label, norms in the order of time, ``(T,)``, or ``(S, T)`` with a row per seed:
            for instance the mean over samples of ``GradientFlow``'s ``(T, B)``. Lengths may differ.
        trained: the same after training, drawn dashed in the colour of its label.
        relative: divide by the norm at the last step (seed by seed; seeds where it is zero are left
            out).
        stages: what the legend calls solid and dashed lines, where there are both.
        band: quantiles over the seeds to shade; their whole range by default, None for no band.
            The line is the median.
        title: of the axes.
        ax: axes to draw in; a new figure by default.

    Returns:
        The figure. Its vertical axis is logarithmic; a cross at the foot says that the norm of at
        least one seed is exactly zero at that lag.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what was expected
            and what came.
        ImportError: matplotlib is missing.

    """
    check_series("norms", norms)
    check_band(band)
    groups = [("norms", norms, "-")]
    if trained is not None:
        groups.append(("trained", check_series("trained", trained), "--"))
    labels = list(dict.fromkeys(label for _, series, _ in groups for label in series))
    with canvas(ax) as axes:
        axes.set_yscale("log")
        for name, series, dash in groups:
            for label, values in series.items():
                by_lag = as_seeds(f"{name}[{label!r}]", values)[:, ::-1]
                if relative:
                    last = by_lag[:, :1]
                    by_lag = np.divide(
                        by_lag, last, out=np.full_like(by_lag, np.nan), where=last != 0
                    )
                draw_seeds(
                    axes,
                    np.arange(float(by_lag.shape[1])),
                    by_lag,
                    # One entry per colour in the legend; what is dashed is said once, below.
                    label=label if name == "norms" or label not in norms else None,
                    band=band,
                    log=True,
                    linestyle=dash,
                    **look(labels.index(label)),
                )
        if trained is not None:
            for dash, words in zip(("-", "--"), stages, strict=True):
                axes.plot([], [], color="0.3", linestyle=dash, label=as_text(words))
        return finish(
            axes,
            title,
            xlabel="lag (time steps back from the last)",
            ylabel=f"{ADJOINT} / {LAST_ADJOINT}" if relative else ADJOINT,
        )


def adjoint_heatmap(
    norms: Any,
    steps: Any = None,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the norm of dL/dh_t as colour, over training (across) and time steps (up).

    Args:
        norms: ``(K, T)``, or ``(S, K, T)``, of which the median over seeds is shown.
        steps: training step of each record, ``(K,)``, increasing; 1 to K by default.
        title: of the axes.
        ax: axes to draw in; a new figure by default.

    Returns:
        The figure. Colour is logarithmic; exact zeros are grey and what is not finite is white.

    Raises:
        TypeError, ValueError, ImportError: as in :func:`adjoint_profile`.

    """
    array = as_array("norms", norms)
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"norms: expected shape (K, T) or (seeds, K, T), got {array.shape}")
    if (array < 0).any():
        raise ValueError(f"norms: expected no negative value, got {array.min()}")
    array = np.where(np.isinf(array), np.nan, array)
    if array.ndim == 3:
        seeds, count, length = array.shape
        array = median(array.reshape(seeds, -1), log=True).reshape(count, length)
    count, length = array.shape
    x = check_points("steps", steps, count)
    if (np.diff(x) <= 0).any():
        raise ValueError("steps: expected increasing training steps")
    mpl = matplotlib()
    with canvas(ax) as axes:
        from matplotlib.colors import ListedColormap, LogNorm
        from matplotlib.patches import Patch

        edges = _edges(x), np.arange(length + 1.0) + 0.5
        positive = np.ma.masked_where(~(array > 0), array)
        scale = LogNorm() if positive.count() else None
        image = axes.pcolormesh(*edges, positive.T, cmap=mpl.colormaps["viridis"], norm=scale)
        zeros = np.ma.masked_where(array != 0, np.ones_like(array))
        if zeros.count():
            axes.pcolormesh(*edges, zeros.T, cmap=ListedColormap(["0.75"]))
            # Below the axes: anywhere inside it would hide data.
            axes.legend(
                handles=[Patch(color="0.75", label="exactly 0")],
                loc="upper left",
                bbox_to_anchor=(0, -0.12),
            )
        axes.grid(visible=False)
        if positive.count():
            figure_of(axes).colorbar(image, ax=axes, label=ADJOINT)
        if title is not None:
            axes.set_title(as_text(title))
        axes.set(xlabel="training step", ylabel="time step $t$")
        return figure_of(axes)


def _edges(centres: Array) -> Array:
    """Return the borders between cells around ``centres``, and the two outer ones."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    between = (centres[1:] + centres[:-1]) / 2
    first, last = 2 * centres[0] - between[0], 2 * centres[-1] - between[-1]
    return np.concatenate([[first], between, [last]])


def lyapunov_spectrum(
    exponents: Series,
    *,
    band: Band | None = (0.0, 1.0),
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw Lyapunov exponents against their index, a line per label (before, after, ...).

    Args:
        exponents: by label, ``(n,)`` or ``(S, n)``, natural logarithms per time step, as
            ``lyapunov_exponents`` returns them (a row per sample).
        band: as in :func:`adjoint_profile`.
        title: of the axes.
        ax: axes to draw in; a new figure by default.

    Returns:
        The figure, with a line at zero, where perturbations neither grow nor decay. A cross at the
        foot stands for -inf: a Jacobian that takes a direction to exactly zero.

    Raises:
        TypeError, ValueError, ImportError: as in :func:`adjoint_profile`.

    """
    check_series("exponents", exponents)
    check_band(band)
    with canvas(ax) as axes:
        axes.axhline(0, color="black", linewidth=0.8)
        for index, (label, values) in enumerate(exponents.items()):
            array = as_seeds(f"exponents[{label!r}]", values)
            x = np.arange(1.0, array.shape[1] + 1)
            draw_seeds(axes, x, array, label=label, band=band, log=False, **look(index))
        return finish(
            axes,
            title,
            zeros=r"$-\infty$",
            xlabel="index $i$",
            ylabel=r"Lyapunov exponent $\lambda_i$ (per time step)",
        )


def jacobian_singular_values(
    log10_values: Any,
    lags: Sequence[int],
    *,
    indices: Sequence[int] | None = None,
    band: Band | None = (0.0, 1.0),
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the singular values of dh_T/dh_{T-k} against their index, a line per lag k.

    Args:
        log10_values: ``(L, n)``, or ``(L, S, n)`` with samples or seeds, log10 of the values, as
            ``instruments.jacobian_singular_values`` returns them; -inf is an exact zero.
        lags: k, ``(L,)``.
        indices: i of each value, ``(n,)``, 1 for the largest; 1 to n by default.
        band: as in :func:`adjoint_profile`.
        title: of the axes.
        ax: axes to draw in; a new figure by default.

    Returns:
        The figure; lags are darker the longer they are. A cross at the foot is an exact zero.

    Raises:
        TypeError, ValueError, ImportError: as in :func:`adjoint_profile`.

    """
    array = as_array("log10_values", log10_values)
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            f"log10_values: expected shape (lags, n) or (lags, seeds, n), got {array.shape}"
        )
    if len(lags) != len(array):
        raise ValueError(f"lags: expected {len(array)} of them, got {len(lags)}")
    check_band(band)
    mpl = matplotlib()
    with canvas(ax) as axes:
        order = np.argsort(np.argsort(lags))
        for lag, rank, values in zip(lags, order, array, strict=True):
            shade = mpl.colormaps["Blues"](0.35 + 0.65 * rank / max(1, len(lags) - 1))
            shape = {"color": shade, "marker": look(rank)["marker"], "markersize": 4}
            rows = np.atleast_2d(values)
            x = check_points("indices", indices, rows.shape[1])
            draw_seeds(axes, x, rows, label=f"lag {lag}", band=band, log=False, **shape)
        axes.axhline(0, color="black", linewidth=0.8)
        return finish(
            axes,
            title,
            xlabel="index $i$",
            ylabel=r"$\log_{10}\ \sigma_i(\partial h_T / \partial h_{T-k})$",
        )
