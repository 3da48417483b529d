"""The operator ``linear_recurrence``: P2, the linearised step of a cell along time.

    linear_recurrence(d, g, m, y0, reverse, batch_sizes, transposed=False) -> y

Shape legend: T time steps, B batch, H hidden size, N = sum(batch_sizes) packed rows. Sequences are
(T, B, features), or (N, features) with batch_sizes. With H features d and g are those of an Elman
cell, ``y_t = d_t * (g_t + M y_{t-1})``; with more, those of a cell whose units carry a value of
their own: see ``linearised.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnn_cuda.neighbours import (
    StepNeighbours,
    add_at,
    outer_with_previous,
    rows_of,
    take,
    times_previous,
)
from rnn_cuda.operators.function import differentiable_again
from rnn_cuda.operators.linearised import LinearisedRecurrence, RecurrenceFunction
from rnn_cuda.operators.vmap import call_in_turn, check_size, fold, unfold


class LinearRecurrence(RecurrenceFunction):
    """Its derivatives in both modes are linear recurrences; see ``docs/differentiation.md``."""

    @classmethod
    def differentiable(cls, *args: Any, **node_options: Any) -> Any:
        """Run the operator with the node of an Elman cell, or of others."""
        d, _, m, *_ = args
        if d.shape[-1] != m.shape[-1]:
            return LinearisedRecurrence.differentiable(*args)
        return super().differentiable(*args, **node_options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Propagate adjoints."""
        (grad,) = grads
        if grad is None:
            return (None,) * 6
        d, g, m, y0, y = ctx.saved_tensors
        needs_d, needs_g, needs_m, needs_y0, *_ = ctx.needs_input_grad
        neighbours = StepNeighbours.of(y, ctx.reverse, ctx.batch_sizes)
        # e_t, the adjoint of s_t = g_t + M y_{t-1}, is P2 against time:
        # e_t = d_t * (grad_t + M^T e_{t+1}).
        e = torch.ops.rnn_cuda.linear_recurrence(
            d, grad, m.mT, None, not ctx.reverse, ctx.batch_sizes
        )
        e_rows, y_rows = rows_of(e), rows_of(y)
        grad_d = None
        if needs_d:
            # s_t times the adjoint of y_t. Both are made anew: where d_t = 0 (a closed relu),
            # neither can be read off y_t = d_t s_t or e_t.
            s = rows_of(g) + times_previous(y_rows, y0, m, neighbours)
            after = take(e_rows, neighbours.current) @ m
            adjoint = add_at(rows_of(grad), neighbours.previous, after)
            grad_d = (s * adjoint).view(d.shape)
        return (
            grad_d,
            e if needs_g else None,
            outer_with_previous(e_rows, y_rows, y0, neighbours) if needs_m else None,
            take(e_rows, neighbours.first) @ m if needs_y0 else None,
            None,
            None,
        )

    @staticmethod
    @differentiable_again
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Any) -> Tensor:
        """Propagate tangents."""
        d_d, d_g, d_m, d_y0, *_ = tangents
        d, g, m, y0, y = saved
        neighbours = StepNeighbours.of(y, ctx.reverse, ctx.batch_sizes)
        y_rows = rows_of(y)
        # y'_t = r_t + d_t * (g'_t + M' y_{t-1} + M y'_{t-1}) with r_t = d'_t s_t. In terms of
        # u_t = y'_t - r_t this is P2 again, whatever d_t is.
        drive = torch.zeros_like(y_rows) if d_g is None else rows_of(d_g)
        if d_m is not None:
            drive = drive + times_previous(y_rows, y0, d_m, neighbours)
        r = None
        if d_d is not None:
            s = rows_of(g) + times_previous(y_rows, y0, m, neighbours)
            r = rows_of(d_d) * s
            drive = drive + times_previous(r, None, m, neighbours)
        u = torch.ops.rnn_cuda.linear_recurrence(
            d, drive.view(y.shape), m, d_y0, ctx.reverse, ctx.batch_sizes
        )
        return u if r is None else u + r.view(y.shape)


def fake(
    d: Tensor,
    g: Tensor,
    m: Tensor,
    y0: Tensor | None,
    reverse: bool,
    batch_sizes: Tensor | None,
    transposed: bool = False,
) -> Tensor:
    """Return results without data."""
    return g.new_empty(g.shape)


def vmap_rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
    """Map over V by one call where it shares M, else by V."""
    size, operator = check_size(info), torch.ops.rnn_cuda.linear_recurrence
    d, g, m, y0, reverse, batch_sizes, *transposed = args
    if in_dims[2] is not None:
        return call_in_turn(operator, size, in_dims, args), 0
    y0 = None if y0 is None else fold(y0, in_dims[3], size)
    batch_sizes = None if batch_sizes is None else batch_sizes * size
    folded = fold(d, in_dims[0], size), fold(g, in_dims[1], size)
    return unfold(operator(*folded, m, y0, reverse, batch_sizes, *transposed), size), 0


def flops(d: Tensor, g: Any, m: Tensor, *_: Any, **__: Any) -> int:
    """Two per multiply-add of a matrix product, as torch counts them."""
    return 2 * math.prod(d.shape[:-1]) * m.numel()
