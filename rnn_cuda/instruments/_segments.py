"""How many steps a block of vectors may take before it is rescaled or made orthogonal again.

A product of many Jacobians is never formed: its vectors shrink or grow out of the range of floating
point, and all turn into the direction that grows most. So they are pushed through segments of a few
steps, one native call each, and put right in between. The segments are as long as the numbers
allow, which each segment itself shows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LONGEST = 64  # beyond, the cost of putting vectors right is hidden anyway
_ELEMENTS = 1 << 22  # of a segment's intermediate states: 32 MiB of float64
_LOG_SIZE = math.log(1e100)
_EPSILON = torch.finfo(torch.float64).eps


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
