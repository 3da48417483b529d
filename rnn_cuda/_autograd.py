"""The derivatives of the two recurrences, by one another.

    P1, `ElmanRNN`           h_t = f(W x_t + b + U h_{t-1})
    P2, `LinearRecurrence`   y_t = d_t * (g_t + M y_{t-1})

The backward pass of P1 is P2, run against time with d = f'(h), M = U^T and g = dL/dh; its
forward-mode derivative is P2 with M = U; and both derivatives of P2 are P2 again. So these two,
with matrix products between them, give derivatives of any order without Python per time step.
The derivation is in ``docs/differentiation.md``.

Shape legend: T time steps, B batch, I input size, H hidden size, N = sum(batch_sizes) packed rows.
"Rows" are a sequence flattened to (T * B, features), or the N rows of a packed one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.nn.functional import pad

from rnn_cuda.reference import activation_derivative, compute_dtype

# ---- how the rows of a sequence follow each other in time ----------------------------------------

_Index = slice | Tensor


@dataclasses.dataclass(frozen=True)
class _Links:
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
    ) -> _Links:
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


def _rows(sequence: Tensor) -> Tensor:
    return sequence.reshape(math.prod(sequence.shape[:-1]), sequence.shape[-1])


def _take(rows: Tensor, index: _Index) -> Tensor:
    return rows[index] if isinstance(index, slice) else rows.index_select(0, index)


def _add_at(rows: Tensor, index: _Index, values: Tensor) -> Tensor:
    """``rows`` with ``values`` added at ``index``, out of place; no row is named twice."""
    if isinstance(index, slice):
        return rows + pad(values, (0, 0, index.start, rows.shape[0] - index.stop))
    return rows.index_add(0, index, values)


def _times_previous(states: Tensor, start: Tensor | None, m: Tensor, links: _Links) -> Tensor:
    """Rows of ``M s_{t-1}``, zero at a sample's first step if it starts from None."""
    product = _add_at(torch.zeros_like(states), links.current, _take(states, links.previous) @ m.mT)
    return product if start is None else _add_at(product, links.first, start @ m.mT)


def _outer_with_previous(
    left: Tensor, states: Tensor, start: Tensor | None, links: _Links
) -> Tensor:
    """``sum_t left_t s_{t-1}^T``: the gradient of the matrix that multiplies s_{t-1}."""
    total = _take(left, links.current).mT @ _take(states, links.previous)
    return total if start is None else total + _take(left, links.first).mT @ start


