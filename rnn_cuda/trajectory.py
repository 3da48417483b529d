"""The trajectory of one layer and direction, and products with its one-step Jacobians.

Every instrument that looks at Jacobian products sees a layer as a map s_t = F_t(s_{t-1}) of the
state s that it carries: h, or (h, c) side by side. Time is counted in the order of processing, so
that for a reverse direction s_1 belongs to the last element of the sequence; s_0 is the initial
state.

Shape legend: T time steps, B batch, I input size, H hidden size, S size of the carried state, G
gates, K vectors per sample, L layers, D directions. Blocks of vectors are (B, K, S), one vector a
row.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rnn_cuda import backend, reference
from rnn_cuda.arguments import check_bool, check_int, check_tensor, type_name
from rnn_cuda.cells import Cell, Linearisation, Weights, cell_of, recurrent_matrix
from rnn_cuda.functional import elman_rnn, linear_recurrence
from rnn_cuda.neighbours import rows_of
from rnn_cuda.operators.linearised import KERNEL_FORMS, Coefficients, carried_states
from rnn_cuda.stack import RecurrentStack

Recurrent: TypeAlias = RecurrentStack | nn.RNN | nn.GRU | nn.LSTM
State: TypeAlias = Tensor | tuple[Tensor, Tensor]

WIDE = torch.float64
"""What the instruments compute in, whatever the layer's dtype."""


