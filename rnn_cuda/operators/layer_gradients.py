"""The operator ``layer_gradients``: the backward pass of ``layer_forward``.

    layer_gradients(grads, input, states, weights, output, saved, cell, direction, batch_sizes,
                    wanted) -> [...]

``grads`` are those of output and of the final states, or None; ``saved`` is what `layer_forward`
saved, or empty: then it is computed again. ``wanted`` goes through input, states and weights, whose
gradients it asks for; then the norms over H of the total adjoints that `Cell.adjoints` counts, each
(D, T, B) or (D, N) in float64; then these adjoints, each (.., D * H) in compute precision. For an
Elman cell, delta_t takes their place: the adjoint of the sums U h_{t-1} + b, (.., D * H). What is
not wanted is left out. For the rest, and the shape legend, see ``layer_forward.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnn_cuda.cells import cell_named
from rnn_cuda.linear_algebra import row_norms
from rnn_cuda.neighbours import StepNeighbours, add_at, outer_with_previous, rows_of, take
from rnn_cuda.operators.directions import DirectionOfLayer, directions_of, known_batch
from rnn_cuda.operators.function import (
    OperatorFunction,
    needs_graph,
    plain_eager_mode,
    tangent_of,
)
from rnn_cuda.operators.gated_layer import gradients_of_layer
from rnn_cuda.reference import compute_dtype


class LayerGradients(OperatorFunction):
    """What ordinary training runs. Its derivatives are those of `gradients_by_parts`."""

    operator = "layer_gradients"

    @staticmethod
    def flat(  # pyright: ignore[reportIncompatibleMethodOverride]
        grads: Sequence[Tensor | None],
        input: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        output: Tensor,
        saved: Sequence[Tensor],
        *options: Any,
    ) -> tuple[Sequence[Tensor | None], Any]:
        """See `OperatorFunction.flat`."""
        counts = len(grads), len(states), len(weights)
        return (*grads, input, *states, *weights, output, *saved), (counts, options)

    @classmethod
    def differentiable(cls, *args: Any) -> Any:
        """Run the operator; by parts where a graph of its derivative is needed."""
        if needs_graph(cls.flat(*args)[0]):
            return gradients_by_parts(*args)
        return super().differentiable(*args)

    @classmethod
    def call_in_backward(cls, *args: Any, batch: int) -> list[Tensor]:
        """Call the operator, or what reverse mode can follow where that has to."""
        if needs_graph(cls.flat(*args)[0]):
            return gradients_by_parts(*args, batch=batch)
        if plain_eager_mode():
            return cls.below_autograd(*args)
        return torch.ops.rnn_cuda.layer_gradients(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save what the rules below need."""
        *tensors, ctx.options, _ = inputs
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> tuple[Tensor, ...]:
        """Propagate tangents."""
        (grads, states, weights), options = ctx.options
        with forward_ad._set_fwd_grad_enabled(True):  # the saved tensors still have their tangents
            tensors = iter(ctx.saved_tensors)

            def take_some(count: int) -> list[Any]:
                return [next(tensors) for _ in range(count)]

            args: Any = (take_some(grads), next(tensors), take_some(states), take_some(weights))
            args += (next(tensors), list(tensors), *options)
            outputs = gradients_by_parts(*args)
            return tuple(map(tangent_of, outputs))


def gradients_by_parts(
    grads: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    output: Tensor,
    saved: Sequence[Tensor],
    cell: str,
    direction: str,
    batch_sizes: Tensor | None,
    wanted: Sequence[bool],
    *,
    batch: int | None = None,
) -> list[Tensor]:
    """What the operator returns, as products of delta, to be differentiated and mapped further.

    ``batch`` as in `StepNeighbours.of`.
    """
    directions = list(directions_of(states, weights, direction, cell))
    *wanted_gradients, wants_norms, wants_delta = wanted
    if not cell_named(cell).is_linear_recurrence:
        return gradients_of_layer(
            grads, input, states, weights, output, cell, direction, batch_sizes, wanted, batch
        )
    if wants_delta and not wants_norms and not any(wanted_gradients):
        return [_delta(grads, directions, output, cell, batch_sizes, batch)]
    (delta,) = torch.ops.rnn_cuda.layer_gradients(
        *(grads, input, states, weights, output, saved, cell, direction, batch_sizes),
        [*(False,) * (len(wanted) - 1), True],
    )
    wants_input, *wants_rest = wanted_gradients
    wants_state = wants_rest.pop(0) if states else False
    grad_input, grad_states, grad_weights = None, [], []
    for its in directions:
        delta_rows, states_rows = rows_of(its.columns(delta)), rows_of(its.columns(output))
        neighbours = StepNeighbours.of(output, its.reverse, batch_sizes, batch)
        if wants_input:
            more = (delta_rows @ its.weight_ih).view(input.shape)
            grad_input = more if grad_input is None else grad_input + more
        if wants_state:
            grad_states.append(take(delta_rows, neighbours.first) @ its.weight_hh)
        wants_ih, wants_hh, *wants_biases = wants_rest[: 2 + len(its.biases)]
        del wants_rest[: 2 + len(its.biases)]
        if wants_ih:
            grad_weights.append(delta_rows.mT @ rows_of(input))
        if wants_hh:
            grad_weights.append(outer_with_previous(delta_rows, states_rows, its.h0, neighbours))
        if any(wants_biases):
            total = delta_rows.sum(0, dtype=compute_dtype(delta.dtype)).to(delta.dtype)
            # Not the same tensor twice: scaling one gradient in place would scale both.
            grad_weights += [total, total.clone()][: sum(wants_biases)]
    results = [] if grad_input is None else [grad_input]
    results += [torch.stack(grad_states)] if grad_states else []
    results += grad_weights
    if wants_norms:
        adjoints = total_adjoints(grads, delta, directions, batch_sizes, batch)
        results.append(row_norms(adjoints.unflatten(-1, (len(directions), -1)).movedim(-2, 0)))
    return [*results, delta] if wants_delta else results


