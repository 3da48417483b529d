"""Long products of matrices in floating point, with factors and results decades apart.

A product of many Jacobians is never formed: its vectors shrink or grow out of the range of floating
point, and all turn into the direction that grows most. So they are pushed through segments of a few
steps, one native call each, and put right in between: rescaled, or made orthogonal again. The
segments are as long as the numbers allow, which each segment itself shows.

Shape legend: B batch, K vectors, S size of the matrices.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

_EPSILON = torch.finfo(torch.float64).eps
_SWEEPS = 60  # of Jacobi rotations; about ten are needed
_LONGEST = 64  # beyond, the cost of putting vectors right is hidden anyway
_ELEMENTS = 1 << 22  # of a segment's intermediate states: 32 MiB of float64
_LOG_SIZE = math.log(1e100)


class SegmentLength:
    """Lengths at which vectors of norm 1 keep their digits until they are put right.

    Two things cost digits: norms near the ends of the range of floating point, and vectors that are
    driven apart, as all of them have the rounding errors of the largest.
    """

    def __init__(self, elements_per_step: int, spread: float = math.inf) -> None:
        """Start with one step; ``spread`` is how far apart a segment may drive its vectors."""
        self._log_spread = math.log(spread)
        self._longest = max(1, min(_LONGEST, _ELEMENTS // max(1, elements_per_step)))
        self._length = 1

    def up_to(self, remaining: int) -> int:
        """Return how many steps to try, at most ``remaining``."""
        return min(self._length, remaining)

    def accepts(self, steps: int, log_size: float, log_spread: float = 0.0) -> bool:
        """Say whether a segment of ``steps`` may stand; choose the next length either way.

        A single step always may: there is nothing to divide.

        Args:
            steps: the segment's.
            log_size: the largest absolute logarithm of a norm.
            log_spread: the logarithm of the ratio of the largest norm to the smallest.

        """
        load = max(log_size / _LOG_SIZE, log_spread / self._log_spread)
        affordable = steps / max(load, 1e-3)
        if load > 1 and steps > 1:
            self._length = max(1, min(steps // 2, int(affordable / 2)))
            return False
        # Rates vary along a trajectory: aim for two thirds of the limit, and grow step by step.
        wanted = int(min(affordable * 2 / 3, self._longest))
        self._length = max(1, min(wanted, 2 * max(self._length, steps)))
        return True


def normalised(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vectors along the last dimension at norm 1, and the logarithms of their norms.

    Zeros stay zero, with -inf. Nothing under- or overflows on the way.
    """
    scale = vectors.detach().abs().amax(-1, keepdim=True)
    is_zero = scale == 0
    scaled = vectors / torch.where(is_zero, 1, scale)
    norm = torch.where(is_zero, 1, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True))
    return scaled / norm, (scale.log() + norm.log()).squeeze(-1)


def log_diagonal(r: Tensor) -> Tensor:
    """Return log |R_ii| of the QR decomposition of columns of norm 1; -inf where it is noise.

    What rounding leaves of a column that depends on those before it, S * epsilon or so, says
    nothing.
    """
    diagonal = r.diagonal(dim1=-2, dim2=-1).abs()
    resolved = diagonal > 4 * r.shape[-1] * _EPSILON
    return torch.where(resolved, diagonal, 1).log().masked_fill(~resolved, -math.inf)


def extent(log_norms: Tensor, log_smallest: Tensor, ignored: Tensor) -> tuple[float, float]:
    """Return what `SegmentLength.accepts` asks for, of vectors ``(B, K)`` that are not ignored.

    Args:
        log_norms: of the vectors.
        log_smallest: of what is left of them to be resolved, such as R_ii.
        ignored: those that have become zero before.

    """
    highest = log_norms.masked_fill(ignored, -math.inf).amax(-1)
    lowest = log_smallest.masked_fill(ignored, math.inf).amin(-1)
    return largest(log_norms[~ignored].abs()), largest((highest - lowest)[~ignored.all(-1)])


def largest(values: Tensor) -> float:
    """Return the largest entry as a float, infinity if one is not a number, 0 if there is none."""
    if values.numel() == 0:
        return 0.0
    found = float(values.detach().max())
    return math.inf if math.isnan(found) else found


# ---- graded products -----------------------------------------------------------------------------


class GradedProduct:
    """A product with singular values hundreds of decades apart, all of them to be right.

    A = Q D X: Q orthogonal, D diagonal and graded, X well conditioned with rows of order 1.

    Attributes:
        basis: Q, ``(B, S, S)``.

    """

    def __init__(self, batch: int, size: int, device: torch.device) -> None:
        """Begin with the identity."""
        identity = torch.eye(size, dtype=torch.float64, device=device).expand(batch, -1, -1)
        self.basis = identity
        self._log_d = identity.new_zeros(batch, size)
        self._x = identity

    def times(self, pushed: Tensor) -> Factors:
        """Return M A, given ``pushed`` = M Q.

        The columns of M Q D are sorted by their norms and factored, M Q D = Q' R' = Q' D' X'. The
        decomposition is made of columns of norm 1, so D need never be a number.
        """
        columns, log_norms = normalised(pushed.mT)
        gone = self._log_d.isinf()
        amounts, order = (log_norms + self._log_d).sort(dim=-1, descending=True)
        log_norms, gone = log_norms.gather(-1, order), gone.gather(-1, order)
        q, r = torch.linalg.qr(_take_rows(columns, order).mT)
        diagonal = log_diagonal(r)
        log_d = diagonal + amounts

        triangle = r * (amounts.unsqueeze(-2) - log_d.unsqueeze(-1)).exp()
        identity = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
        triangle = torch.where(log_d.isinf().unsqueeze(-1), identity, triangle)
        product = copy.copy(self)
        product.basis, product._log_d = q, log_d
        product._x = triangle.triu() @ _take_rows(self._x, order)

        return Factors(product, extent(log_norms, log_norms + diagonal, gone))

    def log_singular_values(self) -> Tensor:
        """Return the logarithms, descending, ``(B, S)``; -inf for zeros."""
        return log_singular_values(self._x, self._log_d)


