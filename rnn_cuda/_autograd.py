"""The derivatives of the two recurrences, by one another.

    P1, `ElmanRNN`           h_t = f(W x_t + b + U h_{t-1})
    P2, `LinearRecurrence`   y_t = d_t * (g_t + M y_{t-1})

The backward pass of P1 is P2, run against time with d = f'(h), M = U^T and g = dL/dh; its
forward-mode derivative is P2 with M = U; and both derivatives of P2 are P2 again. So these two,
with matrix products between them, give derivatives of any order without Python per time step.
The derivation is in ``docs/differentiation.md``.

Shape legend: T time steps, B batch, I input size, H hidden size, N = sum(batch_sizes) packed rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from rnn_cuda._adjoint import Direction, row_norms, total_adjoint
from rnn_cuda._dynamo import untraced
from rnn_cuda._links import Links, add_at, outer_with_previous, rows_of, take, times_previous
from rnn_cuda.reference import activation_derivative, compute_dtype


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


def plain_eager_mode() -> bool:
    """Whether what runs now is eager code, under no transform of torch.func and no forward mode.

    Then only reverse mode can follow, and `OperatorFunction.call` does for the dispatcher, whose
    way to an autograd kernel in Python and back takes longer than a small RNN.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _needs_graph(args: Sequence[Any]) -> bool:
    """Whether reverse mode has to follow what is computed from ``args``."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


class OperatorFunction(_SingleLevelFunction):
    """The autograd kernel of a native operator: its derivative in both modes, of every order.

    A plain ``torch.autograd.Function`` would not do, because torch.compile takes none that has a
    rule for forward mode; nor ``torch.library.register_autograd``, which knows no forward mode
    (tangents silently become zero) and no ``torch.func``. As the kernel of the dispatch key
    Autograd, a Function serves one level of ``torch.func`` at a time, as those of PyTorch's own
    operators do.
    """

    operator: ClassVar[str]

    # Part of the key of compiled autograd's cache, which a plain Function has.
    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    def __init_subclass__(cls) -> None:
        """Hide ``backward`` from Dynamo. The other rules run within `kernel`, which is hidden."""
        if "backward" in vars(cls):
            cls.backward = staticmethod(untraced(cls.backward))

    @classmethod
    def kernel(cls, *args: Any) -> Any:
        with enable_single_level_autograd_function():
            return cls._differentiable(*args)

    @classmethod
    @untraced
    def call(cls, *args: Any) -> Any:
        """Call the operator, in `plain_eager_mode`."""
        if torch.is_grad_enabled():
            # As the dispatcher does with tensors that were leaked out of a torch.func transform.
            args = tuple([unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args])
            if _needs_graph(args):
                return cls._differentiable(*args)
        return cls.below_autograd(*args)

    @classmethod
    def _differentiable(cls, *args: Any) -> Any:
        # In a tuple the outputs are hidden from apply(), which takes tensors for inputs.
        outputs = (cls.below_autograd(*args),)
        return cls.apply(*args, outputs)  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def below_autograd(cls, *args: Any) -> Any:
        """Call the native kernel, or the next level of torch.func if any.

        Not from `forward`: there, both modes of differentiation are off, and the next level wants
        the caller's.
        """
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.rnn_cuda, cls.operator)(*args)

    @staticmethod
    def forward(*args: Any) -> Any:
        return args[-1][0]  # the outputs, see _differentiable


class Shortcut(OperatorFunction):
    """The autograd kernel of an operator that computes what a composition of others does, faster.

    Derivatives are those of the composition.
    """

    composition: ClassVar[Callable[..., Any]]
    tensors: ClassVar[int]  # how many of the arguments are tensors to differentiate

    @classmethod
    def _differentiable(cls, *args: Any) -> Any:
        if _needs_graph(args):
            return cls.composition(*args)
        return super()._differentiable(*args)

    @classmethod
    def setup_context(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, ctx: Any, inputs: tuple[Any, ...], output: Any
    ) -> None:
        ctx.save_for_forward(*inputs[: cls.tensors])
        ctx.options = inputs[cls.tensors : -1]

    @classmethod
    def within_backward(cls, *args: Any, **of_composition: Any) -> Any:
        """Call the operator, or what reverse mode can follow where that has to."""
        if _needs_graph(args):
            return cls.composition(*args, **of_composition)
        if plain_eager_mode():
            return cls.below_autograd(*args)
        return getattr(torch.ops.rnn_cuda, cls.operator)(*args)

    @classmethod
    def jvp(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, ctx: Any, *_: Any
    ) -> Any:
        def tangent_of(output: Tensor) -> Tensor:
            primal, tangent = forward_ad.unpack_dual(output, level=0)
            return torch.zeros_like(primal) if tangent is None else tangent

        with forward_ad._set_fwd_grad_enabled(True):  # the saved tensors still have their tangents
            outputs = cls.composition(*ctx.saved_tensors, *ctx.options)
            if isinstance(outputs, tuple):
                return tuple(map(tangent_of, outputs))
            return tangent_of(outputs)


# ---- P1 ------------------------------------------------------------------------------------------


class ElmanRNN(OperatorFunction):
    """What eager code runs, unless a GradientFlow records it, is ``csrc/eager_layer.h`` instead."""

    operator = "elman_forward"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, h0, weight_ih, weight_hh, *_ = inputs
        ctx.options = inputs[5:8]  # nonlinearity, reverse, batch_sizes
        ctx.batch = output[1].shape[0]
        ctx.adjoint_sinks = [()]  # of the one direction; set from outside, on the node: it is ctx
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, h0, weight_ih, weight_hh, output[0])
        ctx.save_for_forward(input, h0, weight_ih, weight_hh, output[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (input, *states), (needs_input, *needs) = ctx.saved_tensors, ctx.needs_input_grad
        (sinks,) = ctx.adjoint_sinks
        direction = Direction(grads, states, ctx.options, needs[:4], sinks, ctx.batch)
        direction.check()
        return (*gradients_of_direction(direction, input, needs_input), *(None,) * 4)

    @staticmethod
    @_differentiable_again
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Any) -> tuple[Tensor, Tensor]:
        d_input, d_h0, d_weight_ih, d_weight_hh, d_bias, *_ = tangents
        input, h0, weight_ih, weight_hh, output = saved
        nonlinearity, reverse, batch_sizes = ctx.options
        links = Links.of(output, reverse, batch_sizes, ctx.batch)
        rows = rows_of(output)
        drive = torch.zeros_like(rows)
        if d_input is not None:
            drive = drive + rows_of(d_input) @ weight_ih.mT
        if d_weight_ih is not None:
            drive = drive + rows_of(input) @ d_weight_ih.mT
        if d_weight_hh is not None:
            drive = drive + times_previous(rows, h0, d_weight_hh, links)
        if d_bias is not None:
            drive = drive + d_bias.to(drive.dtype)
        tangent = torch.ops.rnn_cuda.linear_recurrence(
            activation_derivative(output, nonlinearity),
            drive.view(output.shape),
            weight_hh,
            d_h0,
            reverse,
            batch_sizes,
        )
        return tangent, take(rows_of(tangent), links.last)


def gradients_of_direction(
    direction: Direction, input: Tensor, needs_input: bool
) -> tuple[Tensor | None, ...]:
    """Those of the input, h0, weight_ih, weight_hh and the bias; the rest is None."""
    if not direction.is_reached:
        return (None,) * 5
    of_input, *others = ElmanGradients.within_backward(
        *direction.grads,
        input,
        *direction.states,
        *direction.options,
        (needs_input, *direction.wanted),
        batch=direction.batch,
    )
    return (of_input if needs_input else None, *direction.take(others))


def elman_gradients_by_parts(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    output: Tensor,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: Tensor | None,
    wanted: Sequence[bool],
    *,
    batch: int | None = None,
) -> tuple[Tensor, ...]:
    """The gradients as products of delta_t = dL/dz_t, to be differentiated and mapped further.

    Those of input, h0, weight_ih, weight_hh and the bias, and the `row_norms` of the adjoint
    dL/dh_t; what is not wanted has no elements. ``batch`` as in `Links.of`.
    """
    links = Links.of(output, reverse, batch_sizes, batch)
    delta = torch.ops.rnn_cuda.elman_backward(
        grad_output, grad_h_n, output, weight_hh, nonlinearity, reverse, batch_sizes
    )
    delta_rows, output_rows = rows_of(delta), rows_of(output)
    needs_input, needs_h0, needs_ih, needs_hh, needs_bias, needs_norm = wanted
    wide = compute_dtype(output.dtype)
    gradients: tuple[Tensor | None, ...] = (
        delta @ weight_ih if needs_input else None,
        take(delta_rows, links.first) @ weight_hh if needs_h0 else None,
        delta_rows.mT @ rows_of(input) if needs_ih else None,
        outer_with_previous(delta_rows, output_rows, h0, links) if needs_hh else None,
        delta_rows.sum(0, dtype=wide) if needs_bias else output.new_empty(0, dtype=wide),
        output.new_empty(0, dtype=torch.float64),
    )
    if needs_norm:
        adjoint = total_adjoint(grad_output, grad_h_n, delta, weight_hh, links)
        gradients = (*gradients[:-1], row_norms(adjoint))
    return tuple(output.new_empty(0) if g is None else g for g in gradients)


class ElmanGradients(Shortcut):
    """The same by one operator, which keeps no delta. It is what ordinary training runs."""

    operator = "elman_gradients"
    composition = staticmethod(elman_gradients_by_parts)
    tensors = 7


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
        last = Links.of(output, reverse, batch_sizes, grad_h_n.shape[0]).last
        direct = add_at(rows_of(direct), last, grad_h_n).view(output.shape)
    return torch.ops.rnn_cuda.linear_recurrence(
        activation_derivative(output, nonlinearity),
        direct,
        weight_hh.mT,
        None,
        not reverse,
        batch_sizes,
    )


class ElmanBackward(Shortcut):
    """The same by one operator, which reads f' off the output."""

    operator = "elman_backward"
    composition = staticmethod(elman_backward_by_p2)
    tensors = 4


