"""Derivatives of a layer by the linear recurrence of its cell, to be differentiated further.

For cells whose units carry a value of their own; arguments are those of the operators, and so is
the shape legend: see ``layer_forward.py``, ``layer_gradients.py`` and ``linearised.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnn_cuda.cells import cell_named
from rnn_cuda.linear_algebra import row_norms
from rnn_cuda.neighbours import StepNeighbours, add_at, rows_of, states_before, take
from rnn_cuda.operators.directions import DirectionOfLayer, directions_of
from rnn_cuda.operators.linearised import Coefficients, carried_states, parts_of
from rnn_cuda.reference import compute_dtype


class _LinearisedDirection:
    """A direction of a layer, linearised where the forward pass went; in compute precision.

    Everything is in rows.
    """

    def __init__(
        self,
        cell: str,
        its: DirectionOfLayer,
        input: Tensor,
        output: Tensor,
        batch_sizes: Tensor | None,
        batch: int | None,
    ) -> None:
        h = its.columns(output)
        kind = cell_named(cell).with_constants(*its.constants)
        self._dtype, self._shape = h.dtype, h.shape[:-1]
        self._reverse, self._batch_sizes = its.reverse, batch_sizes
        self.neighbours = StepNeighbours.of(h, its.reverse, batch_sizes, batch)
        wide = compute_dtype(h.dtype)
        self.x, self.weight_ih, self.weight_hh = (
            tensor.to(wide) for tensor in (rows_of(input), its.weight_ih, its.weight_hh)
        )
        bias_ih, bias_hh = (*(bias.to(wide) for bias in its.biases), 0, 0)[:2]
        starts = [state.to(wide) for state in its.states] or [None, None]
        after = rows_of(h).to(wide)
        before = states_before(after, starts[0], self.neighbours)
        self.h_before = before
        gates = kind.gates(
            self.x @ self.weight_ih.mT + bias_ih, before @ self.weight_hh.mT + bias_hh
        )
        if kind.has_cell_state:
            keep, new = kind.kept_share(gates), kind.carry(gates, torch.zeros_like(after))
            start = its.states[1] if its.states else None
            sequences = self._sequence(keep), self._sequence(new)
            after = rows_of(carried_states(*sequences, start, its.reverse, batch_sizes)).to(wide)
            before = states_before(after, starts[1], self.neighbours)
        self.constant_factors = kind.constant_factors(gates, before)
        linearisation = kind.linearise(gates, before, after)
        self.coefficients = Coefficients.of_cell(linearisation)
        self.input_coefficients = Coefficients.of_cell(linearisation.for_input())

    def _sequence(self, rows: Tensor) -> Tensor:
        return rows.to(self._dtype).view(*self._shape, rows.shape[-1])

    def _run(self, drive: Tensor, start: Tensor | None, *, transposed: bool) -> Tensor:
        result = torch.ops.rnn_cuda.linear_recurrence(
            self._sequence(self.coefficients.joined()),
            self._sequence(drive),
            self.weight_hh.to(self._dtype),
            None if start is None else start.to(self._dtype),
            self._reverse != transposed,
            self._batch_sizes,
            transposed,
        )
        return rows_of(result).to(drive.dtype)

    def tangents(self, drive: Tensor, start: Tensor | None) -> Tensor:
        """Return the tangents [h, c], given what drives them and those of the initial state."""
        return self._run(drive, start, transposed=False)

    def adjoints(self, direct: Tensor) -> Tensor:
        """Return the total adjoints of [h, c], given the direct ones."""
        return self._run(direct, None, transposed=True)

    def apart(self, adjoints: Tensor) -> list[Tensor]:
        """Return those that `Cell.adjoints` counts, one by one."""
        of_h, of_c = parts_of(adjoints, self.h_before.shape[-1])
        exposure = self.coefficients.exposure
        return [of_h] if exposure is None else [of_h, of_c, of_c - exposure * of_h]


def tangents_of_layer(
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    output: Tensor,
    cell: str,
    direction: str,
    batch_sizes: Tensor | None,
    batch: int,
    tangents: Sequence[Tensor | None],
) -> list[Tensor]:
    """Return the tangents of output and final states, given those of all tensors, in order."""
    d_input, *rest = tangents
    d_states, d_weights = rest[: len(states)], rest[len(states) :]
    outputs, final_states = [], []
    for its in directions_of(states, weights, direction, cell):
        at = _LinearisedDirection(cell, its, input, output, batch_sizes, batch)
        count = 2 + len(its.biases) + len(its.constants)
        d_ih, d_hh, *others = d_weights[its.number * count : (its.number + 1) * count]
        d_biases, d_constants = others[: len(its.biases)], others[len(its.biases) :]
        d_bias_ih, d_bias_hh = (*d_biases, None, None)[:2]
        from_input = from_state = at.x.new_zeros(len(at.x), len(at.weight_hh))
        if d_input is not None:
            from_input = from_input + rows_of(d_input) @ at.weight_ih.mT
        if d_ih is not None:
            from_input = from_input + at.x @ d_ih.mT
        if d_bias_ih is not None:
            from_input = from_input + d_bias_ih
        if d_hh is not None:
            from_state = from_state + at.h_before @ d_hh.mT
        if d_bias_hh is not None:
            from_state = from_state + d_bias_hh
        drive = at.input_coefficients.drive(from_input) + at.coefficients.drive(from_state)
        for d_constant, factor in zip(d_constants, at.constant_factors, strict=True):
            if d_constant is not None:
                drive = drive + d_constant * factor
        start = None
        if any(d is not None for d in d_states):
            pairs = zip(its.states, d_states, strict=True)
            start = torch.cat(
                [torch.zeros_like(s) if d is None else d.select(0, its.number) for s, d in pairs],
                -1,
            )
        both = at.tangents(drive, start).to(output.dtype)
        tangent, _ = parts_of(both, at.h_before.shape[-1])
        outputs.append(tangent.reshape(*output.shape[:-1], tangent.shape[-1]))
        final_states.append(take(both, at.neighbours.last).chunk(cell_named(cell).states, -1))
    return [torch.cat(outputs, -1), *map(torch.stack, zip(*final_states, strict=True))]


def gradients_of_layer(
    grads: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    output: Tensor,
    cell: str,
    direction: str,
    batch_sizes: Tensor | None,
    wanted: Sequence[bool],
    batch: int | None,
) -> list[Tensor]:
    """Return the gradients that are wanted, in the order of ``wanted``."""
    *wanted_gradients, wants_norms, wants_adjoints = wanted
    grad_output, *grad_final = grads
    grad_input, grad_states, grad_weights, all_adjoints = None, [], [], []
    for its in directions_of(states, weights, direction, cell):
        at = _LinearisedDirection(cell, its, input, output, batch_sizes, batch)
        direct = [torch.zeros_like(at.h_before) for _ in grad_final]
        if grad_output is not None:
            direct[0] = rows_of(its.columns(grad_output)).to(direct[0].dtype)
        for i, grad in enumerate(grad_final):
            if grad is not None:
                final = grad.select(0, its.number).to(direct[i].dtype)
                direct[i] = add_at(direct[i], at.neighbours.last, final)
        adjoints = at.adjoints(torch.cat(direct, -1))
        all_adjoints.append(at.apart(adjoints))
        delta = at.coefficients.deltas(adjoints)
        delta_input = at.input_coefficients.deltas(adjoints)
        more = delta_input @ at.weight_ih
        grad_input = more if grad_input is None else grad_input + more
        of_start = at.coefficients.pulled_to_start(adjoints, at.weight_hh, at.neighbours)
        grad_states.append(of_start.chunk(len(grad_final), -1))
        grad_weights += [delta_input.mT @ at.x, delta.mT @ at.h_before]
        grad_weights += [delta_input.sum(0), delta.sum(0)][: len(its.biases)]
        _, of_v = parts_of(adjoints, at.h_before.shape[-1])
        grad_weights += [(of_v * factor).sum(0) for factor in at.constant_factors]
    assert grad_input is not None
    gradients = [grad_input.view(input.shape)]
    if states:
        gradients += map(torch.stack, zip(*grad_states, strict=True))
    tensors = input, *states, *weights
    pairs = zip([*gradients, *grad_weights], tensors, wanted_gradients, strict=True)
    results = [gradient.to(like.dtype) for gradient, like, is_wanted in pairs if is_wanted]
    rows, of_each = input.shape[:-1], list(zip(*all_adjoints, strict=True))
    if wants_norms:
        results += [torch.stack([row_norms(a).view(rows) for a in each]) for each in of_each]
    if wants_adjoints:
        results += [torch.cat([a.view(*rows, a.shape[-1]) for a in each], -1) for each in of_each]
    return results
