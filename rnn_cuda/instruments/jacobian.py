"""Products of Jacobians along a trajectory: their norms and singular values.

Shape legend: T time steps, B batch, S size of the carried state (H, or 2H for an LSTM), K probes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rnn_cuda.arguments import check_int, check_positive_int
from rnn_cuda.linear_algebra import GradedProduct, SegmentLength, largest, normalised
from rnn_cuda.trajectory import WIDE, Recurrent, State, Trajectory, trajectory_of

_LN10 = math.log(10)
_SPREAD = 1e6  # six of 16 digits of the smallest singular value


@torch.no_grad()
def jacobian_norm(
    module: Recurrent,
    input: Tensor,
    hx: State | None = None,
    *,
    lags: Sequence[int] | None = None,
    end: int | None = None,
    probes: int | None = None,
    layer: int = 0,
    reverse: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return log10 of the Frobenius norm of ds_T/ds_{T-k} for every lag k and sample.

    ds_T/ds_{T-k} = J_T J_{T-1} ... J_{T-k+1} with J_t = ds_t/ds_{t-1}, where s is the state that
    the layer carries: h for an RNN and a GRU, (h, c) side by side, held independent of each other,
    for an LSTM. Time is counted in the order of processing, from the initial state s_0. The norm of
    the identity (k = 0) is sqrt(S).

    Without ``probes`` the norm is exact: all S unit vectors travel back from T. With ``probes`` K,
    that many random sign vectors v do, and the estimate is the root of mean |v^T ds_T/ds_{T-k}|^2,
    whose square is unbiased (Hutchinson, 1990).

    The logarithm is returned because the norm itself leaves the range of floating point within a
    few thousand steps. Vectors are rescaled on the way, so nothing under- or overflows: -inf is an
    exact zero, as when every relu is closed.

    Args:
        module: a recurrent layer of this package, nn.RNN, nn.GRU or nn.LSTM. Computed in
            float64, without dropout.
        input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, or ``(T, I)`` for a single sample.
        hx: initial states as the module takes them; zeros by default.
        lags: the k, each from 0 to ``end``; all of them by default.
        end: T above, 1 to the length of ``input``, which is the default.
        probes: how many random vectors per sample; None for the exact norm.
        layer: which layer.
        reverse: whether its backward direction is meant.
        generator: where the signs are drawn from.

    Returns:
        ``(len(lags), B)``, float64.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what was expected
            and what was given.

    Cost: K (or S) backward passes of the layer for each sample, in segments of one native call for
    a FusedRNN and nn.RNN; K * S numbers per sample and step of a segment, at most 32 MiB or one
    step.

    """
    trajectory = trajectory_of(module, input, hx, layer=layer, reverse=reverse)
    end, lags = _check_lags(lags, end, trajectory.length)
    if probes is None:
        block = torch.eye(trajectory.size, dtype=WIDE, device=trajectory.states.device)
        block = block.expand(trajectory.batch, -1, -1)
    else:
        check_positive_int("probes", probes)
        block = _signs(
            (trajectory.batch, probes, trajectory.size), trajectory.states.device, generator
        )
    by_lag = _log_norms_by_lag(trajectory, block, end, max(lags))
    if probes is not None:
        by_lag = by_lag - math.log(probes) / 2
    return by_lag[list(lags)] / _LN10


def _log_norms_by_lag(trajectory: Trajectory, block: Tensor, end: int, furthest: int) -> Tensor:
    """Log of the root of the summed squares of the pulled rows: ``(furthest + 1, B)``."""
    rows, log_scale = normalised(block)
    found = [torch.logsumexp(2 * log_scale, dim=-1).unsqueeze(0) / 2]
    length = SegmentLength(elements_per_step=block.numel())
    stop = end
    while stop > end - furthest:
        start = stop - length.up_to(stop - (end - furthest))
        pulled, log_norms = normalised(trajectory.pull_each(rows, start, stop))
        alive = log_scale > -math.inf
        if not length.accepts(stop - start, largest(log_norms.abs()[:, alive])):
            continue
        found.append(torch.logsumexp(2 * (log_norms + log_scale), dim=-1).flip(0) / 2)
        rows, log_scale = pulled[0], log_scale + log_norms[0]
        stop = start
    return torch.cat(found)


@torch.no_grad()
def jacobian_singular_values(
    module: Recurrent,
    input: Tensor,
    lags: Sequence[int],
    hx: State | None = None,
    *,
    end: int | None = None,
    layer: int = 0,
    reverse: bool = False,
) -> Tensor:
    r"""Return log10 of all singular values of ds_T/ds_{T-k} for the given lags k and every sample.

    The product, the state s and the counting of time are those of :func:`jacobian_norm`. It is
    never multiplied out. It is kept as Q D X with Q orthogonal, D diagonal, of which only
    logarithms are stored, and X well conditioned, and made so again after every few steps (graded
    QR, as in Stewart, 1997); its singular values come from one-sided Jacobi rotations, which keep
    the relative accuracy of the small ones (Demmel and Veselic, 1992). So values that differ by
    hundreds of decades are right to many digits, where an SVD of the product has 16 decades below
    the largest.

    Args:
        module: as in :func:`jacobian_norm`, as are ``input``, ``hx``, ``end``, ``layer`` and
            ``reverse``.
        input: the sequence.
        lags: the k, each from 0 to ``end``.
        hx: initial states.
        end: T above.
        layer: which layer.
        reverse: whether its backward direction is meant.

    Returns:
        ``(len(lags), B, S)``, float64, descending. -inf is a zero: a value that a single segment
        brought below the resolution of float64, about 1e-13 of its column.

    Raises:
        TypeError, ValueError: as in :func:`jacobian_norm`.

    Cost: S backward passes of the layer per sample, a QR decomposition, O(S^3), every few steps,
    and about ten sweeps of rotations, O(S^3) each, per lag. Memory: a few S^2 per sample and lag.

    """
    trajectory = trajectory_of(module, input, hx, layer=layer, reverse=reverse)
    end, lags = _check_lags(lags, end, trajectory.length)
    product = GradedProduct(trajectory.batch, trajectory.size, trajectory.states.device)
    length = SegmentLength(trajectory.batch * trajectory.size * trajectory.size, _SPREAD)
    values = {}
    stop = end
    for lag in sorted(set(lags)):
        while stop > end - lag:
            start = stop - length.up_to(stop - (end - lag))
            factors = product.times(trajectory.pull(product.basis.mT, start, stop).mT)
            if length.accepts(stop - start, *factors.extent):
                product = factors.product
                stop = start
        values[lag] = product.log_singular_values()
    return torch.stack([values[lag] for lag in lags]) / _LN10


def _signs(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    drawn_on = device if generator is None else generator.device
    bits = torch.randint(2, shape, generator=generator, device=drawn_on)
    return (2 * bits - 1).to(device=device, dtype=WIDE)


def _check_lags(
    lags: Sequence[int] | None, end: int | None, length: int
) -> tuple[int, Sequence[int]]:
    if end is None:
        end = length
    check_int("end", end)
    if not 1 <= end <= length:
        raise ValueError(f"end: expected 1 to {length}, the length of input; got {end}")
    if lags is None:
        return end, range(end + 1)
    if not isinstance(lags, Sequence) or not lags:
        raise ValueError(f"lags: expected a sequence of one or more ints, got {lags!r}")
    for lag in lags:
        check_int("each of lags", lag)
        if not 0 <= lag <= end:
            raise ValueError(f"lags: expected each from 0 to {end} (end), got {lag}")
    return end, lags
