"""Total adjoints of one recurrent layer and direction, by a sweep against time.

Given what autograd brings to the layer from outside (the direct parts g_t, of the outputs, and the
gradient of the final state), the layer's own steps are linearised where the forward pass went, and

    a_t = g_t + (dh_{t+1} / dh_t)^T a_{t+1}

is walked from the last step to the first. States h_t are those that the layer returned; gates are
computed anew from them, for many steps at once. The sequential part is one small product per step,
or one native call for an Elman RNN.

The carried state of an LSTM is (h_t, c_t). Its adjoint is taken with respect to each component with
the other held fixed: dL/dh_t leaves out nothing, because c_t does not depend on h_t; dL/dc_t
leaves out what c_t does through h_t = o_t tanh(c_t).

Equations: Hochreiter & Schmidhuber (1997) with the forget gate of Gers et al. (2000) and the
projection of Sak et al. (2014), and Cho et al. (2014), as torch.nn.LSTM and torch.nn.GRU have them.

Shape legend: T time steps, B batch, I input size, H hidden size, P size of the state h_t (H, or
proj_size), N rows: T * B, or sum(batch_sizes) packed, in the order of a PackedSequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnn_cuda import backend
from rnn_cuda._adjoint import row_norms, total_adjoint
from rnn_cuda.functional import linear_recurrence
from rnn_cuda.neighbours import StepNeighbours, add_at, rows_of, take
from rnn_cuda.reference import activation, activation_derivative, time_slices


@dataclasses.dataclass(frozen=True)
class LayerRun:
    """One layer and direction, and what it computed in one call; all of one dtype.

    Attributes:
        kind: ``"lstm"``, ``"gru"``, or the nonlinearity of an Elman RNN.
        input: ``(T, B, I)``, or packed ``(N, I)``.
        output: every h_t, ``(T, B, P)`` or ``(N, P)``.
        h0: ``(B, P)`` or None; `c0` ``(B, H)`` or None.
        weights: by name as in torch, without the layer's suffix.
        reverse: whether it ran from the last step to the first.
        batch_sizes: of a packed sequence, else None.
        batch: B.
        keep, rate: of an Elman RNN ``h_t = keep h_{t-1} + rate f(W x_t + A h_{t-1} + b)``, whose A
            then stands for ``weight_hh``.
    """

    kind: str
    input: Tensor
    output: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: dict[str, Tensor]
    reverse: bool
    batch_sizes: Tensor | None
    batch: int
    keep: float = 0.0
    rate: float = 1.0

    @property
    def neighbours(self) -> StepNeighbours:
        return StepNeighbours.of(self.output, self.reverse, self.batch_sizes, self.batch)

    def preactivation(self, kind: str, rows: Tensor) -> Tensor:
        """``rows W^T + b`` of the weights that are for ``"ih"`` or ``"hh"``."""
        return linear(rows, self.weights[f"weight_{kind}"], self.weights.get(f"bias_{kind}"))

    def blocks(self, *, against: bool = False) -> Iterator[Block]:
        """Cut the sequence, in the direction of the layer, into blocks that fit in a cache."""
        rows_per_block = max(1, _BLOCK_VALUES // self.weights["weight_hh"].shape[0])
        steps: list[tuple[int, int]] = []
        count, total = 0, len(rows_of(self.output))
        reverse = self.reverse != against
        for step in time_slices(total, self.batch, self.batch_sizes, reverse):
            steps.append(step)
            count += step[1]
            if count >= rows_per_block:
                yield Block.of(steps, reverse)
                steps, count = [], 0
        if steps:
            yield Block.of(steps, reverse)


_BLOCK_VALUES = 1 << 18  # of all gates: a megabyte in float32


@dataclasses.dataclass(frozen=True)
class Block:
    """Some consecutive time steps."""

    rows: slice
    sizes: list[int]  # rows of each step, in the order of time
    reverse: bool

    @classmethod
    def of(cls, steps: list[tuple[int, int]], reverse: bool) -> Block:
        """From the first row and the number of rows of each step, in the order of processing."""
        ordered = steps[::-1] if reverse else steps
        last_row, last_size = ordered[-1]
        rows = slice(ordered[0][0], last_row + last_size)
        return cls(rows, [size for _, size in ordered], reverse)

    def steps(self, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield the size of each step and its rows of tensors that hold the block's rows."""
        parts = list(zip(self.sizes, *(t.split(self.sizes) for t in tensors), strict=True))
        return reversed(parts) if self.reverse else iter(parts)


