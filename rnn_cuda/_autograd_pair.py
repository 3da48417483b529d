"""Both directions of a bidirectional layer in one call, forward and backward.

The two share nothing but their input, so there is nothing new to differentiate: where more than the
gradients of a training step is asked for, a pair is two calls of the operators in ``_autograd.py``.

The direction that runs against time comes second. Sizes are named as in ``_autograd.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnn_cuda._adjoint import Direction
from rnn_cuda._autograd import (
    OperatorFunction,
    Shortcut,
    elman_gradients_by_parts,
    gradients_of_direction,
)


def elman_forward_in_turn(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """What the operator elman_forward_pair returns, by two calls."""
    *tensors, nonlinearity, batch_sizes = args
    run = torch.ops.rnn_cuda.elman_forward
    return (
        *run(input, *tensors[:4], nonlinearity, False, batch_sizes),
        *run(input, *tensors[4:], nonlinearity, True, batch_sizes),
    )


class ElmanRNNPair(OperatorFunction):
    """As with one direction, eager code runs ``csrc/eager_layer.h``, unless it is recorded."""

    operator = "elman_forward_pair"
    composition = staticmethod(elman_forward_in_turn)

    @classmethod
    def kernel(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return cls.composition(*args)
        return super().kernel(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[9:11]  # nonlinearity, batch_sizes
        ctx.batch = output[1].shape[0]
        ctx.adjoint_sinks = [(), ()]  # of each direction; set from outside, on the node: it is ctx
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], output[0], *inputs[5:8], output[2])
        # A direction of which nothing is differentiated has no part in the graph.
        needs_input, *needs = ctx.needs_input_grad[:9]
        constant = () if needs_input or any(needs[:4]) else output[:2]
        constant += () if needs_input or any(needs[4:]) else output[2:]
        ctx.mark_non_differentiable(*constant)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        input, *states = ctx.saved_tensors
        needs_input, *needs = ctx.needs_input_grad[:9]
        nonlinearity, batch_sizes = ctx.options
        pair = [
            Direction(
                grads[2 * i : 2 * i + 2],
                states[4 * i : 4 * i + 4],
                (nonlinearity, i == 1, batch_sizes),
                needs[4 * i : 4 * i + 4],
                ctx.adjoint_sinks[i],
                ctx.batch,
            )
            for i in (0, 1)
        ]
        for direction in pair:  # before either is told
            direction.check()
        if all(direction.is_reached for direction in pair):
            gradients = _gradients_of_both(pair, input, needs_input)
        else:
            first, second = (gradients_of_direction(each, input, needs_input) for each in pair)
            of_input = first[0] if pair[0].is_reached else second[0]
            gradients = (of_input, *first[1:], *second[1:])
        return (*gradients, *(None,) * 3)


def _gradients_of_both(
    pair: Sequence[Direction], input: Tensor, needs_input: bool
) -> tuple[Tensor | None, ...]:
    first, second = pair
    nonlinearity, _, batch_sizes = first.options
    of_input, *others = ElmanGradientsPair.within_backward(
        input,
        *(*first.grads, *first.states),
        *(*second.grads, *second.states),
        *(nonlinearity, batch_sizes),
        (needs_input, *first.wanted, *second.wanted),
        batch=first.batch,
    )
    of_each = *first.take(others[:5]), *second.take(others[5:])
    return (of_input if needs_input else None, *of_each)


def elman_gradients_in_turn(
    input: Tensor, *args: Any, batch: int | None = None
) -> tuple[Tensor, ...]:
    """What the operator elman_gradients_pair returns, by parts; ``batch`` as in `Links.of`."""
    (of_input, *first), (of_input_reverse, *second) = (
        elman_gradients_by_parts(*each, batch=batch) for each in arguments_of_each(input, *args)
    )
    return (of_input + of_input_reverse, *first, *second)


def arguments_of_each(input: Tensor, *args: Any) -> Iterator[tuple[Any, ...]]:
    """Turn arguments of elman_gradients_pair into those of elman_gradients for each direction."""
    *tensors, nonlinearity, batch_sizes, wanted = args
    for i in (0, 1):
        grad_output, grad_h_n, *states = tensors[6 * i : 6 * i + 6]
        its_wanted = (wanted[0], *wanted[5 * i + 1 : 5 * i + 6])
        options = nonlinearity, i == 1, batch_sizes, its_wanted
        yield grad_output, grad_h_n, input, *states, *options


class ElmanGradientsPair(Shortcut):
    """Both directions' gradients by one operator. It is what ordinary training runs."""

    operator = "elman_gradients_pair"
    composition = staticmethod(elman_gradients_in_turn)
    tensors = 13
