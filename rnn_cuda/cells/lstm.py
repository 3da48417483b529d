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


class Gates(NamedTuple):
    """Activations, each ``(.., H)``."""

    input: Tensor
    forget: Tensor
    cell: Tensor
    output: Tensor


@dataclass(frozen=True)
class LSTM(Cell):
    """The cell; its unit carries c."""

    gate_names: ClassVar[tuple[str, ...]] = Gates._fields
    keeping_gate: ClassVar[str | None] = "forget"
    admitting_gate: ClassVar[str | None] = "input"
    has_cell_state: ClassVar[bool] = True
    saved_values: ClassVar[int] = 6

    @property
    def operator_name(self) -> str:
        """See `Cell.operator_name`."""
        return "lstm"

    def gates(self, input_sums: Tensor, recurrent_sums: Tensor) -> Gates:
        """Return i, f, g, o."""
        i, f, g, o = (input_sums + recurrent_sums).chunk(4, dim=-1)
        return Gates(i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid())

    def kept_share(self, gates: tuple[Tensor, ...]) -> Tensor:
        """Return f."""
        return gates[1]

    def carry(self, gates: tuple[Tensor, ...], carried: Tensor) -> Tensor:
        """Return c_t."""
        i, f, g, _ = gates
        return f * carried + i * g

    def publish(self, gates: tuple[Tensor, ...], carried: Tensor) -> Tensor:
        """Return h_t."""
        return gates[3] * torch.tanh(carried)

    def linearise(self, gates: tuple[Tensor, ...], before: Tensor, after: Tensor) -> Linearisation:
        """Return dc_t = f dc_{t-1} + ..., dh_t = o tanh'(c_t) dc_t + tanh(c_t) o' dz_o."""
        i, f, g, o = gates
        tanh_c = torch.tanh(after)
        return Linearisation(
            gain=torch.stack([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g)], dim=-2),
            keep=f,
            exposure=o * (1 - tanh_c * tanh_c),
            output_gain=tanh_c * o * (1 - o),
        )
