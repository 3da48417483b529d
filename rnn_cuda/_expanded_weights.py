"""Per-sample gradients by PyTorch's ExpandedWeights, as Opacus' ``grad_sample_mode="ew"`` asks.

``torch.nn.utils._per_sample_grad.call_for_per_sample_grads`` runs a module with weights that stand
for one copy per sample; the backward pass leaves the gradients of all copies in ``grad_sample``.
Such a weight refuses every function that does not say how that is done. ``linear`` says it, so a
layer runs here as a loop of those, as ``torch.nn.RNN`` does then.

Shape legend: T time steps, B batch, I input size, H hidden size, N = sum(batch_sizes) packed rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils._expanded_weights.expanded_weights_impl import (
    HANDLED_FUNCTIONS,
    ExpandedWeight,
    allow_smaller_batches,
)

from rnn_cuda.cells import Cell, State, cell_named
from rnn_cuda.operators.directions import directions_of
from rnn_cuda.reference import join_directions, run_steps


def are_among(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether one of these stands for one copy per sample."""
    return any(isinstance(tensor, ExpandedWeight) for tensor in tensors)


def run_direction(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    biases: Sequence[Tensor | None],
    *,
    reverse: bool,
    batch_sizes: Tensor | None,
) -> tuple[State, State]:
    """Do what `rnn_cuda.reference.run_direction` does.

    Samples of a packed sequence are counted in its own order, by length.
    """
    # Imported here, as the backend registers what is below.
    from rnn_cuda.backend import run_on_reference

    run_on_reference("there are no kernels for ExpandedWeights (gradients per sample)")
    rows = input.flatten(0, -2)
    hidden = weight_hh.shape[1]
    batch = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
    start = tuple(states) or (input.new_zeros(batch, hidden),) * cell.states
    bias_ih, bias_hh = (*biases, None, None)[:2]

    def step(row: int, size: int, previous: State) -> State:
        input_sums = linear(rows[row : row + size], weight_ih, bias_ih)
        return cell.step(input_sums, linear(previous[0], weight_hh, bias_hh), previous[-1])

    with allow_smaller_batches((weight_ih, weight_hh, bias_ih, bias_hh), {}):
        sequences, final_states = run_steps(step, start, rows.shape[0], batch_sizes, reverse)
    return tuple(each.view(*input.shape[:-1], hidden) for each in sequences), final_states


class _Layer:
    """The operator ``layer``, as `ExpandedWeight` calls what handles a function."""

    @staticmethod
    def apply(_names: tuple[str, ...], _function: Any, *arguments: Any) -> list[Tensor]:
        input, states, weights, cell, direction, batch_sizes, _ = arguments
        results = join_directions(
            run_direction(
                *(cell_named(cell), input, its.states, its.weight_ih, its.weight_hh, its.biases),
                reverse=its.reverse,
                batch_sizes=batch_sizes,
            )
            for its in directions_of(states, weights, direction, cell)
        )
        return list(results)


class _Step:
    """The operator ``step``."""

    @staticmethod
    def apply(_names: tuple[str, ...], _function: Any, *arguments: Any) -> list[Tensor]:
        input, states, (weight_ih, weight_hh, *biases), name = arguments
        cell, (bias_ih, bias_hh) = cell_named(name), (*biases, None, None)[:2]
        zeros = input.new_zeros(*input.shape[:-1], weight_hh.shape[1])
        h, *c = states or [zeros] * cell.states
        input_sums = linear(input, weight_ih, bias_ih)
        return list(cell.step(input_sums, linear(h, weight_hh, bias_hh), (h, *c)[-1]))


def register() -> None:
    """Let eager layers take such weights; to be called once the native library is loaded."""
    handlers: dict[Any, Any] = HANDLED_FUNCTIONS
    handlers[torch.ops.rnn_cuda.layer] = _Layer
    handlers[torch.ops.rnn_cuda.step] = _Step