class Trajectory:
    """What one layer and direction does with one input, and products with its Jacobians.

    Attributes:
        cell: the layer's.
        states: s_0 .. s_T, ``(T + 1, B, S)``.

    """

    def __init__(self, cell: Cell, weights: Weights, x: Tensor, state: tuple[Tensor, ...]) -> None:
        """Run the layer over ``x`` ``(T, B, I)``, in the order of processing."""
        self.cell, self._weights = cell, weights
        self._sizes = [part.shape[-1] for part in state]
        self._input_sums = weights.input_sums(x)
        if cell.is_linear_recurrence:
            arguments: Any = (x, *state, *weights[:4])
            outputs = elman_rnn(*arguments, nonlinearity=cell.nonlinearity)[:1]
        elif cell.operator_name is not None and self._runs_natively(x):
            outputs = self._native_states(x, state)
        else:
            rows, _ = reference.run_cell(
                cell,
                self._input_sums.flatten(0, 1),
                state,
                weights.hh,
                weights.bias_hh,
                weights.projection,
            )
            outputs = [part.view(*x.shape[:2], -1) for part in rows]
        self.states = torch.cat([torch.cat(state, dim=-1).unsqueeze(0), torch.cat(outputs, dim=-1)])

    def _runs_natively(self, like: Tensor) -> bool:
        """Whether the native recurrences run the linearised steps of this gated cell."""
        exposes = self.cell.has_cell_state
        return (
            self._weights.projection is None
            and (self.cell.blocks - exposes, exposes) in KERNEL_FORMS
            and backend.takes_gated_cells(like.device.type, like.dtype)
        )

    def _native_states(self, x: Tensor, state: tuple[Tensor, ...]) -> list[Tensor]:
        weights = [weight for weight in self._weights if weight is not None]
        weights += self.cell.constant_tensors(state[0])
        starts = [part.unsqueeze(0) for part in state]
        arguments: Any = (x, starts, weights, self.cell.operator_name, "forward", None)
        h, *_ = torch.ops.rnn_cuda.layer(*arguments)
        if not self.cell.has_cell_state:
            return [h]
        h_before = torch.cat([state[0].unsqueeze(0), h[:-1]])
        self.activations = gates = self._gates_from(h_before)
        new = self.cell.carry(gates, torch.zeros_like(h))
        return [h, carried_states(self.cell.kept_share(gates), new, state[1], False, None)]

    @property
    def length(self) -> int:
        """T."""
        return self.states.shape[0] - 1

    @property
    def batch(self) -> int:
        """B."""
        return self.states.shape[1]

    @property
    def size(self) -> int:
        """S."""
        return self.states.shape[2]

    @property
    def output(self) -> Tensor:
        """What the layer above sees, in the order of processing."""
        return self.states[1:, :, : self._sizes[0]]

    @property
    def gates(self) -> dict[str, Tensor]:
        """The activations of each gate by name, ``(T, B, H)``; empty without gates."""
        return dict(zip(self.cell.gate_names, self.activations, strict=False))

    @cached_property
    def activations(self) -> tuple[Tensor, ...]:
        """What `Cell.gates` returns, each ``(T, B, H)``: without gates, ``f(z_t)``."""
        return self._gates_from(self.states[:-1, :, : self._sizes[0]])

    def _gates_from(self, h_before: Tensor) -> tuple[Tensor, ...]:
        return self.cell.gates(self._input_sums, self._weights.recurrent_sums(h_before))

    @cached_property
    def linearisation(self) -> Linearisation:
        """That of every step, ``(T, B, ..)``."""
        carried = self.states[..., -self._sizes[-1] :]
        return self.cell.linearise(self.activations, carried[:-1], carried[1:])

    @cached_property
    def _steps(self) -> list[Linearisation]:
        # Taken apart once: indexing a step in each push would make its derivative cost T^2.
        return self.linearisation.steps(lambda part: part.unsqueeze(2).unbind())  # (B, 1, ..)

    @cached_property
    def _coefficients(self) -> Tensor | None:
        """The native recurrence's d, ``(T, B, ..)``, where it runs this gated cell."""
        if not self._runs_natively(self.states):
            return None
        return Coefficients.of_cell(self.linearisation).joined()

    @cached_property
    def _derivative(self) -> Tensor:
        """Of a linear recurrence, ``(T, B, H)``."""
        return self.cell.derivative(self.output)

    def push(self, block: Tensor, start: int, stop: int) -> Tensor:
        """Return ``J_stop ... J_{start+1} v`` for each row v, with J_t = ds_t/ds_{t-1}."""
        if self.cell.is_linear_recurrence:
            d = self._for_each_row(self._derivative, block, start, stop)
            none = d.new_zeros(self.size).expand_as(d)
            return linear_recurrence(d, none, self._weights.hh, block.flatten(0, 1))[-1].view_as(
                block
            )
        if self._coefficients is not None:
            d = self._for_each_row(self._coefficients, block, start, stop)
            nothing = d.new_zeros(self.size).expand(*d.shape[:-1], -1)
            tangents = torch.ops.rnn_cuda.linear_recurrence(
                d, nothing, self._weights.hh, block.flatten(0, 1), False, None
            )
            return tangents[-1].view_as(block)
        hidden, carried = self._parts(block)
        for step in self._steps[start:stop]:
            sums = (hidden @ self._weights.hh.mT).unflatten(-1, (self.cell.blocks, -1))
            hidden, carried = step.push(sums, carried)
            hidden = self._weights.project(hidden)
        return self._joined(hidden, carried)

    def pull_each(self, block: Tensor, start: int, stop: int) -> Tensor:
        """Return ``J_{i+1}^T ... J_stop^T v`` for i = start .. stop - 1: ``(i, B, K, S)``."""
        if self.cell.is_linear_recurrence:
            return (self._deltas(block, start, stop) @ self._weights.hh).view(-1, *block.shape)
        if self._coefficients is not None:
            d = self._for_each_row(self._coefficients, block, start, stop)
            direct = d.new_zeros(*d.shape[:-1], self.size)
            direct[-1] = block.flatten(0, 1)
            adjoints = torch.ops.rnn_cuda.linear_recurrence(
                d, direct, self._weights.hh, None, True, None, True
            )
            c = Coefficients.of(d, self._sizes[-1], self.cell.has_cell_state)
            return c.pulled(rows_of(adjoints), self._weights.hh).view(-1, *block.shape)
        pulled = []
        hidden, carried = self._parts(block)
        for step in reversed(self._steps[start:stop]):
            delta, carried = step.pull(self._weights.pull_projection(hidden), carried)
            hidden = delta @ self._weights.hh
            if not self.cell.has_cell_state:
                hidden = carried = hidden + carried
            pulled.append(self._joined(hidden, carried))
        return torch.stack(pulled[::-1])

    def pull(self, block: Tensor, start: int, stop: int) -> Tensor:
        """Return the last of :meth:`pull_each`, that for i = start."""
        if self.cell.is_linear_recurrence:
            return (self._deltas(block, start, stop)[0] @ self._weights.hh).view_as(block)
        return self.pull_each(block, start, stop)[0]

    def _deltas(self, block: Tensor, start: int, stop: int) -> Tensor:
        """Return the adjoints of the sums z after ``start``: ``(steps, B * K, H)``."""
        d = self._for_each_row(self._derivative, block, start, stop)
        arriving = d.new_zeros(d.shape)
        arriving[-1] = block.flatten(0, 1)
        return linear_recurrence(d, arriving, self._weights.hh.mT, reverse=True)

    @staticmethod
    def _for_each_row(values: Tensor, block: Tensor, start: int, stop: int) -> Tensor:
        """Return those of the steps after ``start``, once for each row: ``(steps, B * K, H)``."""
        values = values[start:stop].unsqueeze(2)
        return values.expand(-1, -1, block.shape[1], -1).flatten(1, 2)  # for B = 1 a view

    def _parts(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Return those of h and of what a unit carries on its own, which may be h."""
        parts = block.split(self._sizes, dim=-1)
        return parts[0], parts[-1]

    def _joined(self, hidden: Tensor, carried: Tensor) -> Tensor:
        return torch.cat([hidden, carried], dim=-1) if self.cell.has_cell_state else hidden


def trajectory_of(
    module: Recurrent, input: Tensor, hx: State | None, *, layer: int, reverse: bool
) -> Trajectory:
    """Run ``module`` up to ``layer`` in float64, without dropout; return the trajectory of that.

    Differentiable in the parameters, ``input`` and ``hx``.

    Raises:
        TypeError: ``module`` is none of these layers, or an argument is of the wrong type (a
            PackedSequence, for instance: pad it or take one sample at a time).
        ValueError: there is no such layer or direction, or a shape or device does not fit.

    """
    if not isinstance(module, Recurrent):
        raise TypeError(
            "module should be a recurrent layer of this package (FusedRNN, FusedGRU, FusedLSTM, "
            "LeakyRNN, AntisymmetricRNN) or of torch (nn.RNN, nn.GRU, nn.LSTM), "
            f"got: {type_name(module)}"
        )
    check_int("layer", layer)
    check_bool("reverse", reverse)
    if not 0 <= layer < module.num_layers:
        raise ValueError(
            f"layer: expected 0 to {module.num_layers - 1}, as module has {module.num_layers} "
            f"layers; got {layer}"
        )
    if reverse and not module.bidirectional:
        raise ValueError("reverse: expected False, as module is not bidirectional; got True")
    x = _time_first(module, input)
    cell = cell_of(module)
    assert cell is not None
    start = _initial_states(module, cell, hx, x)
    directions = 2 if module.bidirectional else 1
    for below in range(layer):
        outputs = []
        for direction in range(directions):
            output = _run(module, cell, below, direction == 1, x, start).output
            outputs.append(output.flip(0) if direction == 1 else output)
        x = torch.cat(outputs, dim=-1)
    return _run(module, cell, layer, reverse, x, start)


def _time_first(module: Recurrent, input: Tensor) -> Tensor:
    """Check ``input``; return it as ``(T, B, I)`` in float64."""
    check_tensor("input", input)
    batch_first = module.batch_first and input.ndim == 3
    expected = f"{'(B, T' if batch_first else '(T, B'}, {module.input_size})"
    if input.ndim not in (2, 3) or input.shape[-1] != module.input_size or 0 in input.shape[:-1]:
        raise ValueError(
            f"input: expected shape {expected} or (T, {module.input_size}), with at least one time "
            f"step and sample; got {tuple(input.shape)}"
        )
    weight = module.weight_ih_l0
    if input.device != weight.device or not input.is_floating_point():
        raise ValueError(
            f"input: expected a floating-point tensor on {weight.device}, as the parameters are; "
            f"got {input.dtype} on {input.device}"
        )
    if input.ndim == 2:
        input = input.unsqueeze(1)
    elif batch_first:
        input = input.transpose(0, 1)
    return input.to(WIDE)


def _initial_states(
    module: Recurrent, cell: Cell, hx: State | None, x: Tensor
) -> tuple[Tensor, ...]:
    """Check ``hx``; return h_0, and c_0 if there is one, as ``(L * D, B, features)`` in float64."""
    count, batch = module.num_layers * (2 if module.bidirectional else 1), x.shape[1]
    sizes = [module.proj_size or module.hidden_size]
    if cell.has_cell_state:
        sizes.append(module.hidden_size)
        if hx is not None and not (isinstance(hx, tuple | list) and len(hx) == 2):
            raise TypeError(f"hx should be a tuple (h_0, c_0) for an LSTM, got: {type_name(hx)}")
        parts = (None, None) if hx is None else hx
    else:
        parts = (hx,)
    states = []
    for name, part, size in zip(("h_0", "c_0"), parts, sizes, strict=False):
        if part is None:
            states.append(x.new_zeros(count, batch, size))
            continue
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} of hx should be a Tensor, got: {type_name(part)}")
        given = part.unsqueeze(1) if part.ndim == 2 and batch == 1 else part
        if given.shape != (count, batch, size) or given.device != x.device:
            raise ValueError(
                f"{name} of hx: expected shape {(count, batch, size)} on {x.device}, "
                f"got {tuple(part.shape)} on {part.device}"
            )
        states.append(given.to(WIDE))
    return tuple(states)


def _run(
    module: Recurrent,
    cell: Cell,
    layer: int,
    reverse: bool,
    x: Tensor,
    start: tuple[Tensor, ...],
) -> Trajectory:
    """Run one layer and direction over ``x``, which is in the order of time."""
    suffix = f"l{layer}{'_reverse' if reverse else ''}"
    index = 2 * layer + reverse if module.bidirectional else layer

    def parameter(kind: str, is_there: bool = True) -> Any:
        return getattr(module, f"{kind}_{suffix}").to(WIDE) if is_there else None

    weights = Weights(
        parameter("weight_ih"),
        recurrent_matrix(module, parameter("weight_hh")),
        parameter("bias_ih", module.bias),
        parameter("bias_hh", module.bias),
        parameter("weight_hr", bool(module.proj_size)),
    )
    state = tuple(part[index] for part in start)
    return Trajectory(cell, weights, x.flip(0) if reverse else x, state)
