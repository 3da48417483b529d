"""P2 of cells whose units carry a value of their own, and its derivatives.

    linear_recurrence(d, g, m, y0, reverse, batch_sizes, transposed) -> [y, v]

A cell's step, linearised where the forward pass went (`rnn_cuda.cells.Linearisation`):

    v_t = keep v_{t-1} + sum over gates of gain (M y_{t-1}) + b_t
    y_t = v_t, or with an exposure: exposure v_t + output_gain (M y_{t-1})_o + q_t

Shape legend: as in ``linear_recurrence.py``; G gates, without o. What belongs together lies side by
side in the features of one tensor: d is [gain, keep] ((G + 1) * H), or [gain, keep, exposure,
output_gain]; g is b, or [b, q]; M is (G * H, H), or ((G + 1) * H, H); y0 is y_0, or [y_0, v_0]; and
the result is y, or [y, v].

``transposed`` runs the transpose against time. Then g is the direct adjoint of the result, and the
result is its total adjoint; there is no y0. ``reverse`` is the way through time of the call itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rnn_cuda.cells import Linearisation
from rnn_cuda.neighbours import StepNeighbours, outer_with_previous, rows_of, states_before, take
from rnn_cuda.operators.function import OperatorFunction, differentiable_again

KERNEL_FORMS = {(1, False), (2, False), (3, False), (3, True)}
"""G, and whether there is an exposure: as in ``kLinearForms`` of ``csrc/cells/cells.h``."""


def parts_of(both: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """Return y and v, or what belongs to them; they may be the same."""
    if both.shape[-1] == hidden:
        return both, both
    return both[..., :hidden], both[..., hidden:]


def carried_states(
    keep: Tensor, new: Tensor, start: Tensor | None, reverse: bool, batch_sizes: Tensor | None
) -> Tensor:
    """Return every ``c_t = keep_t c_{t-1} + new_t``, a sequence.

    It is the recurrence with M = 0. Units stand for samples here, so that M is a single zero.
    """
    d = torch.stack([torch.zeros_like(keep), keep], dim=-1).flatten(-3, -2)
    g = new.flatten(-2).unsqueeze(-1)
    c = torch.ops.rnn_cuda.linear_recurrence(
        *(d, g, keep.new_zeros(1, 1), None if start is None else start.reshape(-1, 1)),
        *(reverse, None if batch_sizes is None else batch_sizes * keep.shape[-1]),
    )
    return c.view(new.shape)


class Coefficients(NamedTuple):
    """The parts of d, or what belongs to them; in rows, but for `of_cell` and `joined`."""

    gain: Tensor
    keep: Tensor
    exposure: Tensor | None = None
    output_gain: Tensor | None = None

    @classmethod
    def of_cell(cls, linearisation: Linearisation) -> Coefficients:
        """Those of a cell's steps."""
        gain, keep, exposure, output_gain, _ = linearisation
        if not isinstance(keep, Tensor):
            keep = torch.full_like(gain[..., 0, :], keep)
        return cls(gain.flatten(-2), keep, exposure, output_gain)

    @classmethod
    def of(cls, d: Tensor, hidden: int, exposes: bool) -> Coefficients:
        """Take d apart."""
        others = 3 if exposes else 1
        rows = rows_of(d)
        return cls(*rows.split([rows.shape[-1] - others * hidden, *[hidden] * others], dim=-1))

    def joined(self) -> Tensor:
        """Return d."""
        return torch.cat([part for part in self if part is not None], dim=-1)

    def drive(self, sums: Tensor) -> Tensor:
        """Return what sums (rows, M's rows) drive the recurrence with: g, in rows."""
        gates = self.gain.shape[-1]
        b = (self.gain * sums[..., :gates]).unflatten(-1, (-1, self.keep.shape[-1])).sum(-2)
        if self.output_gain is None:
            return b
        return torch.cat([b, self.output_gain * sums[..., gates:]], dim=-1)

    def deltas(self, adjoint: Tensor) -> Tensor:
        """Return the adjoints of the sums ``M y_{t-1}``, given that of the result, in rows."""
        hidden = self.keep.shape[-1]
        of_y, of_v = parts_of(adjoint, hidden)
        deltas = self.gain * of_v.repeat(1, self.gain.shape[-1] // hidden)
        if self.output_gain is None:
            return deltas
        return torch.cat([deltas, self.output_gain * of_y], dim=-1)

    def pulled(self, adjoint: Tensor, m: Tensor) -> Tensor:
        """Return what the adjoint of the result adds to that of the step before, in rows."""
        of_y, of_v = self.deltas(adjoint) @ m, self.keep * parts_of(adjoint, m.shape[-1])[1]
        return of_y + of_v if self.exposure is None else torch.cat([of_y, of_v], dim=-1)

    def pulled_to_start(self, adjoint: Tensor, m: Tensor, neighbours: StepNeighbours) -> Tensor:
        """Return what each sample's first step adds to the adjoint of its initial state."""
        first = neighbours.first
        parts = (None if part is None else take(part, first) for part in self)
        return Coefficients(*parts).pulled(take(adjoint, first), m)  # pyright: ignore[reportArgumentType]


class RecurrenceFunction(OperatorFunction):
    """What the two kinds of linear recurrence have in common."""

    operator = "linear_recurrence"

    @staticmethod
    def flat(  # pyright: ignore[reportIncompatibleMethodOverride]
        d: Tensor, g: Tensor, m: Tensor, y0: Tensor | None, *options: Any
    ) -> tuple[Sequence[Tensor | None], Any]:
        """See `OperatorFunction.flat`."""
        return (d, g, m, y0), options

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what the rules below need."""
        d, g, m, y0, (ctx.reverse, ctx.batch_sizes, *transposed), _ = inputs
        ctx.transposed = any(transposed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d, g, m, y0, output)
        ctx.save_for_forward(d, g, m, y0, output)


class LinearisedRecurrence(RecurrenceFunction):
    """The recurrence has its transpose for its derivative, and the other way round.

    Both are linear in g and y0. In d and M they are bilinear with what the other one returns, so a
    pair (states, adjoints) of theirs gives the rest of the derivative.
    """

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Propagate adjoints."""
        (grad,) = grads
        if grad is None:
            return (None,) * 6
        d, _, m, y0, result = ctx.saved_tensors
        needs_d, needs_g, needs_m, needs_y0, *_ = ctx.needs_input_grad
        hidden = m.shape[-1]
        # [b, q] belong to [v, y].
        drive = grad if not ctx.transposed else _swapped(grad, hidden)
        other = torch.ops.rnn_cuda.linear_recurrence(
            *(d, drive, m, None, not ctx.reverse, ctx.batch_sizes, not ctx.transposed)
        )
        states, adjoints = (other, result) if ctx.transposed else (result, other)
        states, adjoints = rows_of(states), rows_of(adjoints)
        forward = StepNeighbours.of(result, ctx.reverse != ctx.transposed, ctx.batch_sizes)
        before = states_before(states, y0, forward)
        c = Coefficients.of(d, hidden, grad.shape[-1] != hidden)
        deltas = c.deltas(adjoints)
        (y, v), (y_before, v_before) = parts_of(states, hidden), parts_of(before, hidden)
        of_y, of_v = parts_of(adjoints, hidden)
        grad_d = grad_y0 = None
        if needs_d:
            sums, gates = y_before @ m.mT, c.gain.shape[-1]
            parts = [sums[..., :gates] * of_v.repeat(1, gates // hidden), of_v * v_before]
            if c.exposure is not None:
                parts += [of_y * v, of_y * sums[..., gates:]]
            grad_d = torch.cat(parts, dim=-1).view(d.shape)
        if needs_y0:
            grad_y0 = c.pulled_to_start(adjoints, m, forward)
        y0 = None if y0 is None else parts_of(y0, hidden)[0]
        return (
            grad_d,
            (other if ctx.transposed else _swapped(other, hidden)) if needs_g else None,
            outer_with_previous(deltas, y, y0, forward) if needs_m else None,
            grad_y0,
            None,
            None,
        )

    @staticmethod
    @differentiable_again
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Any) -> Tensor:
        """Propagate tangents."""
        d, _, m, y0, result = saved
        d_d, d_g, d_m, d_y0, *_ = tangents
        hidden, rows = m.shape[-1], rows_of(result)
        exposes = rows.shape[-1] != hidden
        c = Coefficients.of(d, hidden, exposes)
        varied = Coefficients.of(torch.zeros_like(d) if d_d is None else d_d, hidden, exposes)
        neighbours = StepNeighbours.of(result, ctx.reverse, ctx.batch_sizes)
        if ctx.transposed:
            back = varied.pulled(rows, m)
            if d_m is not None:
                back = back + pad(c.deltas(rows) @ d_m, (0, back.shape[-1] - hidden))
            drive = states_before(back, None, neighbours)
            if varied.exposure is not None:
                drive = drive + pad(varied.exposure * parts_of(rows, hidden)[0], (hidden, 0))
        else:
            y_before, v_before = parts_of(states_before(rows, y0, neighbours), hidden)
            drive = varied.drive(y_before @ m.mT)
            if d_m is not None:
                drive = drive + c.drive(y_before @ d_m.mT)
            kept = varied.keep * v_before
            if varied.exposure is not None:
                kept = torch.cat([kept, varied.exposure * parts_of(rows, hidden)[1]], -1)
            drive = drive + kept
        drive = drive.view(result.shape)
        return torch.ops.rnn_cuda.linear_recurrence(
            *(d, drive if d_g is None else drive + d_g, m, d_y0),
            *(ctx.reverse, ctx.batch_sizes, ctx.transposed),
        )


def _swapped(both: Tensor, hidden: int) -> Tensor:
    """Return [b, q] for [y, v], and back."""
    if both.shape[-1] == hidden:
        return both
    return torch.cat([both[..., hidden:], both[..., :hidden]], dim=-1)
