"""Lines with seed bands: from tensors to medians and quantiles, with zeros kept apart.

Shape legend: S seeds (or samples), X points along the horizontal axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from rnn_cuda.instruments.plots._canvas import as_text, mark_zeros

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]
Band = tuple[float, float]
Series = Mapping[str, Any]
"""By label: a tensor or array of one value per point, ``(X,)``, or one per seed, ``(S, X)``."""


def as_array(name: str, values: Any) -> Array:
    """Return a tensor (any device, dtype) or anything like an array as float64 in numpy."""
    if isinstance(values, torch.Tensor):
        return values.detach().double().cpu().numpy()
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected a tensor or an array of numbers ({error})") from error


def as_seeds(name: str, values: Any, points: int | None = None) -> Array:
    """Return ``(S, X)``; one row if there is no seed axis."""
    array = as_array(name, values)
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(f"{name}: expected shape (X,) or (seeds, X), got {array.shape}")
    array = np.atleast_2d(array)
    if points is not None and array.shape[1] != points:
        raise ValueError(f"{name}: expected {points} points, got {array.shape[1]}")
    return array


def check_series(name: str, series: Any) -> Series:
    """Raise TypeError unless ``series`` is a mapping by label, ValueError if it is empty."""
    if not isinstance(series, Mapping):
        raise TypeError(f"{name}: expected a mapping from labels, got {type(series).__name__}")
    if not series:
        raise ValueError(f"{name}: expected at least one label, got none")
    return series


def check_points(name: str, points: Any, count: int) -> Array:
    """Return positions on the horizontal axis, ``(X,)``; 1, 2, ... for None."""
    if points is None:
        return np.arange(1.0, count + 1)
    array = as_array(name, points)
    if array.shape != (count,):
        raise ValueError(f"{name}: expected shape ({count},), got {array.shape}")
    return array


def check_band(band: Band | None) -> None:
    """Raise ValueError unless ``band`` is None or two quantiles in order."""
    if band is not None and not 0 <= band[0] <= band[1] <= 1:
        raise ValueError(f"band: expected two quantiles between 0 and 1, in order; got {band}")


def quantile(values: Array, q: float) -> Array:
    """Return the order statistic nearest to quantile ``q`` in every column; nan: left out.

    No interpolation: between a zero and a number there is nothing to draw on a log axis.
    """
    ordered = np.sort(values, axis=0)  # nan last
    last = (~np.isnan(values)).sum(axis=0) - 1
    index = np.floor(q * last + 0.5).astype(int).clip(0)
    return np.take_along_axis(ordered, index[None], axis=0)[0]


def median(values: Array, *, log: bool) -> Array:
    """Return the median of every column; of two in the middle their (geometric) mean."""
    ordered = np.sort(values, axis=0)
    last = (~np.isnan(values)).sum(axis=0) - 1
    low, high = (
        np.take_along_axis(ordered, index.clip(0)[None], axis=0)[0]
        for index in (last // 2, (last + 1) // 2)
    )
    if log:
        return np.where(low == high, low, np.sqrt(low) * np.sqrt(high))
    with np.errstate(invalid="ignore"):  # -inf and -inf
        return np.where(low == high, low, (low + high) / 2)


def draw_seeds(
    axes: Axes,
    x: Array,
    values: Array,
    *,
    label: str | None,
    band: Band | None,
    log: bool,
    **line: Any,
) -> None:
    """Draw the median over seeds, a band, and a cross for each point where a seed is exactly zero.

    Args:
        axes: where; their scale is set by the caller.
        x: ``(X,)``.
        values: ``(S, X)``. With ``log``, not negative, and 0 is what has no logarithm; without, it
            is -inf (the logarithm of zero). What is nan or +inf is left out.
        label: for the legend, text.
        band: two quantiles.
        log: whether the vertical axis is logarithmic.
        line: properties of the line.
    """
    values = np.where(np.isposinf(values), np.nan, values)
    if log and (values < 0).any():
        raise ValueError(f"{label}: expected no negative value on a log axis, got {values.min()}")
    zero = 0.0 if log else -np.inf
    middle = median(values, log=log)
    shown = np.where(middle == zero, np.nan, middle)
    (drawn,) = axes.plot(x, shown, label=None if label is None else as_text(label), **line)
    # Markers tell lines apart where colours do not; eight are enough.
    drawn.set_markevery(max(1, len(x) // 8))
    if band is not None and len(values) > 1:
        low, high = (quantile(values, q) for q in band)
        shades = {"color": line["color"], "alpha": 0.15, "linewidth": 0}
        # From the foot, where the low end is zero: matplotlib draws what is not positive below it.
        if not log:
            low = np.where(np.isneginf(low), np.nan, low)
        axes.fill_between(x, low, high, **shades)
    mark_zeros(axes, x[(values == zero).any(axis=0)], line["color"])
