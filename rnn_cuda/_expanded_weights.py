"""Per-sample gradients by PyTorch's ExpandedWeights, as Opacus' ``grad_sample_mode="ew"`` asks.

``torch.nn.utils._per_sample_grad.call_for_per_sample_grads`` runs a module with weights that stand
for one copy per sample; the backward pass leaves the gradients of all copies in ``grad_sample``.
Such a weight refuses every function that does not say how that is done. ``linear`` says it, so a
layer runs here as a loop of those, as ``torch.nn.RNN`` does then.

Shape legend: T time steps, B batch, I input size, H hidden size, N = sum(batch_sizes) packed rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils._expanded_weights.expanded_weights_impl import (
    HANDLED_FUNCTIONS,
    ExpandedWeight,
    allow_smaller_batches,
)

from rnn_cuda.cells.cell import State
from rnn_cuda.cells.elman import activation
from rnn_cuda.operators.directions import directions_of
from rnn_cuda.reference import join_directions, run_steps


def are_among(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether one of these stands for one copy per sample."""
    return any(isinstance(tensor, ExpandedWeight) for tensor in tensors)


def elman_rnn(
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `rnn_cuda.functional.elman_rnn` on an input ``(T, B, I)`` or packed ``(N, I)``.

    Samples of a packed sequence are counted in its own order, by length.
    """
    # Imported here, as the backend registers what is below.
    from rnn_cuda.backend import run_on_reference

    run_on_reference("there are no kernels for ExpandedWeights (gradients per sample)")
    rows = input.flatten(0, -2)
    hidden = weight_hh.shape[0]
    batch = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
    state = input.new_zeros(batch, hidden) if h0 is None else h0

    def step(row: int, size: int, previous: State) -> State:
        z = linear(rows[row : row + size], weight_ih, bias_ih)
        return (activation(z + linear(previous[0], weight_hh, bias_hh), nonlinearity),)

    with allow_smaller_batches((weight_ih, weight_hh, bias_ih, bias_hh), {}):
        (states,), (h_n,) = run_steps(step, (state,), rows.shape[0], batch_sizes, reverse)
    return states.view(*input.shape[:-1], hidden), h_n


class _Layer:
    """The operator ``layer``, as `ExpandedWeight` calls what handles a function."""

    @staticmethod
    def apply(_names: tuple[str, ...], _function: Any, *arguments: Any) -> list[Tensor]:
        input, states, weights, cell, direction, batch_sizes = arguments
        options: Any = {"nonlinearity": cell.removeprefix("elman."), "batch_sizes": batch_sizes}
        results = join_directions(
            elman_rnn(
                *(input, its.h0, its.weight_ih, its.weight_hh, *its.biases),
                reverse=its.reverse,
                **options,
            )
            for its in directions_of(states, weights, direction)
        )
        return list(results)


class _Step:
    """The operator ``step``."""

    @staticmethod
    def apply(_names: tuple[str, ...], _function: Any, *arguments: Any) -> list[Tensor]:
        input, states, (weight_ih, weight_hh, *biases), cell = arguments
        bias_ih, bias_hh = (*biases, None, None)[:2]
        z = linear(input, weight_ih, bias_ih)
        state = input.new_zeros(*input.shape[:-1], len(weight_hh)) if not states else states[0]
        z = z + linear(state, weight_hh, bias_hh)
        return [activation(z, cell.removeprefix("elman."))]


def register() -> None:
    """Let eager layers take such weights; to be called once the native library is loaded."""
    handlers: dict[Any, Any] = HANDLED_FUNCTIONS
    handlers[torch.ops.rnn_cuda.layer] = _Layer
    handlers[torch.ops.rnn_cuda.step] = _Step