def _differentiable_again(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Let outer forward-mode transforms differentiate a rule ``jvp(ctx, saved, *tangents)``.

    PyTorch calls the rule with forward mode off, so that the outer tangents silently become zero
    (pytorch issue 197867). With forward mode on, the saved tensors must first lose the tangents
    that the rule itself is here to propagate.
    """

    @functools.wraps(jvp)
    def rule(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            *inputs, output = ctx.saved_tensors  # the inputs as in apply, as far as they go
            primals = [
                tensor if tangent is None else forward_ad.unpack_dual(tensor, level=0).primal
                for tensor, tangent in zip(inputs, tangents, strict=False)
            ]
            return jvp(ctx, (*primals, output), *tangents)

    return rule


@contextlib.contextmanager
def _below_autograd() -> Iterator[None]:
    """Inside, an operator runs its native kernel, or the next level of ``torch.func`` if any.

    Those levels want both modes of differentiation, which autograd switches off for its own level.
    """
    with (
        torch.enable_grad(),
        forward_ad._set_fwd_grad_enabled(True),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        yield


class _OperatorFunction(_SingleLevelFunction):
    """The autograd kernel of a native operator: its derivative in both modes, of every order.

    A plain ``torch.autograd.Function`` would not do, because torch.compile takes none that has a
    rule for forward mode; nor ``torch.library.register_autograd``, which knows no forward mode
    (tangents silently become zero) and no ``torch.func``. As the kernel of the dispatch key
    Autograd, a Function serves one level of ``torch.func`` at a time, as those of PyTorch's own
    operators do.
    """

    operator: ClassVar[str]

    @classmethod
    def kernel(cls, *args: Any) -> Any:
        with enable_single_level_autograd_function():
            return cls.apply(*args)  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def forward(cls, *args: Any) -> Any:
        with _below_autograd():
            return getattr(torch.ops.rnn_cuda, cls.operator)(*args)


# ---- P1 ------------------------------------------------------------------------------------------


class ElmanRNN(_OperatorFunction):
    operator = "elman_forward"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, h0, weight_ih, weight_hh, _, ctx.nonlinearity, ctx.reverse, ctx.batch_sizes = inputs
        ctx.set_materialize_grads(False)
        ctx.batch = output[1].shape[0]
        ctx.save_for_backward(input, h0, weight_ih, weight_hh, output[0])
        ctx.save_for_forward(input, h0, weight_ih, weight_hh, output[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, grad_h_n = grads
        nothing = (None,) * 8
        if grad_output is None and grad_h_n is None:
            return nothing
        input, h0, weight_ih, weight_hh, output = ctx.saved_tensors
        links = _Links.of(output, ctx.reverse, ctx.batch_sizes, ctx.batch)
        delta = torch.ops.rnn_cuda.elman_backward(  # delta_t = dL/dz_t
            grad_output,
            grad_h_n,
            output,
            weight_hh,
            ctx.nonlinearity,
            ctx.reverse,
            ctx.batch_sizes,
        )

        needs_input, needs_h0, needs_ih, needs_hh, needs_bias, *_ = ctx.needs_input_grad
        delta_rows, output_rows = _rows(delta), _rows(output)
        return (
            delta @ weight_ih if needs_input else None,
            _take(delta_rows, links.first) @ weight_hh if needs_h0 else None,
            delta_rows.mT @ _rows(input) if needs_ih else None,
            _outer_with_previous(delta_rows, output_rows, h0, links) if needs_hh else None,
            delta_rows.sum(0, dtype=compute_dtype(delta.dtype)) if needs_bias else None,
            *nothing[5:],
        )

    @staticmethod
    @_differentiable_again
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Any) -> tuple[Tensor, Tensor]:
        d_input, d_h0, d_weight_ih, d_weight_hh, d_bias, *_ = tangents
        input, h0, weight_ih, weight_hh, output = saved
        links = _Links.of(output, ctx.reverse, ctx.batch_sizes, ctx.batch)
        rows = _rows(output)
        drive = torch.zeros_like(rows)
        if d_input is not None:
            drive = drive + _rows(d_input) @ weight_ih.mT
        if d_weight_ih is not None:
            drive = drive + _rows(input) @ d_weight_ih.mT
        if d_weight_hh is not None:
            drive = drive + _times_previous(rows, h0, d_weight_hh, links)
        if d_bias is not None:
            drive = drive + d_bias.to(drive.dtype)
        tangent = torch.ops.rnn_cuda.linear_recurrence(
            activation_derivative(output, ctx.nonlinearity),
            drive.view(output.shape),
            weight_hh,
            d_h0,
            ctx.reverse,
            ctx.batch_sizes,
        )
        return tangent, _take(_rows(tangent), links.last)


def elman_backward_by_p2(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor,
    weight_hh: Tensor,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: Tensor | None,
) -> Tensor:
    """delta_t = f'(h_t) * (dL/dh_t + U^T delta_{t+1}), to be differentiated again."""
    direct = torch.zeros_like(output) if grad_output is None else grad_output
    if grad_h_n is not None:
        last = _Links.of(output, reverse, batch_sizes, grad_h_n.shape[0]).last
        direct = _add_at(_rows(direct), last, grad_h_n).view(output.shape)
    return torch.ops.rnn_cuda.linear_recurrence(
        activation_derivative(output, nonlinearity),
        direct,
        weight_hh.mT,
        None,
        not reverse,
        batch_sizes,
    )


class ElmanBackward(_OperatorFunction):
    """The same by one operator: it reads f' off the output and takes absent gradients as they are.

    It is what ordinary training runs.
    """

    operator = "elman_backward"

    @classmethod
    def kernel(cls, *args: Any) -> Tensor:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return elman_backward_by_p2(*args)
        return super().kernel(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(*inputs[:4])
        ctx.options = inputs[4:]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        with forward_ad._set_fwd_grad_enabled(True):  # the saved tensors still have their tangents
            delta = elman_backward_by_p2(*(*ctx.saved_tensors, *ctx.options))
            return forward_ad.unpack_dual(delta, level=0).tangent


# ---- P2 ------------------------------------------------------------------------------------------


class LinearRecurrence(_OperatorFunction):
    operator = "linear_recurrence"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        d, g, m, y0, ctx.reverse, ctx.batch_sizes = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d, g, m, y0, output)
        ctx.save_for_forward(d, g, m, y0, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if grad is None:
            return (None,) * 6
        d, g, m, y0, y = ctx.saved_tensors
        needs_d, needs_g, needs_m, needs_y0, *_ = ctx.needs_input_grad
        links = _Links.of(y, ctx.reverse, ctx.batch_sizes)
        # e_t, the adjoint of s_t = g_t + M y_{t-1}, is P2 against time:
        # e_t = d_t * (grad_t + M^T e_{t+1}).
        e = torch.ops.rnn_cuda.linear_recurrence(
            d, grad, m.mT, None, not ctx.reverse, ctx.batch_sizes
        )
        e_rows, y_rows = _rows(e), _rows(y)
        grad_d = None
        if needs_d:
            # s_t times the adjoint of y_t. Both are made anew: where d_t = 0 (a closed relu),
            # neither can be read off y_t = d_t s_t or e_t.
            s = _rows(g) + _times_previous(y_rows, y0, m, links)
            adjoint = _add_at(_rows(grad), links.previous, _take(e_rows, links.current) @ m)
            grad_d = (s * adjoint).view(d.shape)
        return (
            grad_d,
            e if needs_g else None,
            _outer_with_previous(e_rows, y_rows, y0, links) if needs_m else None,
            _take(e_rows, links.first) @ m if needs_y0 else None,
            None,
            None,
        )

    @staticmethod
    @_differentiable_again
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Any) -> Tensor:
        d_d, d_g, d_m, d_y0, *_ = tangents
        d, g, m, y0, y = saved
        links = _Links.of(y, ctx.reverse, ctx.batch_sizes)
        y_rows = _rows(y)
        # y'_t = r_t + d_t * (g'_t + M' y_{t-1} + M y'_{t-1}) with r_t = d'_t s_t. In terms of
        # u_t = y'_t - r_t this is P2 again, whatever d_t is.
        drive = torch.zeros_like(y_rows) if d_g is None else _rows(d_g)
        if d_m is not None:
            drive = drive + _times_previous(y_rows, y0, d_m, links)
        r = None
        if d_d is not None:
            s = _rows(g) + _times_previous(y_rows, y0, m, links)
            r = _rows(d_d) * s
            drive = drive + _times_previous(r, None, m, links)
        u = torch.ops.rnn_cuda.linear_recurrence(
            d, drive.view(y.shape), m, d_y0, ctx.reverse, ctx.batch_sizes
        )
        return u if r is None else u + r.view(y.shape)