def _delta(
    grads: Sequence[Tensor | None],
    directions: Sequence[DirectionOfLayer],
    output: Tensor,
    cell: str,
    batch_sizes: Tensor | None,
    batch: int | None,
) -> Tensor:
    """delta_t = f'(h_t) * (dL/dh_t + U^T delta_{t+1}), the linear recurrence."""
    grad_output, grad_h_n = grads
    deltas = []
    for its in directions:
        h = its.columns(output)
        direct = torch.zeros_like(h) if grad_output is None else its.columns(grad_output)
        if grad_h_n is not None:
            last = StepNeighbours.of(output, its.reverse, batch_sizes, grad_h_n.shape[1]).last
            direct = add_at(rows_of(direct), last, grad_h_n.select(0, its.number)).view(h.shape)
        delta = torch.ops.rnn_cuda.linear_recurrence(
            cell_named(cell).derivative(h),
            direct,
            its.weight_hh.mT,
            None,
            not its.reverse,
            batch_sizes,
        )
        deltas.append(delta)
    return deltas[0] if len(deltas) == 1 else torch.cat(deltas, -1)


def total_adjoints(
    grads: Sequence[Tensor | None],
    delta: Tensor,
    directions: Sequence[DirectionOfLayer],
    batch_sizes: Tensor | None,
    batch: int | None,
) -> Tensor:
    """dL/dh_t of all directions, shaped as the output, in compute precision."""
    grad_output, grad_h_n = grads
    adjoints = [
        adjoint_from_delta(
            None if grad_output is None else its.columns(grad_output),
            None if grad_h_n is None else grad_h_n.select(0, its.number),
            its.columns(delta),
            its.weight_hh,
            StepNeighbours.of(delta, its.reverse, batch_sizes, batch),
        )
        for its in directions
    ]
    return adjoints[0] if len(adjoints) == 1 else torch.cat(adjoints, -1)


def adjoint_from_delta(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    delta: Tensor,
    weight_hh: Tensor,
    neighbours: StepNeighbours,
) -> Tensor:
    """a_t = g_t + U^T delta_{t+1} of an Elman layer, with delta_t = dL/dz_t and dL/dh_n at the end.

    Shaped as delta, in compute precision.
    """
    wide = compute_dtype(delta.dtype)
    delta_rows, weight = rows_of(delta).to(wide), weight_hh.to(wide)
    direct = torch.zeros_like(delta_rows) if grad_output is None else rows_of(grad_output).to(wide)
    adjoint = add_at(direct, neighbours.previous, take(delta_rows, neighbours.current) @ weight)
    if grad_h_n is not None:
        adjoint = add_at(adjoint, neighbours.last, grad_h_n.to(wide))
    return adjoint.view(delta.shape)


def fake(
    grads: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    output: Tensor,
    saved: Sequence[Tensor],
    cell: str,
    direction: str,
    batch_sizes: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Return results without data."""
    *wanted_gradients, wants_norms, wants_vectors = wanted
    kind = cell_named(cell)
    pairs = zip((input, *states, *weights), wanted_gradients, strict=True)
    results = [tensor.new_empty(tensor.shape) for tensor, is_wanted in pairs if is_wanted]
    if wants_norms:
        shape = 2 if direction == "both" else 1, *input.shape[:-1]
        results += [input.new_empty(shape, dtype=torch.float64) for _ in range(kind.adjoints)]
    if wants_vectors and kind.is_linear_recurrence:
        results.append(torch.empty_like(output))
    elif wants_vectors:
        wide = compute_dtype(output.dtype)
        results += [output.new_empty(output.shape, dtype=wide) for _ in range(kind.adjoints)]
    return results


def flops(
    grads: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    output: Tensor,
    saved: Any,
    cell: str,
    direction: str,
    batch_sizes: Tensor | None,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """Two per multiply-add of a matrix product, as torch counts them."""
    rows = math.prod(output.shape[:-1])
    batch = known_batch(input, [*grads[1:], *states], batch_sizes)
    if batch is None:
        batch = int(batch_sizes[0])  # pyright: ignore[reportOptionalSubscript]
    with_previous = rows if states else rows - batch
    wants_input, *wants_rest = wanted[:-2]
    wants_state = any(wants_rest[: len(states)])
    del wants_rest[: len(states)]
    total = 0
    for its in directions_of(states, weights, direction, cell):
        wants_ih, wants_hh = wants_rest[:2]
        del wants_rest[: 2 + len(its.biases) + len(its.constants)]
        recurrent = rows + wants_state * batch + wants_hh * with_previous
        total += 2 * recurrent * its.weight_hh.numel()
        total += 2 * (wants_input + wants_ih) * rows * its.weight_ih.numel()
    return total
