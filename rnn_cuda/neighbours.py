"""How the rows of a sequence follow each other in time, and sums over neighbouring ones.

"Rows" are a sequence flattened to (T * B, features), or the N rows of a packed one. Sizes are
T time steps, B batch, N = sum(batch_sizes) packed rows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

_Index = slice | Tensor


@dataclasses.dataclass(frozen=True)
class StepNeighbours:
    """Row numbers: row ``current[i]`` comes right after row ``previous[i]`` of the same sample.

    ``first`` and ``last`` are each sample's first and last row in the direction of processing, in
    the order of the samples.
    """

    current: _Index
    previous: _Index
    first: _Index
    last: _Index

    @classmethod
    def of(
        cls, sequence: Tensor, reverse: bool, batch_sizes: Tensor | None, batch: int | None = None
    ) -> StepNeighbours:
        """``batch`` spares a packed sequence the look at batch_sizes[0]."""
        if batch_sizes is None:
            rows, batch = sequence.shape[0] * sequence.shape[1], sequence.shape[1]
            later, earlier = slice(batch, rows), slice(0, rows - batch)
            begin, end = slice(0, batch), slice(rows - batch, rows)
        else:
            rows = sequence.shape[0]
            if batch is None:  # item(), because int() would ask torch.compile for a value
                batch = cast(int, batch_sizes[0].item())
            samples = torch.arange(batch)
            lengths = batch_sizes.shape[0] - torch.searchsorted(
                batch_sizes.flip(0).contiguous(), samples, right=True
            )
            first_rows = batch_sizes.cumsum(0) - batch_sizes
            step_back = batch_sizes[:-1].repeat_interleave(
                batch_sizes[1:], output_size=rows - batch
            )
            later = slice(batch, rows)
            earlier = (torch.arange(batch, rows) - step_back).to(sequence.device)
            begin = slice(0, batch)
            end = (first_rows[lengths - 1] + samples).to(sequence.device)
        if reverse:
            return cls(current=earlier, previous=later, first=end, last=begin)
        return cls(current=later, previous=earlier, first=begin, last=end)


def rows_of(sequence: Tensor) -> Tensor:
    """Return a sequence flattened to rows."""
    return sequence.reshape(math.prod(sequence.shape[:-1]), sequence.shape[-1])


def take(rows: Tensor, index: _Index) -> Tensor:
    """Return the rows of these numbers."""
    return rows[index] if isinstance(index, slice) else rows.index_select(0, index)


def add_at(rows: Tensor, index: _Index, values: Tensor) -> Tensor:
    """``rows`` with ``values`` added at ``index``, out of place; no row is named twice."""
    if isinstance(index, slice):
        return rows + pad(values, (0, 0, index.start, rows.shape[0] - index.stop))
    return rows.index_add(0, index, values)


def states_before(rows: Tensor, initial: Tensor | None, neighbours: StepNeighbours) -> Tensor:
    """The state before each row's step; zero at a sample's first step if it starts from None."""
    before = add_at(torch.zeros_like(rows), neighbours.current, take(rows, neighbours.previous))
    return before if initial is None else add_at(before, neighbours.first, initial)


def times_previous(
    states: Tensor, start: Tensor | None, m: Tensor, neighbours: StepNeighbours
) -> Tensor:
    """Rows of ``M s_{t-1}``, zero at a sample's first step if it starts from None."""
    product = add_at(
        torch.zeros_like(states), neighbours.current, take(states, neighbours.previous) @ m.mT
    )
    return product if start is None else add_at(product, neighbours.first, start @ m.mT)


def outer_with_previous(
    left: Tensor, states: Tensor, start: Tensor | None, neighbours: StepNeighbours
) -> Tensor:
    """``sum_t left_t s_{t-1}^T``: the gradient of the matrix that multiplies s_{t-1}."""
    total = take(left, neighbours.current).mT @ take(states, neighbours.previous)
    return total if start is None else total + take(left, neighbours.first).mT @ start
