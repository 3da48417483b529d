"""Total adjoints of a layer, and what they say: contributions of a lag, memory horizons.

Shape legend: T time steps, B batch, H hidden size, G rows of the recurrent matrix (H per gate).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rnn_cuda import backend
from rnn_cuda.arguments import check_bool, check_nonlinearity, check_tensor
from rnn_cuda.cells import Cell, Linearisation, Weights
from rnn_cuda.cells.elman import activation_derivative
from rnn_cuda.functional import linear_recurrence
from rnn_cuda.linear_algebra import normalised, row_norms
from rnn_cuda.neighbours import StepNeighbours, add_at, rows_of, states_before
from rnn_cuda.operators.layer_gradients import adjoint_from_delta
from rnn_cuda.reference import time_slices
from rnn_cuda.trajectory import WIDE


def total_adjoint(
    direct: Tensor,
    h: Tensor,
    weight_hh: Tensor,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
) -> Tensor:
    r"""Return the total adjoint a_t = dL/dh_t of an Elman RNN, given its direct part.

    Autograd's gradient with respect to an RNN's output holds only what arrives at step t directly,
    c_t. What passes through later states comes on top: a_t = c_t + U^T (f'(h_{t+1}) a_{t+1}), one
    linear recurrence against time (the backpropagation through time of Werbos, 1990).

    Differentiable in every tensor: with ``create_graph=True`` in the call that made ``direct``, the
    result is a differentiable function of U, and can stand in a loss (:func:`omega`).

    Args:
        direct: c_t, ``(T, B, H)``, as from ``torch.autograd.grad(loss, output)``.
        h: every h_t, of that shape: the output of the layer and direction.
        weight_hh: U, ``(H, H)``.
        nonlinearity: f, one of ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"identity"``,
            ``"softplus"``.
        reverse: whether the layer runs from the last time step to the first.

    Returns:
        ``(T, B, H)``, in the dtype of ``direct``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what was expected
            and what was given.

    Cost: one call of `linear_recurrence` and one matrix product; 3 T B H numbers.

    """
    check_states(nonlinearity, weight_hh, direct=direct, h=h)
    check_bool("reverse", reverse)
    delta = linear_recurrence(
        activation_derivative(h, nonlinearity), direct, weight_hh.mT, reverse=not reverse
    )
    return direct + _shifted(delta @ weight_hh, None, later=not reverse)


@torch.no_grad()
def lag_contribution(
    delta: Tensor, h: Tensor, h0: Tensor | None = None, *, reverse: bool = False
) -> Tensor:
    r"""Return how much every time step adds to the gradient of the recurrent matrix.

    dL/dU is the sum over t of delta_t h_{t-1}^T, with delta_t = dL/dz_t (z_t what f is applied to).
    Each term has rank one, so its Frobenius norm is |delta_t| |h_{t-1}|, exactly, without forming
    it.

    Args:
        delta: ``(T, B, G)``. For an Elman RNN ``f'(h) * total_adjoint(...)``; for a gated layer the
            adjoints of whatever is U h_{t-1} + b_hh, all gates side by side.
        h: every h_t of the layer and direction, ``(T, B, H)``.
        h0: initial state ``(B, H)``; None for zeros.
        reverse: whether the layer runs from the last time step to the first.

    Returns:
        ``(T, B)``, float64. Zero where h_{t-1} or delta_t is.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what was expected
            and what was given.

    Cost: T B (G + H) operations and float64 numbers.

    """
    for name, value in (("delta", delta), ("h", h)):
        check_tensor(name, value)
        if value.ndim != 3 or 0 in value.shape:
            raise ValueError(
                f"{name}: expected three dimensions (T, B, features), none of them 0; "
                f"got {tuple(value.shape)}"
            )
    check_bool("reverse", reverse)
    if delta.shape[:2] != h.shape[:2]:
        raise ValueError(
            f"delta: expected (T, B) = {tuple(h.shape[:2])} as h has, got {tuple(delta.shape[:2])}"
        )
    if h0 is not None:
        check_tensor("h0", h0)
        if h0.shape != h.shape[1:]:
            raise ValueError(f"h0: expected shape {tuple(h.shape[1:])}, got {tuple(h0.shape)}")
        h0 = h0.to(WIDE)
    before = _shifted(h.to(WIDE), h0, later=reverse)
    return (normalised(delta.to(WIDE))[1] + normalised(before)[1]).exp()


@torch.no_grad()
def memory_horizon(profile: Tensor, threshold: float = 1e-3, *, reverse: bool = False) -> Tensor:
    r"""Return the largest lag whose adjoint is more than ``threshold`` times that of the last step.

    The largest k with |a_{T-k}| / |a_T| > threshold, where T is the last step processed. All lags
    are looked at: a profile that dips and rises again counts with its furthest part.

    Args:
        profile: norms of dL/dh_t, ``(T, ...)``, such as `GradientFlow` records.
        threshold: the ratio, above 0.
        reverse: whether the layer runs from the last time step to the first, so that ``profile[0]``
            belongs to the last step processed.

    Returns:
        int64 of the shape of ``profile[0]``; -1 where no lag is (the last step's norm is 0, and
        there is nothing to compare with, or ``threshold`` >= 1).

    Raises:
        TypeError, ValueError: an argument does not fit, or ``profile`` has negative entries or NaN.

    Cost: a few passes over ``profile``.

    """
    check_tensor("profile", profile)
    check_bool("reverse", reverse)
    if profile.ndim == 0 or profile.shape[0] == 0:
        raise ValueError(f"profile: expected shape (T, ...) with T > 0, got {tuple(profile.shape)}")
    if not bool((profile >= 0).all()):
        raise ValueError("profile: expected norms, got a negative entry or NaN")
    if not threshold > 0:
        raise ValueError(f"threshold: expected a number above 0, got {threshold}")
    by_lag = (profile if reverse else profile.flip(0)).to(WIDE)
    reached = by_lag / by_lag[0] > threshold  # 0 / 0 is NaN, and not above
    lags = torch.arange(len(by_lag), device=profile.device).view(-1, *[1] * (profile.ndim - 1))
    return torch.where(reached & (by_lag[0] > 0), lags, -1).amax(0)


def check_states(nonlinearity: str, weight_hh: Tensor, **states: Tensor) -> None:
    """Check tensors of one shape (T, B, H), named, and U (H, H) with the device of each."""
    check_nonlinearity(nonlinearity)
    check_tensor("weight_hh", weight_hh)
    shape = weight_hh.shape
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"weight_hh: expected shape (H, H), got {tuple(shape)}")
    expected = None
    for name, value in states.items():
        check_tensor(name, value)
        if value.ndim != 3 or value.shape[2] != shape[0] or 0 in value.shape:
            raise ValueError(
                f"{name}: expected shape (T, B, {shape[0]}) with at least one time step and "
                f"sample, got {tuple(value.shape)}"
            )
        if expected is not None and value.shape != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
        if value.device != weight_hh.device:
            raise ValueError(
                f"{name}: expected a tensor on {weight_hh.device} as weight_hh is, "
                f"got {value.device}"
            )
        expected = tuple(value.shape)


def _shifted(rows: Tensor, start: Tensor | None, *, later: bool) -> Tensor:
    """Return at each t the row of t + 1 if ``later``, else that of t - 1; ``start`` fills in."""
    fill = (torch.zeros_like(rows[0]) if start is None else start).unsqueeze(0)
    return torch.cat([rows[1:], fill]) if later else torch.cat([fill, rows[:-1]])


# ---- the sweep of a layer ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LayerRun:
    """One layer and direction, and what it computed in one call; all of one dtype.

    P is the size of the state h_t (H, or that of a projection), N the number of rows: T * B, or
    sum(batch_sizes) packed, in the order of a PackedSequence.

    Attributes:
        cell: the layer's.
        weights: what it computed with.
        input: ``(T, B, I)``, or packed ``(N, I)``.
        output: every h_t, ``(T, B, P)`` or ``(N, P)``.
        h0: ``(B, P)`` or None; `c0` ``(B, H)`` or None.
        reverse: whether it ran from the last step to the first.
        batch_sizes: of a packed sequence, else None.
        batch: B.
    """

    cell: Cell
    weights: Weights
    input: Tensor
    output: Tensor
    h0: Tensor | None
    c0: Tensor | None
    reverse: bool
    batch_sizes: Tensor | None
    batch: int

    @property
    def neighbours(self) -> StepNeighbours:
        """Which row follows which."""
        return StepNeighbours.of(self.output, self.reverse, self.batch_sizes, self.batch)

    def blocks(self) -> Iterator[Block]:
        """Cut the sequence, in the direction of the layer, into blocks that fit in a cache."""
        rows_per_block = max(1, _BLOCK_VALUES // self.weights.hh.shape[0])
        steps: list[tuple[int, int]] = []
        count, total = 0, len(rows_of(self.output))
        for step in time_slices(total, self.batch, self.batch_sizes, self.reverse):
            steps.append(step)
            count += step[1]
            if count >= rows_per_block:
                yield Block.of(steps, self.reverse)
                steps, count = [], 0
        if steps:
            yield Block.of(steps, self.reverse)

    def linearised_against_time(self) -> Iterator[tuple[Block, Linearisation]]:
        """Linearise the steps where the layer went, a block at a time, from the last to the first.

        Gates are computed anew, for many steps at once; c is, step by step.
        """
        x, h = rows_of(self.input), rows_of(self.output)
        h_before = states_before(h, self.h0, self.neighbours)

        def gates_of(block: Block) -> tuple[Tensor, ...]:
            input_sums = self.weights.input_sums(x[block.rows])
            return self.cell.gates(input_sums, self.weights.recurrent_sums(h_before[block.rows]))

        blocks = list(self.blocks())
        if not self.cell.has_cell_state:
            for block in reversed(blocks):
                rows = block.rows
                yield block, self.cell.linearise(gates_of(block), h_before[rows], h[rows])
            return
        size = self.weights.hh.shape[0] // self.cell.blocks
        start = x.new_zeros(self.batch, size) if self.c0 is None else self.c0
        state, forward = start[:0], []
        for block in blocks:
            gates = gates_of(block)
            before, after = torch.empty_like(gates[0]), torch.empty_like(gates[0])
            for count, b, a, *gates_t in block.steps(before, after, *gates):
                known = min(count, len(state))  # the other samples begin here
                torch.cat([state[:known], start[known:count]], out=b)
                state = a.copy_(self.cell.carry(tuple(gates_t), b))
            forward.append((block, gates, before, after))
        while forward:
            block, *saved = forward.pop()
            yield block, self.cell.linearise(*saved)


_BLOCK_VALUES = 1 << 18  # of all gates: a megabyte in float32


@dataclasses.dataclass(frozen=True)
class Block:
    """Some consecutive time steps."""

    rows: slice
    sizes: list[int]  # rows of each step, in the order of time
    reverse: bool  # whether the layer runs against that

    @classmethod
    def of(cls, steps: list[tuple[int, int]], reverse: bool) -> Block:
        """From the first row and the number of rows of each step, in the order of processing."""
        ordered = steps[::-1] if reverse else steps
        last_row, last_size = ordered[-1]
        rows = slice(ordered[0][0], last_row + last_size)
        return cls(rows, [size for _, size in ordered], reverse)

    def steps(self, *tensors: Tensor) -> list[tuple[Any, ...]]:
        """Return each step's size and its rows of tensors that hold the block's rows.

        In the order of processing.
        """
        parts = list(zip(self.sizes, *(t.split(self.sizes) for t in tensors), strict=True))
        return parts[::-1] if self.reverse else parts


@dataclasses.dataclass
class Adjoints:
    """What a sweep finds, in rows.

    Attributes:
        hidden: dL/dh_t, ``(N, P)``; None where only its norm was wanted.
        hidden_norm: float64 ``(N,)``.
        cell: if there is a c, dL/dc_t with h_t held fixed, ``(N, H)``.
        cell_total: the same with what c_t does through h_t, if wanted.
        input: dL/dx_t, ``(N, I)``, if wanted.
    """

    hidden: Tensor | None
    hidden_norm: Tensor
    cell: Tensor | None = None
    cell_total: Tensor | None = None
    input: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a sweep is to find besides the norms of dL/dh_t."""

    vectors: bool
    input: bool
    cell_total: bool


def adjoint_sweep(
    run: LayerRun,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    wanted: Wanted,
) -> Adjoints:
    """Return the total adjoints, given the direct parts of the gradient; None stands for zeros.

    The layer's own steps are linearised where the forward pass went, and

        a_t = g_t + (ds_{t+1} / ds_t)^T a_{t+1}

    is walked from the last step to the first. The sequential part is one small product per step, or
    one native call. In a state (h_t, c_t) the adjoint is taken with respect to each component with
    the other held fixed: dL/dh_t leaves out nothing, because c_t does not depend on h_t; dL/dc_t
    leaves out what c_t does through h_t.

    Args:
        run: the layer and its call.
        grad_output: direct part for every h_t, of the shape of ``run.output``.
        grad_h_n: for each sample's final h, ``(B, P)``.
        grad_c_n: for each sample's final c, ``(B, H)``, if there is one.
        wanted: what to find.

    """
    if run.cell.is_linear_recurrence:
        return _native_sweep(run, grad_output, grad_h_n, wanted)
    weights = run.weights
    direct = rows_of(torch.zeros_like(run.output) if grad_output is None else grad_output)
    hidden = torch.empty_like(direct)
    from_h = _arriving(grad_h_n, direct, run.batch)
    grad_input = torch.empty_like(rows_of(run.input)) if wanted.input else None
    cell = cell_total = None
    from_c = from_h
    if run.cell.has_cell_state:
        cell = direct.new_empty(len(direct), weights.hh.shape[0] // run.cell.blocks)
        cell_total = torch.empty_like(cell) if wanted.cell_total else None
        from_c = _arriving(grad_c_n, cell, run.batch)
    for block, linearisation in run.linearised_against_time():
        rows = block.rows
        a_h = hidden[rows]
        a_c = a_h if cell is None else cell[rows]
        steps = linearisation.steps(lambda part, sizes=block.sizes: part.split(sizes))
        steps = steps[::-1] if run.reverse else steps
        parts = block.steps(direct[rows], a_h, a_c)
        for step, (size, g, h_t, c_t) in zip(reversed(steps), reversed(parts), strict=True):
            torch.add(g, from_h[:size], out=h_t)
            if cell is not None:
                c_t.copy_(from_c[:size])
            delta, carried = step.pull(weights.pull_projection(h_t), c_t)
            if cell is None:
                torch.addmm(carried, delta, weights.hh, out=from_h[:size])
            else:
                torch.mm(delta, weights.hh, out=from_h[:size])
                from_c[:size] = carried
        if grad_input is not None:
            delta, _ = linearisation.for_input().pull(weights.pull_projection(a_h), a_c)
            torch.mm(delta, weights.ih, out=grad_input[rows])
        if cell_total is not None:
            cell_total[rows] = linearisation.total(weights.pull_projection(a_h), a_c)
    return Adjoints(hidden, row_norms(hidden), cell, cell_total, grad_input)


def _native_sweep(
    run: LayerRun, grad_output: Tensor | None, grad_h_n: Tensor | None, wanted: Wanted
) -> Adjoints:
    """Sweep by the native recurrences."""
    weight_ih, weight_hh = run.weights.ih, run.weights.hh
    if not wanted.vectors and backend.use_native(run.output.device.type, run.output.dtype):
        # A start from zeros has the same adjoints.
        *grad_input, norm = torch.ops.rnn_cuda.layer_gradients(
            [grad_output, None if grad_h_n is None else grad_h_n.unsqueeze(0)],
            *(run.input, [], [weight_ih, weight_hh], run.output, []),
            *(run.cell.operator_name, "reverse" if run.reverse else "forward"),
            *(run.batch_sizes, [wanted.input, False, False, True, False]),
        )
        return Adjoints(None, norm.flatten(), input=rows_of(*grad_input) if wanted.input else None)
    neighbours = run.neighbours
    direct = rows_of(torch.zeros_like(run.output) if grad_output is None else grad_output)
    if grad_h_n is not None:
        direct = add_at(direct, neighbours.last, grad_h_n)
    direct = direct.view(run.output.shape)
    delta = linear_recurrence(
        run.cell.derivative(run.output),
        direct,
        weight_hh.mT,
        reverse=not run.reverse,
        batch_sizes=run.batch_sizes,
    )
    hidden = rows_of(adjoint_from_delta(direct, None, delta, weight_hh, neighbours))
    grad_input = rows_of(delta) @ weight_ih if wanted.input else None
    return Adjoints(hidden, row_norms(hidden), input=grad_input)


def _arriving(final: Tensor | None, like: Tensor, batch: int) -> Tensor:
    """What arrives at each sample from later steps: at first, the gradient of its final state."""
    return like.new_zeros(batch, like.shape[-1]) if final is None else final.clone()
