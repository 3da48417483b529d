"""The operator ``layer_forward``: P1, a cell along time, in both directions too.

    layer_forward(input, states, weights, cell, direction, batch_sizes, saves=False)
        -> [output, final states.., saved..]

Shape legend: T time steps, B batch, I input size, H hidden size, G gates, N = sum(batch_sizes)
packed rows, D directions. Sequences are (T, B, features), or (N, features) with batch_sizes.
``states`` is [h0], or [h0, c0] for a cell that has c, each (D, B, H), or empty; ``weights`` are
weight_ih (G * H, I), weight_hh (G * H, H), up to two biases (G * H) and the constants of a cell
that has some (keep and rate of a leaky one, (H) each, in compute precision) of each direction in
turn; output has D * H features, final states are (D, B, H). ``cell`` is a name of `rnn_cuda.cells`;
``direction`` is forward, reverse or both. What a cell saves for its backward pass comes last if
``saves``, one sequence for each direction; without it, `layer_gradients` computes it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnn_cuda.cells import cell_named
from rnn_cuda.neighbours import StepNeighbours, rows_of, take, times_previous
from rnn_cuda.operators.directions import directions_of, known_batch
from rnn_cuda.operators.function import OperatorFunction, differentiable_again
from rnn_cuda.operators.gated_layer import tangents_of_layer
from rnn_cuda.operators.layer_gradients import LayerGradients, total_adjoints
from rnn_cuda.operators.vmap import call_in_turn, check_size, fold, unfold
from rnn_cuda.recording import Tap, check_recordable


class Options(NamedTuple):
    """All arguments of the operator but the tensors to differentiate."""

    states: int  # how many there are
    cell: str
    direction: str
    batch_sizes: Tensor | None
    saves: bool = False
    tap: Tap | None = None


class LayerForward(OperatorFunction):
    """What eager code runs, but for layers that got a `Tap`, is ``csrc/layer_node.h`` instead."""

    operator = "layer_forward"

    @staticmethod
    def flat(  # pyright: ignore[reportIncompatibleMethodOverride]
        input: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        *options: Any,
        tap: Tap | None = None,
    ) -> tuple[Sequence[Tensor], Options]:
        """See `OperatorFunction.flat`."""
        return (input, *states, *weights), Options(len(states), *options, tap=tap)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save what the rules below need."""
        *tensors, ctx.options, _ = inputs
        ctx.batch = output[1].shape[1]
        if ctx.options.tap is not None:
            ctx.options.tap.is_attached = True
        ctx.results = 1 + cell_named(ctx.options.cell).states
        saved = output[ctx.results :]
        ctx.saved = len(saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[0], *saved)
        ctx.save_for_forward(*tensors, output[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Propagate adjoints."""
        input, *rest = ctx.saved_tensors
        count, cell, direction, batch_sizes, _, tap = ctx.options
        arguments = len(ctx.needs_input_grad) - 3  # without input, options and outputs
        tensors, output, saved = rest[:arguments], rest[arguments], rest[arguments + 1 :]
        grads = grads[: ctx.results]
        sinks = [] if tap is None else tap.sinks
        if sinks:
            check_recordable(grads)
        elif all(grad is None for grad in grads):
            return (None,) * (len(tensors) + 3)
        needs = ctx.needs_input_grad[: 1 + len(tensors)]
        wants_vectors = any(sink.vectors for sink in sinks)
        results = LayerGradients.call_in_backward(
            list(grads),
            *(input, tensors[:count], tensors[count:], output, saved, cell, direction, batch_sizes),
            [*needs, bool(sinks), wants_vectors],
            batch=ctx.batch,
        )
        remaining = iter(results)
        gradients = [next(remaining) if needed else None for needed in needs]
        if sinks:
            kind = cell_named(cell)
            norms = [next(remaining).detach() for _ in range(kind.adjoints)]
            adjoints = list(remaining)
            if wants_vectors and kind.is_linear_recurrence:
                (delta,) = adjoints
                directions = list(directions_of(tensors[:count], tensors[count:], direction, cell))
                adjoints = [total_adjoints(grads, delta, directions, batch_sizes, ctx.batch)]
            for sink in sinks:
                sink(norms, adjoints if sink.vectors else None)
        return (*gradients, None, None)

    @staticmethod
    @differentiable_again
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Any) -> tuple[Tensor | None, ...]:
        """Propagate tangents."""
        if cell_named(ctx.options.cell).is_linear_recurrence:
            return _linear_tangents(ctx, saved, *tangents)
        input, *tensors, output = saved
        count, cell, direction, batch_sizes, *_ = ctx.options
        results = tangents_of_layer(
            *(input, tensors[:count], tensors[count:], output),
            *(cell, direction, batch_sizes, ctx.batch, tangents[: 1 + len(tensors)]),
        )
        return (*results, *[None] * ctx.saved)


def _linear_tangents(ctx: Any, saved: tuple[Any, ...], *tangents: Any) -> tuple[Tensor, Tensor]:
    """Propagate tangents of a linear recurrence: by another."""
    input, *tensors, output = saved
    count, cell, direction, batch_sizes, *_ = ctx.options
    lists = tensors[:count], tensors[count:]
    d_input, *of_tensors = tangents[: 1 + len(tensors)]
    # The tangents of what has none stay None, so that nothing is computed for them.
    d_h0 = of_tensors[0] if count else None
    per_direction = len(lists[1]) // (2 if direction == "both" else 1)
    outputs, final_states = [], []
    for its in directions_of(*lists, direction, cell):
        first = count + its.number * per_direction
        d_weight_ih, d_weight_hh, *d_biases = of_tensors[first : first + per_direction]
        states = its.columns(output)
        rows = rows_of(states)
        neighbours = StepNeighbours.of(states, its.reverse, batch_sizes, ctx.batch)
        drive = torch.zeros_like(rows)
        if d_input is not None:
            drive = drive + rows_of(d_input) @ its.weight_ih.mT
        if d_weight_ih is not None:
            drive = drive + rows_of(input) @ d_weight_ih.mT
        if d_weight_hh is not None:
            drive = drive + times_previous(rows, its.h0, d_weight_hh, neighbours)
        for d_bias in d_biases:
            if d_bias is not None:
                drive = drive + d_bias
        tangent = torch.ops.rnn_cuda.linear_recurrence(
            cell_named(cell).derivative(states),
            drive.view(states.shape),
            its.weight_hh,
            None if d_h0 is None else d_h0.select(0, its.number),
            its.reverse,
            batch_sizes,
        )
        outputs.append(tangent)
        final_states.append(take(rows_of(tangent), neighbours.last))
    return torch.cat(outputs, -1), torch.stack(final_states)


def fake(
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    cell: str,
    direction: str,
    batch_sizes: Tensor | None,
    saves: bool = False,
) -> list[Tensor]:
    """Return results without data."""
    hidden, directions = weights[1].shape[1], 2 if direction == "both" else 1
    batch = known_batch(input, states, batch_sizes)
    if batch is None:
        batch = torch.library.get_ctx().new_dynamic_size()
    kind, rows = cell_named(cell), input.shape[:-1]
    output = input.new_empty(*rows, directions * hidden)
    final_states = [input.new_empty(directions, batch, hidden) for _ in range(kind.states)]
    saved = directions if saves and kind.saved_values else 0
    return [
        output,
        *final_states,
        *(input.new_empty(*rows, kind.saved_values * hidden) for _ in range(saved)),
    ]


def vmap_rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[list[Tensor], list[int]]:
    """Map over V by one call where it shares the weights, else by V."""
    size, operator = check_size(info), torch.ops.rnn_cuda.layer_forward
    input, states, weights, cell, direction, batch_sizes, *saves = args
    if any(dim is not None for dim in in_dims[2]):
        results = call_in_turn(operator, size, in_dims, args)
    else:
        folded = fold(input, in_dims[0], size)
        states = [fold(state, dim, size) for state, dim in zip(states, in_dims[1], strict=True)]
        batch_sizes = None if batch_sizes is None else batch_sizes * size
        outputs = operator(folded, states, weights, cell, direction, batch_sizes, *saves)
        results = [unfold(output, size) for output in outputs]
    return results, [0] * len(results)


def flops(input: Tensor, states: Any, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:
    """Two per multiply-add of a matrix product, as torch counts them."""
    rows = input.numel() // input.shape[-1] if input.shape[-1] else 0
    return 2 * rows * sum(weight.numel() for weight in weights if weight.dim() == 2)