# ---- P2 ------------------------------------------------------------------------------------------


class LinearRecurrence(OperatorFunction):
    operator = "linear_recurrence"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        d, g, m, y0, ctx.reverse, ctx.batch_sizes, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d, g, m, y0, output)
        ctx.save_for_forward(d, g, m, y0, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if grad is None:
            return (None,) * 7
        d, g, m, y0, y = ctx.saved_tensors
        needs_d, needs_g, needs_m, needs_y0, *_ = ctx.needs_input_grad
        links = Links.of(y, ctx.reverse, ctx.batch_sizes)
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
            s = rows_of(g) + times_previous(y_rows, y0, m, links)
            adjoint = add_at(rows_of(grad), links.previous, take(e_rows, links.current) @ m)
            grad_d = (s * adjoint).view(d.shape)
        return (
            grad_d,
            e if needs_g else None,
            outer_with_previous(e_rows, y_rows, y0, links) if needs_m else None,
            take(e_rows, links.first) @ m if needs_y0 else None,
            *(None,) * 3,
        )

    @staticmethod
    @_differentiable_again
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Any) -> Tensor:
        d_d, d_g, d_m, d_y0, *_ = tangents
        d, g, m, y0, y = saved
        links = Links.of(y, ctx.reverse, ctx.batch_sizes)
        y_rows = rows_of(y)
        # y'_t = r_t + d_t * (g'_t + M' y_{t-1} + M y'_{t-1}) with r_t = d'_t s_t. In terms of
        # u_t = y'_t - r_t this is P2 again, whatever d_t is.
        drive = torch.zeros_like(y_rows) if d_g is None else rows_of(d_g)
        if d_m is not None:
            drive = drive + times_previous(y_rows, y0, d_m, links)
        r = None
        if d_d is not None:
            s = rows_of(g) + times_previous(y_rows, y0, m, links)
            r = rows_of(d_d) * s
            drive = drive + times_previous(r, None, m, links)
        u = torch.ops.rnn_cuda.linear_recurrence(
            d, drive.view(y.shape), m, d_y0, ctx.reverse, ctx.batch_sizes
        )
        return u if r is None else u + r.view(y.shape)