@dataclasses.dataclass
class Adjoints:
    """What a sweep finds, in rows.

    Attributes:
        hidden: dL/dh_t, ``(N, P)``; None where only its norm was wanted.
        hidden_norm: float64 ``(N,)``.
        cell: of an LSTM dL/dc_t with h_t held fixed, ``(N, H)``.
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


def sweep(
    run: LayerRun,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    wanted: Wanted,
) -> Adjoints:
    """Return the total adjoints, given the direct parts of the gradient; None stands for zeros.

    Args:
        run: the layer and its call.
        grad_output: direct part for every h_t, of the shape of ``run.output``.
        grad_h_n: for each sample's final h, ``(B, P)``.
        grad_c_n: for each sample's final c, ``(B, H)``; LSTM only.
        wanted: what to find.

    """
    if run.kind == "lstm":
        return _lstm(run, grad_output, grad_h_n, grad_c_n, wanted)
    if run.kind == "gru":
        return _gru(run, grad_output, grad_h_n, wanted)
    if run.keep == 0 and run.rate == 1:
        return _elman(run, grad_output, grad_h_n, wanted)
    return _residual(run, grad_output, grad_h_n, wanted)


def previous(rows: Tensor, initial: Tensor | None, neighbours: StepNeighbours) -> Tensor:
    """The state before each row's step."""
    before = add_at(torch.zeros_like(rows), neighbours.current, take(rows, neighbours.previous))
    return before if initial is None else add_at(before, neighbours.first, initial)


def _direct(run: LayerRun, grad_output: Tensor | None) -> Tensor:
    return rows_of(torch.zeros_like(run.output) if grad_output is None else grad_output)


def _carried(final: Tensor | None, like: Tensor, batch: int) -> Tensor:
    """What arrives at each sample from later steps: at first, the gradient of its final state."""
    return like.new_zeros(batch, like.shape[-1]) if final is None else final.clone()


def _elman(
    run: LayerRun, grad_output: Tensor | None, grad_h_n: Tensor | None, wanted: Wanted
) -> Adjoints:
    weight_ih, weight_hh = run.weights["weight_ih"], run.weights["weight_hh"]
    if not wanted.vectors and backend.use_native(run.output.device.type, run.output.dtype):
        # A start from zeros has the same adjoints.
        *grad_input, norm = torch.ops.rnn_cuda.layer_gradients(
            [grad_output, None if grad_h_n is None else grad_h_n.unsqueeze(0)],
            *(run.input, [], [weight_ih, weight_hh], run.output, []),
            *(f"elman.{run.kind}", "reverse" if run.reverse else "forward", run.batch_sizes),
            [wanted.input, False, False, True, False],
        )
        return Adjoints(None, norm.flatten(), input=rows_of(*grad_input) if wanted.input else None)
    neighbours = run.neighbours
    direct = _direct(run, grad_output)
    if grad_h_n is not None:
        direct = add_at(direct, neighbours.last, grad_h_n)
    direct = direct.view(run.output.shape)
    delta = linear_recurrence(
        activation_derivative(run.output, run.kind),
        direct,
        weight_hh.mT,
        reverse=not run.reverse,
        batch_sizes=run.batch_sizes,
    )
    hidden = rows_of(total_adjoint(direct, None, delta, weight_hh, neighbours))
    grad_input = rows_of(delta) @ weight_ih if wanted.input else None
    return Adjoints(hidden, row_norms(hidden), input=grad_input)


def _residual(
    run: LayerRun, grad_output: Tensor | None, grad_h_n: Tensor | None, wanted: Wanted
) -> Adjoints:
    x, h_before = rows_of(run.input), previous(rows_of(run.output), run.h0, run.neighbours)
    direct = _direct(run, grad_output)
    hidden, carried = torch.empty_like(direct), _carried(grad_h_n, direct, run.batch)
    grad_input = torch.empty_like(x) if wanted.input else None
    for block in run.blocks(against=True):
        rows = block.rows
        z = run.preactivation("ih", x[rows]) + run.preactivation("hh", h_before[rows])
        of_z = run.rate * activation_derivative(activation(z, run.kind), run.kind)
        for size, g, a, of_z_t in block.steps(direct[rows], hidden[rows], of_z):
            torch.add(g, carried[:size], out=a)
            torch.addmm(run.keep * a, of_z_t * a, run.weights["weight_hh"], out=carried[:size])
        if grad_input is not None:
            torch.mm(of_z * hidden[rows], run.weights["weight_ih"], out=grad_input[rows])
    return Adjoints(hidden, row_norms(hidden), input=grad_input)


