"""The LSTM cell, as ``torch.nn.LSTM`` has it.

    c_t = f c_{t-1} + i g,  h_t = o tanh(c_t);  i, f, o = sigmoid(z), g = tanh(z)

Source: Hochreiter & Schmidhuber (1997), with the forget gate of Gers et al. (2000). A projection of
h_t (Sak et al., 2014) is the layer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from rnn_cuda.cells.cell import Cell, Linearisation
from rnn_cuda.cells.elman import activation, activation_derivative, gated_name


class Gates(NamedTuple):
    """Activations, each ``(.., H)``."""

    input: Tensor
    forget: Tensor
    cell: Tensor
    output: Tensor


@dataclass(frozen=True)
class LSTM(Cell):
    """The cell, with other functions than tanh and sigmoid if wanted; its unit carries c."""

    nonlinearity: str = "tanh"
    gate_nonlinearity: str = "sigmoid"
    gate_names: ClassVar[tuple[str, ...]] = Gates._fields
    keeping_gate: ClassVar[str | None] = "forget"
    admitting_gate: ClassVar[str | None] = "input"
    has_cell_state: ClassVar[bool] = True
    saved_values: ClassVar[int] = 6

    @property
    def operator_name(self) -> str:
        """See `Cell.operator_name`."""
        return gated_name("lstm", self.nonlinearity, self.gate_nonlinearity)

    def gates(self, input_sums: Tensor, recurrent_sums: Tensor) -> Gates:
        """Return i, f, g, o."""
        i, f, g, o = (input_sums + recurrent_sums).chunk(4, dim=-1)
        i, f, o = (activation(z, self.gate_nonlinearity) for z in (i, f, o))
        return Gates(i, f, activation(g, self.nonlinearity), o)

    def kept_share(self, gates: tuple[Tensor, ...]) -> Tensor:
        """Return f."""
        return gates[1]

    def carry(self, gates: tuple[Tensor, ...], carried: Tensor) -> Tensor:
        """Return c_t."""
        i, f, g, _ = gates
        return f * carried + i * g

    def publish(self, gates: tuple[Tensor, ...], carried: Tensor) -> Tensor:
        """Return h_t."""
        return gates[3] * activation(carried, self.nonlinearity)

    def linearise(self, gates: tuple[Tensor, ...], before: Tensor, after: Tensor) -> Linearisation:
        """Return dc_t = f dc_{t-1} + ..., dh_t = o tanh'(c_t) dc_t + tanh(c_t) o' dz_o."""
        i, f, g, o = gates
        shown = activation(after, self.nonlinearity)
        of_i, of_f, of_o = (activation_derivative(x, self.gate_nonlinearity) for x in (i, f, o))
        of_g, of_c = (activation_derivative(x, self.nonlinearity) for x in (g, shown))
        return Linearisation(
            gain=torch.stack([g * of_i, before * of_f, i * of_g], dim=-2),
            keep=f,
            exposure=o * of_c,
            output_gain=shown * of_o,
        )
