"""The Elman cell with a path past f: ``h_t = keep h_{t-1} + rate f(W x_t + A h_{t-1} + b)``.

Leaky integrators (Jaeger et al., 2007) have ``keep = 1 - leak``, ``rate = leak`` and A = U; the
antisymmetric cell (Chang et al., 2019) has ``keep = 1``, ``rate`` its step size and
``A = U - U^T - diffusion I``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rnn_cuda.cells.cell import Cell, Linearisation
from rnn_cuda.cells.elman import activation, activation_derivative


@dataclass(frozen=True)
class Leaky(Cell):
    """The cell with f as ``nonlinearity``."""

    nonlinearity: str
    keep: float
    rate: float

    def gates(self, input_sums: Tensor, recurrent_sums: Tensor) -> tuple[Tensor, ...]:
        """Return ``f(z)``."""
        return (activation(input_sums + recurrent_sums, self.nonlinearity),)

    def carry(self, gates: tuple[Tensor, ...], carried: Tensor) -> Tensor:
        """Return h_t."""
        return self.keep * carried + self.rate * gates[0]

    def linearise(self, gates: tuple[Tensor, ...], before: Tensor, after: Tensor) -> Linearisation:
        """Return dh_t = keep dh_{t-1} + rate f'(z_t) dz."""
        gain = self.rate * activation_derivative(gates[0], self.nonlinearity)
        return Linearisation(gain.unsqueeze(-2), self.keep)
