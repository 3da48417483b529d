"""How much of a layer sits where its nonlinearity is flat.

Shape legend: T time steps, B batch, H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rnn_cuda.arguments import check_nonlinearity, check_positive_int, check_tensor, type_name
from rnn_cuda.cells import cell_of
from rnn_cuda.cells.elman import activation_derivative
from rnn_cuda.trajectory import WIDE, Recurrent, State, trajectory_of


class Saturation(NamedTuple):
    """What :func:`saturation` returns."""

    counts: Tensor
    """How many values lie in each bin, ``(bins,)``, int64."""
    edges: Tensor
    """The borders of the bins, ``(bins + 1,)``, float64."""
    share: float
    """The share of values that are saturated, 0 to 1."""
    mean_derivative: float
    """The mean of f'(z)."""


@torch.no_grad()
def saturation(
    h: Tensor, nonlinearity: str = "tanh", *, threshold: float = 0.95, bins: int = 50
) -> Saturation:
    r"""Return a histogram of activations, the share that is saturated and the mean of f'(z).

    f' is read off h = f(z): 1 - h^2 for tanh, h (1 - h) for sigmoid, [h > 0] for relu, 1 -
    exp(-h) for softplus, 1 for the identity. Its mean is the factor by which the nonlinearity
    by itself shrinks an adjoint. Counted as saturated are, for tanh, |h| > ``threshold``; for
    sigmoid, which is (1 + tanh(z / 2)) / 2, |2 h - 1| > ``threshold``; for relu, closed units
    (h <= 0); for softplus, units with f' < 1 - ``threshold``; for the identity, none.

    Args:
        h: activations, any shape: the output of a layer, or one of :func:`gate_activations`.
        nonlinearity: f, one of ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"identity"``,
            ``"softplus"``.
        threshold: above it a value counts as saturated; 0 to 1.
        bins: of the histogram, over -1 to 1 (tanh), 0 to 1 (sigmoid) or the range of ``h``.

    Returns:
        counts, edges, share and mean_derivative.

    Raises:
        TypeError, ValueError: an argument does not fit, or ``h`` is empty or has entries that are
            not finite.

    Cost: a few passes over ``h``, and its size in float64.

    """
    check_tensor("h", h)
    check_nonlinearity(nonlinearity)
    check_positive_int("bins", bins)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number from 0 to 1, got {threshold}")
    if h.numel() == 0 or not bool(h.isfinite().all()):
        raise ValueError(
            f"h: expected one or more values, all finite; got shape {tuple(h.shape)}"
            + (" with an infinity or NaN" if h.numel() else "")
        )
    h = h.to(WIDE)
    low, high = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0)}.get(
        nonlinearity, (float(h.min()), float(h.max()))
    )
    if low == high:
        low, high = low - 0.5, high + 0.5
    if nonlinearity == "tanh":
        saturated = h.abs() > threshold
    elif nonlinearity == "sigmoid":
        saturated = (2 * h - 1).abs() > threshold
    elif nonlinearity == "softplus":
        saturated = activation_derivative(h, nonlinearity) < 1 - threshold
    else:
        saturated = activation_derivative(h, nonlinearity) == 0
    return Saturation(
        counts=torch.histc(h, bins, low, high).to(torch.int64),
        edges=torch.linspace(low, high, bins + 1, dtype=WIDE, device=h.device),
        share=float(saturated.to(WIDE).mean()),
        mean_derivative=float(activation_derivative(h, nonlinearity).mean()),
    )


@torch.no_grad()
def gate_activations(
    module: Recurrent,
    input: Tensor,
    hx: State | None = None,
    *,
    layer: int = 0,
    reverse: bool = False,
) -> dict[str, Tensor]:
    r"""Return the activations of every gate of a GRU or an LSTM, at every step.

    GRU: ``"reset"`` and ``"update"`` (sigmoid), ``"new"`` (tanh). LSTM: ``"input"``, ``"forget"``
    and ``"output"`` (sigmoid), ``"cell"`` (tanh). They are not part of what the modules return, so
    the layer is run again, step by step, in float64 and without dropout.

    Args:
        module: a FusedGRU, FusedLSTM, nn.GRU or nn.LSTM.
        input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, or ``(T, I)`` for a single sample.
        hx: initial states as the module takes them; zeros by default.
        layer: which layer.
        reverse: whether its backward direction is meant.

    Returns:
        Each gate's ``(T, B, H)`` in float64, in the order of time.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what was expected
            and what was given.

    Cost: a forward pass in Python; about ten times T B H float64 numbers.

    """
    cell = cell_of(module)
    if cell is None or not cell.gate_names:
        raise TypeError(
            f"module should be a FusedGRU, FusedLSTM, nn.GRU or nn.LSTM, got: {type_name(module)}"
        )
    gates = trajectory_of(module, input, hx, layer=layer, reverse=reverse).gates
    return {name: gate.flip(0) if reverse else gate for name, gate in gates.items()}
