"""The Elman cell with a path past f: ``h_t = keep h_{t-1} + rate f(W x_t + A h_{t-1} + b)``.

Leaky integrators (Jaeger et al., 2007) have ``keep = 1 - leak``, ``rate = leak`` and A = U; the
antisymmetric cell (Chang et al., 2019) has ``keep = 1``, ``rate`` its step size and
``A = U - U^T - diffusion I``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rnn_cuda.cells.cell import Cell, Linearisation
from rnn_cuda.cells.elman import activation, activation_derivative


@dataclass(frozen=True, eq=False)
class Leaky(Cell):
    """The cell with f as ``nonlinearity``; keep and rate are numbers, or tensors ``(H)``."""

    nonlinearity: str
    keep: Tensor | float = 0.0
    rate: Tensor | float = 1.0
    saved_values: ClassVar[int] = 1
    constants: ClassVar[int] = 2

    @property
    def operator_name(self) -> str:
        """See `Cell.operator_name`."""
        return f"leaky.{self.nonlinearity}"

    def with_constants(self, *constants: Tensor | float) -> Leaky:
        """Return the cell with this keep and rate."""
        keep, rate = constants
        return dataclasses.replace(self, keep=keep, rate=rate)

    def constant_tensors(self, like: Tensor) -> list[Tensor]:
        """Return keep and rate as the operators take them beside ``like`` ``(.., H)``."""
        dtype = torch.float32 if like.dtype.itemsize == 2 else like.dtype
        options: Any = {"dtype": dtype, "device": like.device}
        return [
            constant.to(**options)
            if isinstance(constant, Tensor)
            else torch.full(like.shape[-1:], constant, **options)
            for constant in (self.keep, self.rate)
        ]

    def constant_factors(self, gates: tuple[Tensor, ...], before: Tensor) -> list[Tensor]:
        """Return h_{t-1} and f(z_t)."""
        return [before, gates[0]]

    def gates(self, input_sums: Tensor, recurrent_sums: Tensor) -> tuple[Tensor, ...]:
        """Return ``f(z)``."""
        return (activation(input_sums + recurrent_sums, self.nonlinearity),)

    def carry(self, gates: tuple[Tensor, ...], carried: Tensor) -> Tensor:
        """Return h_t."""
        return self.keep * carried + self.rate * gates[0]

    def linearise(self, gates: tuple[Tensor, ...], before: Tensor, after: Tensor) -> Linearisation:
        """Return dh_t = keep dh_{t-1} + rate f'(z_t) dz."""
        gain = self.rate * activation_derivative(gates[0], self.nonlinearity)
        keep = self.keep.expand_as(gain) if isinstance(self.keep, Tensor) else self.keep
        return Linearisation(gain.unsqueeze(-2), keep)