class Factors(NamedTuple):
    """A product, and what its last factor did to the columns of Q, as `SegmentLength` asks it."""

    product: GradedProduct
    extent: tuple[float, float]


def log_singular_values(x: Tensor, log_d: Tensor) -> Tensor:
    """Return log singular values of ``diag(exp(log_d)) x``, descending: ``(B, S)``.

    One-sided Jacobi on the rows: rotate pairs until all are orthogonal; their norms are the
    singular values. A row is a direction times exp(logarithm), and a rotation needs nothing but the
    ratio of two norms and the cosine, so it does not matter how far apart the norms are. All pairs
    of a round of a tournament turn at once.

    Args:
        x: ``(B, S, S)``.
        log_d: ``(B, S)``.

    """
    size = log_d.shape[-1]
    rows, log_norms = normalised(x)
    log_norms = log_norms + log_d
    rows = rows.masked_fill(log_norms.isinf().unsqueeze(-1), 0)
    if size % 2:  # a bye
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
        log_norms = torch.nn.functional.pad(log_norms, (0, 1), value=-math.inf)
    for _ in range(_SWEEPS):
        largest_cosine = rows.new_zeros(())
        for _ in range(rows.shape[1] - 1):
            rows, log_norms, cosine = _rotate(rows, log_norms)
            largest_cosine = torch.maximum(largest_cosine, cosine)
        # What a sweep leaves of the cosines, and in the norms, is of the order of their squares.
        if size * largest_cosine**2 <= _EPSILON:
            break
    return log_norms.sort(dim=-1, descending=True).values[:, :size]


def _rotate(rows: Tensor, log_norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make row i orthogonal to row i + S / 2, and seat everyone for the next round.

    Also return the largest cosine there was.
    """
    (a, b), (log_a, log_b) = rows.chunk(2, 1), log_norms.chunk(2, 1)
    cosine = (a * b).sum(-1)
    # The rotation's tangent is ratio * tau, where ratio is that of the shorter row to the longer:
    # so written, it does not matter whether the ratio underflows.
    log_ratio = torch.where(cosine == 0, 0, -(log_a - log_b).abs())
    ratio_squared, gap = (2 * log_ratio).exp(), -torch.expm1(2 * log_ratio)
    root = (gap * gap + 4 * ratio_squared * cosine * cosine).sqrt()
    tau = torch.where(cosine == 0, 0, 2 * cosine / (gap + root))
    shrink = -torch.log1p(ratio_squared * tau * tau) / 2  # log of the rotation's cosine
    a_is_longer = log_a >= log_b
    of_longer, of_shorter = ratio_squared * tau, -tau
    new_a = torch.addcmul(a, torch.where(a_is_longer, of_longer, of_shorter).unsqueeze(-1), b)
    new_b = torch.addcmul(b, torch.where(a_is_longer, of_shorter, of_longer).unsqueeze(-1), a)
    rows = _next_round(new_a, new_b)
    norms = torch.linalg.vector_norm(rows, dim=-1)  # between 0 and 2: nothing to scale
    log_norms = _next_round(log_a + shrink, log_b + shrink) + norms.log()
    rows = rows / torch.where(norms == 0, 1, norms).unsqueeze(-1)
    return rows, log_norms, cosine.abs().max()


def _next_round(top: Tensor, bottom: Tensor) -> Tensor:
    """Move everyone but the first one seat further (the circle method): all pairs meet once."""
    if top.shape[1] == 1:
        return torch.cat([top, bottom], dim=1)
    return torch.cat([top[:, :1], bottom[:, :1], top[:, 1:-1], bottom[:, 1:], top[:, -1:]], dim=1)


def _take_rows(matrix: Tensor, order: Tensor) -> Tensor:
    return matrix.gather(-2, order.unsqueeze(-1).expand_as(matrix))


def row_norms(rows: Tensor) -> Tensor:
    """Euclidean norms over the last dimension, in float64.

    They reach down to where the values themselves vanish. Squares of narrower types cannot vanish
    in float64; those of float64, in units of a row's largest value, are of no consequence if they
    do.
    """
    if rows.dtype != torch.float64:
        return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    unit = rows.detach().abs().amax(-1)
    unit = torch.where((unit == 0) | unit.isinf(), 1.0, unit)
    return unit * torch.linalg.vector_norm(rows / unit.unsqueeze(-1), dim=-1)
