"""Differentiable recurrences: the Elman RNN, and the linear recurrence that is its derivative.

    P1  elman_rnn          h_t = f(W x_t + b_ih + U h_{t-1} + b_hh)
    P2  linear_recurrence  y_t = d_t * (g_t + M y_{t-1})

The backward pass of P1 is P2, run against time with d = f'(h), M = U^T and g = dL/dh; its
forward-mode derivative is P2 with M = U; and both derivatives of P2 are P2 again. So these two,
with matrix products between them, give derivatives of any order without Python per time step.
The derivation is in ``docs/differentiation.md``.

Shape legend: T time steps, B batch, I input size, H hidden size, N = sum(batch_sizes) packed rows.
"Rows" are a sequence flattened to (T * B, features), or the N rows of a packed one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rnn_cuda import backend, reference
from rnn_cuda.reference import NONLINEARITIES, activation_derivative

__all__ = ["NONLINEARITIES", "elman_rnn", "linear_recurrence"]

_SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    """Run one layer and direction of an Elman RNN over a sequence (Elman, 1990).

    ``h_t = f(W x_t + b_ih + U h_{t-1} + b_hh)``, W = ``weight_ih``, U = ``weight_hh``.

    All time steps are one native call; so is the recurrent part of the backward pass. Half
    precisions accumulate in float32 and round h_t once per step.

    Args:
        input: ``(T, B, I)``; ``(T, I)`` for one sequence without a batch; or, with ``batch_sizes``,
            the ``(N, I)`` data of a PackedSequence. Any strides.
        h0: initial state ``(B, H)``, ``(H,)`` without a batch; None for zeros.
        weight_ih: ``(H, I)``.
        weight_hh: ``(H, H)``.
        bias_ih: ``(H,)`` or None.
        bias_hh: ``(H,)`` or None.
        nonlinearity: f, one of ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"identity"``.
        reverse: run from the last time step to the first (the backward direction of a
            bidirectional layer).
        batch_sizes: ``batch_sizes`` of a PackedSequence: ``(T,)``, int64, on the CPU, not
            increasing; entry t counts the samples that have step t.

    Returns:
        output: every h_t, ``(T, B, H)``, ``(T, H)`` or ``(N, H)``.
        h_n: each sample's state after the last step visited, ``(B, H)`` or ``(H,)``.

    Raises:
        TypeError: an argument is not a tensor (or, where allowed, None).
        ValueError: a shape, dtype, device or name does not fit; the message says which, what was
            expected and what was given.

    """
    _check_tensor("input", input)
    _check_tensor("weight_ih", weight_ih)
    _check_tensor("weight_hh", weight_hh)
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(
            f"nonlinearity: expected one of {', '.join(NONLINEARITIES)}; got {nonlinearity!r}"
        )
    if weight_hh.ndim != 2 or weight_hh.shape[0] != weight_hh.shape[1] or weight_hh.shape[0] == 0:
        raise ValueError(
            f"weight_hh: expected shape (H, H) with H > 0, got {tuple(weight_hh.shape)}"
        )
    hidden = weight_hh.shape[0]
    if weight_ih.ndim != 2 or weight_ih.shape[0] != hidden:
        raise ValueError(
            f"weight_ih: expected shape (H, I) with H = {hidden} as in weight_hh, "
            f"got {tuple(weight_ih.shape)}"
        )
    batched = batch_sizes is not None or input.ndim != 2
    if not batched:
        input = input.unsqueeze(1)
        h0 = h0.unsqueeze(0) if isinstance(h0, Tensor) and h0.ndim == 1 else h0
    batch = _check_sequence("input", input, weight_ih.shape[1], batch_sizes)
    _check_like(input, h0, "h0", (batch, hidden))
    _check_like(input, weight_ih, "weight_ih", weight_ih.shape)
    _check_like(input, weight_hh, "weight_hh", weight_hh.shape)
    _check_like(input, bias_ih, "bias_ih", (hidden,))
    _check_like(input, bias_hh, "bias_hh", (hidden,))

    if backend.use_native(input.device.type, input.dtype):
        bias = bias_ih + bias_hh if bias_ih is not None and bias_hh is not None else bias_ih
        bias = bias_hh if bias is None else bias
        output, h_n = _ElmanRNN.apply(
            input, h0, weight_ih, weight_hh, bias, nonlinearity, reverse, batch_sizes
        )
    else:
        output, h_n = reference.elman_rnn(
            input,
            h0,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            nonlinearity=nonlinearity,
            reverse=reverse,
            batch_sizes=batch_sizes,
        )
    return (output, h_n) if batched else (output.squeeze(1), h_n.squeeze(0))


def linear_recurrence(
    d: Tensor,
    g: Tensor,
    m: Tensor,
    y0: Tensor | None = None,
    *,
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
) -> Tensor:
    """Run the modulated linear recurrence ``y_t = d_t * (g_t + M y_{t-1})``.

    It is the derivative of an Elman RNN, in either mode, and its own; as such it computes adjoints,
    tangents and products of Jacobians without leaving the kernel.

    Args:
        d: elementwise modulation, ``(T, B, H)``, or ``(N, H)`` with ``batch_sizes``.
        g: driving term, of the shape of ``d``.
        m: M, ``(H, H)``; a transposed view costs nothing.
        y0: state before the first step, ``(B, H)``; None for zeros.
        reverse: run from the last time step to the first; then ``y_{t-1}`` above is ``y_{t+1}``.
        batch_sizes: as in :func:`elman_rnn`.

    Returns:
        Every y_t, of the shape of ``g``.

    Raises:
        TypeError, ValueError: as in :func:`elman_rnn`.

    """
    _check_tensor("d", d)
    _check_tensor("g", g)
    _check_tensor("m", m)
    if m.ndim != 2 or m.shape[0] != m.shape[1] or m.shape[0] == 0:
        raise ValueError(f"m: expected shape (H, H) with H > 0, got {tuple(m.shape)}")
    batch = _check_sequence("g", g, m.shape[0], batch_sizes)
    _check_like(g, d, "d", g.shape)
    _check_like(g, m, "m", m.shape)
    _check_like(g, y0, "y0", (batch, m.shape[0]))
    if backend.use_native(g.device.type, g.dtype):
        return _LinearRecurrence.apply(d, g, m, y0, reverse, batch_sizes)
    return reference.linear_recurrence(d, g, m, y0, reverse=reverse, batch_sizes=batch_sizes)


# ---- checks --------------------------------------------------------------------------------------


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _check_sequence(name: str, sequence: Tensor, features: int, batch_sizes: Tensor | None) -> int:
    """Check a sequence and its batch_sizes; return the batch size B."""
    if sequence.dtype not in _SUPPORTED_DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in _SUPPORTED_DTYPES)
        raise ValueError(f"{name}: expected a dtype among {expected}; got {sequence.dtype}")
    expected = f"(T, B, {features})" if batch_sizes is None else f"(N, {features})"
    if sequence.ndim != (3 if batch_sizes is None else 2) or sequence.shape[-1] != features:
        raise ValueError(
            f"{name}: expected shape {expected}"
            f"{'' if batch_sizes is None else ' with batch_sizes'}, got {tuple(sequence.shape)}"
        )
    if sequence.shape[0] == 0 and batch_sizes is None:
        raise ValueError(f"{name}: expected at least one time step, got {tuple(sequence.shape)}")
    if batch_sizes is None:
        return sequence.shape[1]
    _check_tensor("batch_sizes", batch_sizes)
    if batch_sizes.device.type != "cpu" or batch_sizes.dtype != torch.int64:
        raise ValueError(
            "batch_sizes: expected an int64 tensor on the CPU, "
            f"got {batch_sizes.dtype} on {batch_sizes.device}"
        )
    sizes = batch_sizes.tolist() if batch_sizes.ndim == 1 else []
    if not sizes or sizes[-1] < 1 or any(b > a for a, b in itertools.pairwise(sizes)):
        raise ValueError(
            "batch_sizes: expected one dimension of positive, not increasing counts, as in a "
            f"PackedSequence; got {batch_sizes}"
        )
    if sum(sizes) != sequence.shape[0]:
        raise ValueError(
            f"batch_sizes: expected counts that add up to the {sequence.shape[0]} rows of {name}, "
            f"got a sum of {sum(sizes)}"
        )
    return sizes[0]


def _check_like(sequence: Tensor, value: Any, name: str, shape: Any) -> None:
    """Check that ``value`` is None or a tensor of ``shape``, on the sequence's dtype and device."""
    if value is None:
        return
    _check_tensor(name, value)
    if value.shape != torch.Size(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.dtype != sequence.dtype or value.device != sequence.device:
        raise ValueError(
            f"{name}: expected {sequence.dtype} on {sequence.device} as the sequence has, "
            f"got {value.dtype} on {value.device}"
        )


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
    def of(cls, sequence: Tensor, reverse: bool, batch_sizes: Tensor | None) -> _Links:
        if batch_sizes is None:
            rows, batch = sequence.shape[0] * sequence.shape[1], sequence.shape[1]
            later, earlier = slice(batch, rows), slice(0, rows - batch)
            begin, end = slice(0, batch), slice(rows - batch, rows)
        else:
            rows, batch = sequence.shape[0], int(batch_sizes[0])
            samples = torch.arange(batch)
            lengths = len(batch_sizes) - torch.searchsorted(
                batch_sizes.flip(0).contiguous(), samples, right=True
            )
            first_rows = batch_sizes.cumsum(0) - batch_sizes
            step_back = batch_sizes[:-1].repeat_interleave(batch_sizes[1:])
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


# ---- P1 ------------------------------------------------------------------------------------------


class _ElmanRNN(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        h0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        nonlinearity: str,
        reverse: bool,
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.rnn_cuda.elman_forward(
            input, h0, weight_ih, weight_hh, bias, nonlinearity, reverse, batch_sizes
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, h0, weight_ih, weight_hh, _, ctx.nonlinearity, ctx.reverse, ctx.batch_sizes = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, h0, weight_ih, weight_hh, output[0])
        ctx.save_for_forward(input, h0, weight_ih, weight_hh, output[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, grad_h_n = grads
        nothing = (None,) * 8
        if grad_output is None and grad_h_n is None:
            return nothing
        input, h0, weight_ih, weight_hh, output = ctx.saved_tensors
        links = _Links.of(output, ctx.reverse, ctx.batch_sizes)
        delta = _adjoint_of_preactivation(ctx, grad_output, grad_h_n, output, weight_hh, links)

        needs_input, needs_h0, needs_ih, needs_hh, needs_bias, *_ = ctx.needs_input_grad
        delta_rows, output_rows = _rows(delta), _rows(output)
        return (
            delta @ weight_ih if needs_input else None,
            _take(delta_rows, links.first) @ weight_hh if needs_h0 else None,
            delta_rows.mT @ _rows(input) if needs_ih else None,
            _outer_with_previous(delta_rows, output_rows, h0, links) if needs_hh else None,
            delta_rows.sum(0) if needs_bias else None,
            *nothing[5:],
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        d_input, d_h0, d_weight_ih, d_weight_hh, d_bias, *_ = tangents
        input, h0, weight_ih, weight_hh, output = ctx.saved_tensors
        links = _Links.of(output, ctx.reverse, ctx.batch_sizes)
        rows = _rows(output)
        drive = torch.zeros_like(rows)
        if d_input is not None:
            drive = drive + _rows(d_input) @ weight_ih.mT
        if d_weight_ih is not None:
            drive = drive + _rows(input) @ d_weight_ih.mT
        if d_weight_hh is not None:
            drive = drive + _times_previous(rows, h0, d_weight_hh, links)
        if d_bias is not None:
            drive = drive + d_bias
        tangent = _LinearRecurrence.apply(
            activation_derivative(output, ctx.nonlinearity),
            drive.view(output.shape),
            weight_hh,
            d_h0,
            ctx.reverse,
            ctx.batch_sizes,
        )
        return tangent, _take(_rows(tangent), links.last)


def _adjoint_of_preactivation(
    ctx: Any,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor,
    weight_hh: Tensor,
    links: _Links,
) -> Tensor:
    """delta_t = dL/dz_t = f'(h_t) * (dL/dh_t direct + U^T delta_{t+1})."""
    if not torch.is_grad_enabled():
        # First order: one operator, which reads f' off the output and takes absent gradients as is.
        return torch.ops.rnn_cuda.elman_backward(
            grad_output,
            grad_h_n,
            output,
            weight_hh,
            ctx.nonlinearity,
            ctx.reverse,
            ctx.batch_sizes,
        )
    # The gradient itself is to be differentiated: the same, in terms of P2.
    direct = torch.zeros_like(output) if grad_output is None else grad_output
    if grad_h_n is not None:
        direct = _add_at(_rows(direct), links.last, grad_h_n).view(output.shape)
    return _LinearRecurrence.apply(
        activation_derivative(output, ctx.nonlinearity),
        direct,
        weight_hh.mT,
        None,
        not ctx.reverse,
        ctx.batch_sizes,
    )


# ---- P2 ------------------------------------------------------------------------------------------


class _LinearRecurrence(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        d: Tensor,
        g: Tensor,
        m: Tensor,
        y0: Tensor | None,
        reverse: bool,
        batch_sizes: Tensor | None,
    ) -> Tensor:
        return torch.ops.rnn_cuda.linear_recurrence(d, g, m, y0, reverse, batch_sizes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        d, g, m, y0, ctx.reverse, ctx.batch_sizes = inputs
        ctx.save_for_backward(d, g, m, y0, output)
        ctx.save_for_forward(d, g, m, y0, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        d, g, m, y0, y = ctx.saved_tensors
        needs_d, needs_g, needs_m, needs_y0, *_ = ctx.needs_input_grad
        links = _Links.of(y, ctx.reverse, ctx.batch_sizes)
        # e_t, the adjoint of s_t = g_t + M y_{t-1}, is P2 against time:
        # e_t = d_t * (grad_t + M^T e_{t+1}).
        e = _LinearRecurrence.apply(d, grad, m.mT, None, not ctx.reverse, ctx.batch_sizes)
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
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        d_d, d_g, d_m, d_y0, *_ = tangents
        d, g, m, y0, y = ctx.saved_tensors
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
        u = _LinearRecurrence.apply(d, drive.view(y.shape), m, d_y0, ctx.reverse, ctx.batch_sizes)
        return u if r is None else u + r.view(y.shape)
