"""The GRU cell, as ``torch.nn.GRU`` has it.

    h_t = (1 - z) n + z h_{t-1};  r, z = sigmoid(W x_t + U h_{t-1} + b),
    n = tanh(W x_t + b_ih + r (U h_{t-1} + b_hh))

Source: Cho et al. (2014); torch applies r behind the product with U, and keeps the state where z is
open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from rnn_cuda.cells.cell import Cell, Linearisation
from rnn_cuda.cells.elman import activation, activation_derivative, gated_name


class Gates(NamedTuple):
    """Activations, each ``(.., H)``, and what r multiplies."""

    reset: Tensor
    update: Tensor
    new: Tensor
    recurrent_new: Tensor
    """``U h_{t-1} + b_hh`` of n."""


@dataclass(frozen=True)
class GRU(Cell):
    """The cell, with other functions than tanh and sigmoid if wanted; its unit carries h."""

    nonlinearity: str = "tanh"
    gate_nonlinearity: str = "sigmoid"
    gate_names: ClassVar[tuple[str, ...]] = ("reset", "update", "new")
    keeping_gate: ClassVar[str | None] = "update"
    saved_values: ClassVar[int] = 5
    keeps_sums_apart: ClassVar[bool] = True

    @property
    def operator_name(self) -> str:
        """See `Cell.operator_name`."""
        return gated_name("gru", self.nonlinearity, self.gate_nonlinearity)

    def gates(self, input_sums: Tensor, recurrent_sums: Tensor) -> Gates:
        """Return r, z, n and what r multiplies in n."""
        input_r, input_z, input_n = input_sums.chunk(3, dim=-1)
        recurrent_r, recurrent_z, recurrent_n = recurrent_sums.chunk(3, dim=-1)
        r = activation(input_r + recurrent_r, self.gate_nonlinearity)
        z = activation(input_z + recurrent_z, self.gate_nonlinearity)
        n = activation(input_n + r * recurrent_n, self.nonlinearity)
        return Gates(r, z, n, recurrent_n)

    def carry(self, gates: tuple[Tensor, ...], carried: Tensor) -> Tensor:
        """Return h_t."""
        _, z, n, _ = gates
        return n + z * (carried - n)

    def linearise(self, gates: tuple[Tensor, ...], before: Tensor, after: Tensor) -> Linearisation:
        """Return dh_t = z dh_{t-1} + ...; in n, r stands before what comes from h_{t-1}."""
        r, z, n, recurrent_n = gates
        gain_n = (1 - z) * activation_derivative(n, self.nonlinearity)
        gain_r = gain_n * recurrent_n * activation_derivative(r, self.gate_nonlinearity)
        gain_z = (before - n) * activation_derivative(z, self.gate_nonlinearity)
        return Linearisation(
            gain=torch.stack([gain_r, gain_z, gain_n * r], dim=-2),
            keep=z,
            input_gain=torch.stack([gain_r, gain_z, gain_n], dim=-2),
        )
