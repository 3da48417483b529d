"""What the directions of a layer have of the operators' lists; see ``layer_forward.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from rnn_cuda.cells import cell_named


class DirectionOfLayer(NamedTuple):
    """What one direction of a layer has of the lists."""

    number: int
    reverse: bool
    states: list[Tensor]
    """The initial ones, ``(B, H)``; empty for zeros."""
    weight_ih: Tensor
    weight_hh: Tensor
    biases: list[Tensor]
    constants: list[Tensor]
    """Of a cell that has some, ``(H)`` each."""

    @property
    def h0(self) -> Tensor | None:
        """The first of `states`."""
        return self.states[0] if self.states else None

    def columns(self, sequence: Tensor) -> Tensor:
        """Return its features of a sequence of all directions', ``(.., D * H)``."""
        hidden = self.weight_hh.shape[1]
        if sequence.shape[-1] == hidden:
            return sequence
        return sequence.narrow(-1, self.number * hidden, hidden)


def directions_of(
    states: Sequence[Tensor], weights: Sequence[Tensor], direction: str, cell: str
) -> Iterator[DirectionOfLayer]:
    """Yield each direction of a layer."""
    count = 2 if direction == "both" else 1
    per_direction = len(weights) // count
    biases_end = per_direction - cell_named(cell).constants
    for d in range(count):
        own = weights[d * per_direction : (d + 1) * per_direction]
        weight_ih, weight_hh, *biases = own[:biases_end]
        reverse = direction == "reverse" or d == 1
        own_states = [state.select(0, d) for state in states]
        yield DirectionOfLayer(
            d, reverse, own_states, weight_ih, weight_hh, biases, list(own[biases_end:])
        )


def known_batch(
    sequence: Tensor, states: Sequence[Tensor | None], batch_sizes: Tensor | None
) -> int | None:
    """B, or None where it stands in batch_sizes alone and they have no data."""
    if batch_sizes is None:
        return sequence.shape[1]
    for state in states:
        if state is not None:
            return state.shape[1]
    return None if is_fake(batch_sizes) else int(batch_sizes[0])  # these have data on "meta" too