def _lstm(
    run: LayerRun,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    wanted: Wanted,
) -> Adjoints:
    weight_hh, projection = run.weights["weight_hh"], run.weights.get("weight_hr")
    x, H = rows_of(run.input), weight_hh.shape[0] // 4
    gates, c, c_before = _lstm_states(run)
    direct = _direct(run, grad_output)
    hidden, cell = torch.empty_like(direct), torch.empty_like(c)
    cell_total = torch.empty_like(c) if wanted.cell_total else None
    from_h, from_c = _carried(grad_h_n, direct, run.batch), _carried(grad_c_n, c, run.batch)
    grad_input = torch.empty_like(x) if wanted.input else None
    for block in run.blocks(against=True):
        rows = block.rows
        i, f, g, o = gates[rows].chunk(4, dim=-1)
        tanh_c = c[rows].tanh()
        through_h = o * (1 - tanh_c * tanh_c)  # dh/dc
        # The derivatives of c with respect to the sums in i, f, g, and of h to that in o.
        of_c = torch.stack([g * i * (1 - i), c_before[rows] * f * (1 - f), i * (1 - g * g)], dim=1)
        of_h = tanh_c * o * (1 - o)
        f = f.clone()
        # The gates are not needed any more: the gradients of the sums in them take their place.
        delta = gates[rows]
        to_ifg, to_o = delta.view(-1, 4, H)[:, :3], delta[:, 3 * H :]
        before_gates = block.steps(direct[rows], hidden[rows], cell[rows], through_h, of_c, of_h, f)
        after_gates = block.steps(to_ifg, to_o, delta)
        for (size, g_t, a_h, a_c, through, k_c, k_h, f_t), (_, d_ifg, d_o, d) in zip(
            before_gates, after_gates, strict=True
        ):
            a = torch.add(g_t, from_h[:size], out=a_h)
            if projection is not None:
                a = a @ projection
            a_c.copy_(from_c[:size])
            of_both = torch.addcmul(a_c, a, through)
            torch.mul(k_c, of_both.unsqueeze(1), out=d_ifg)
            torch.mul(k_h, a, out=d_o)
            torch.mm(d, weight_hh, out=from_h[:size])
            torch.mul(of_both, f_t, out=from_c[:size])
        if grad_input is not None:
            torch.mm(delta, run.weights["weight_ih"], out=grad_input[rows])
        if cell_total is not None:
            a = hidden[rows] if projection is None else hidden[rows] @ projection
            torch.addcmul(cell[rows], a, through_h, out=cell_total[rows])
    return Adjoints(hidden, row_norms(hidden), cell, cell_total, grad_input)


def _lstm_states(run: LayerRun) -> tuple[Tensor, Tensor, Tensor]:
    """The gates i, f, g, o ``(N, 4 H)``, the cells c_t and those before them ``(N, H)``."""
    weight_ih, weight_hh = run.weights["weight_ih"], run.weights["weight_hh"]
    x, h_before = rows_of(run.input), previous(rows_of(run.output), run.h0, run.neighbours)
    H = weight_hh.shape[0] // 4
    bias = x.new_zeros(4 * H)
    for name in ("bias_ih", "bias_hh"):
        bias = bias + run.weights.get(name, 0)
    gates = x.new_empty(len(x), 4 * H)
    c, c_before = x.new_empty(len(x), H), x.new_empty(len(x), H)
    start = x.new_zeros(run.batch, H) if run.c0 is None else run.c0
    state = start[:0]
    for block in run.blocks():
        z = gates[block.rows]
        torch.addmm(bias, x[block.rows], weight_ih.T, out=z).addmm_(
            h_before[block.rows], weight_hh.T
        )
        z[:, : 2 * H].sigmoid_()
        z[:, 2 * H : 3 * H].tanh_()
        z[:, 3 * H :].sigmoid_()
        i, f, g, _ = z.chunk(4, dim=-1)
        for size, added, f_t, before, c_t in block.steps(
            i * g, f, c_before[block.rows], c[block.rows]
        ):
            known = min(size, len(state))  # the other samples begin here
            before[:known] = state[:known]
            before[known:] = start[known:size]
            state = torch.addcmul(added, f_t, before, out=c_t)
    return gates, c, c_before


def _gru(
    run: LayerRun, grad_output: Tensor | None, grad_h_n: Tensor | None, wanted: Wanted
) -> Adjoints:
    weight_hh = run.weights["weight_hh"]
    x, h_before = rows_of(run.input), previous(rows_of(run.output), run.h0, run.neighbours)
    direct = _direct(run, grad_output)
    hidden, carried = torch.empty_like(direct), _carried(grad_h_n, direct, run.batch)
    grad_input = torch.empty_like(x) if wanted.input else None
    for block in run.blocks(against=True):
        rows = block.rows
        of_x, of_h = run.preactivation("ih", x[rows]), run.preactivation("hh", h_before[rows])
        (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.chunk(3, dim=-1), of_h.chunk(3, dim=-1)
        r, z = (x_r + h_r).sigmoid_(), (x_z + h_z).sigmoid_()
        n = torch.addcmul(x_n, r, h_n).tanh_()
        # The derivatives of h_t = (1 - z) n + z h_{t-1} with respect to the sums in the gates; in
        # n's, r stands before the part that comes from h_{t-1}.
        of_n = (1 - z) * (1 - n * n)
        of_r, of_z = of_n * h_n * r * (1 - r), (h_before[rows] - n) * z * (1 - z)
        to_h = torch.stack([of_r, of_z, of_n * r], dim=1)
        for size, g, a, k, z_t in block.steps(direct[rows], hidden[rows], to_h, z):
            torch.add(g, carried[:size], out=a)
            delta = (k * a.unsqueeze(1)).flatten(1)
            torch.addmm(a * z_t, delta, weight_hh, out=carried[:size])
        if grad_input is not None:
            of_sums = torch.stack([of_r, of_z, of_n], dim=1) * hidden[rows].unsqueeze(1)
            torch.mm(of_sums.flatten(1), run.weights["weight_ih"], out=grad_input[rows])
    return Adjoints(hidden, row_norms(hidden), input=grad_input)
