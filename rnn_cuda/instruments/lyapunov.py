"""Lyapunov exponents of a recurrent layer along the trajectory that an input drives it through.

Shape legend: T time steps, B batch, S size of the carried state (an LSTM's is 2H), K exponents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rnn_cuda.arguments import check_int, check_positive_int
from rnn_cuda.linear_algebra import SegmentLength, extent, log_diagonal, normalised
from rnn_cuda.trajectory import WIDE, Recurrent, State, Trajectory, trajectory_of

# How far apart a segment may drive the tangents, as a factor: it costs as many digits of R_ii.
_SPREAD = 1e6


@torch.no_grad()
def lyapunov_exponents(
    module: Recurrent,
    input: Tensor,
    count: int,
    hx: State | None = None,
    *,
    warmup: int | None = None,
    layer: int = 0,
    reverse: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the ``count`` largest Lyapunov exponents of every sample's trajectory.

    A block of orthonormal tangents Q is carried along, J_t Q_{t-1} = Q_t R_t, and
    lambda_i = mean over t of log |(R_t)_ii|, in natural logarithms per time step (Benettin et al.,
    1980; for recurrent networks Engelken, Wolf and Abbott, 2023, and Vogt et al., 2022).
    J_t = ds_t/ds_{t-1}, where s is the state that the layer carries: h for an RNN and a GRU,
    (h, c) for an LSTM.

    Several steps are taken between two decompositions. R of a segment is the product of the R of
    its steps, so the exponents are the same; the segment is cut as soon as it drives the tangents
    further apart than a factor of 1e6, which costs six of 16 digits.

    Exponents come in the order of the decomposition, which is descending but for fluctuations of
    a finite trajectory. The mean over samples is ``.mean(0)``.

    Args:
        module: a recurrent layer of this package, nn.RNN, nn.GRU or nn.LSTM. Computed in
            float64, without dropout.
        input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, or ``(T, I)`` for a single sample.
            Zeros for an autonomous network.
        count: K, 1 to S.
        hx: initial states as the module takes them; zeros by default.
        warmup: how many steps at the beginning do not count, while the trajectory approaches its
            attractor and Q the directions of the exponents; a tenth of T by default.
        layer: which layer.
        reverse: whether its backward direction is meant.
        generator: where the first Q is drawn from.

    Returns:
        ``(B, K)``, float64. -inf where the product of Jacobians has a smaller rank (closed relus),
        or where one step takes a tangent below the resolution of float64.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what was expected
            and what was given.

    Cost: a forward pass of the layer with K tangents per sample, in one native call per segment
    (but for an LSTM with projections, and on CUDA for gated and leaky layers), and a QR
    decomposition of B matrices (S, K) per segment. Memory: the trajectory, and for the tangents and
    the coefficients of their steps up to 5 K S numbers per sample and step of a segment, which is
    one step or has tangents of at most 32 MiB.

    """
    trajectory, warmup = prepare(module, input, hx, count, warmup, layer, reverse)
    return exponents_of(trajectory, count, warmup, _SPREAD, generator)


def relaxation_time(exponent: Tensor | float) -> Tensor:
    """Return -1 / lambda, the time steps in which a perturbation shrinks by a factor of e.

    With the largest Lyapunov exponent this is the memory horizon that the trajectory allows.

    Args:
        exponent: lambda, any shape, in natural logarithms per step.

    Returns:
        float64, of that shape; infinity where lambda >= 0 (nothing is forgotten), 0 for -inf.

    """
    exponent = torch.as_tensor(exponent, dtype=WIDE)
    return torch.where(exponent >= 0, math.inf, -1 / exponent)


def prepare(
    module: Recurrent,
    input: Tensor,
    hx: State | None,
    count: int,
    warmup: int | None,
    layer: int,
    reverse: bool,
) -> tuple[Trajectory, int]:
    """Check arguments; return the trajectory of the layer and how many steps do not count."""
    check_positive_int("count", count)
    trajectory = trajectory_of(module, input, hx, layer=layer, reverse=reverse)
    if count > trajectory.size:
        raise ValueError(
            f"count: expected at most {trajectory.size}, the size of the state; got {count}"
        )
    if warmup is None:
        warmup = trajectory.length // 10
    check_int("warmup", warmup)
    if not 0 <= warmup < trajectory.length:
        raise ValueError(
            f"warmup: expected 0 to {trajectory.length - 1}, less than the length of input; "
            f"got {warmup}"
        )
    return trajectory, warmup


def exponents_of(
    trajectory: Trajectory,
    count: int,
    warmup: int,
    spread: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the exponents of every sample, ``(B, K)``, differentiable in what ``trajectory`` is.

    ``spread`` limits how far apart the tangents are driven between two decompositions.
    """
    device = trajectory.states.device
    start = torch.randn(
        trajectory.batch,
        trajectory.size,
        count,
        dtype=WIDE,
        generator=generator,
        device=device if generator is None else generator.device,
    )
    tangents = torch.linalg.qr(start.to(device)).Q.mT  # rows, (B, K, S)
    total = tangents.new_zeros(trajectory.batch, count)
    lost = torch.zeros_like(total, dtype=torch.bool)
    length = SegmentLength(tangents.numel(), spread)
    now = 0
    while now < trajectory.length:
        border = warmup if now < warmup else trajectory.length
        stop = now + length.up_to(border - now)
        columns, log_norms = normalised(trajectory.push(tangents, now, stop))
        q, r = torch.linalg.qr(columns.mT)
        diagonal = log_diagonal(r)
        logs = log_norms + diagonal
        if not length.accepts(stop - now, *extent(log_norms, logs, lost)):
            continue
        lost = lost | logs.isinf()
        if now >= warmup:
            total = total + logs
        tangents, now = q.mT, stop
    return (total / (trajectory.length - warmup)).masked_fill(lost, -math.inf)
