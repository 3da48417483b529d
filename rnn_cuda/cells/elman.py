"""The Elman cell: ``h_t = f(W x_t + U h_{t-1} + b)`` (Elman, 1990)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rnn_cuda.cells.cell import Cell, Linearisation

NONLINEARITIES: tuple[str, ...] = ("tanh", "relu", "sigmoid", "identity", "softplus")
"""Names accepted as ``nonlinearity``, everywhere in this package but for gated cells."""

GATED_NONLINEARITIES: tuple[str, ...] = ("tanh", "relu", "sigmoid", "hard_sigmoid", "identity")
"""Names accepted as ``nonlinearity`` and ``gate_nonlinearity`` of a gated cell."""

TORCH_GATED_NONLINEARITIES = ("tanh", "sigmoid")
"""Those that torch's GRU and LSTM have."""


def activation(z: Tensor, nonlinearity: str) -> Tensor:
    """Return ``f(z)`` for the nonlinearity of that name; also compiled by TorchScript."""
    if nonlinearity == "tanh":
        return torch.tanh(z)
    if nonlinearity == "relu":
        return torch.relu(z)
    if nonlinearity == "sigmoid":
        return torch.sigmoid(z)
    if nonlinearity == "softplus":
        # Beyond the threshold torch returns z: 20, the default, is early for float64.
        return torch.nn.functional.softplus(z, threshold=40.0)
    if nonlinearity == "hard_sigmoid":
        # Not torch's function, which divides by 6 in single precision.
        return (z / 6 + 0.5).clamp(0, 1)
    return z


def activation_derivative(h: Tensor, nonlinearity: str) -> Tensor:
    """Return ``f'(z)``, read off the output ``h = f(z)`` (differentiable in ``h``).

    tanh: 1 - h^2; relu: [h > 0]; sigmoid: h (1 - h); identity: 1; softplus: 1 - exp(-h);
    hard_sigmoid: [0 < h < 1] / 6.
    """
    if nonlinearity == "tanh":
        return 1 - h * h
    if nonlinearity == "relu":
        return (h <= 0).logical_not().to(h.dtype)  # a NaN lets the gradient pass, as in torch
    if nonlinearity == "sigmoid":
        return h * (1 - h)
    if nonlinearity == "softplus":
        return -torch.expm1(-h)
    if nonlinearity == "hard_sigmoid":
        return torch.logical_or(h <= 0, h >= 1).logical_not().to(h.dtype) / 6
    return torch.ones_like(h)


def gated_name(kind: str, nonlinearity: str, gate_nonlinearity: str) -> str:
    """Return what the operators call a gated cell with these functions."""
    if (nonlinearity, gate_nonlinearity) == TORCH_GATED_NONLINEARITIES:
        return kind
    return f"{kind}.{nonlinearity}.{gate_nonlinearity}"


@dataclass(frozen=True)
class Elman(Cell):
    """The cell with f as ``nonlinearity``. Its step is all of f, so h_t alone tells f'."""

    nonlinearity: str
    is_linear_recurrence: ClassVar[bool] = True

    @property
    def operator_name(self) -> str:
        """See `Cell.operator_name`."""
        return f"elman.{self.nonlinearity}"

    def gates(self, input_sums: Tensor, recurrent_sums: Tensor) -> tuple[Tensor, ...]:
        """Return ``f(z)``."""
        return (activation(input_sums + recurrent_sums, self.nonlinearity),)

    def carry(self, gates: tuple[Tensor, ...], carried: Tensor) -> Tensor:
        """Return h_t."""
        return gates[0]

    def derivative(self, h: Tensor) -> Tensor:
        """Return dh_t/dz_t."""
        return activation_derivative(h, self.nonlinearity)

    def linearise(self, gates: tuple[Tensor, ...], before: Tensor, after: Tensor) -> Linearisation:
        """Return dh_t = f'(h_t) dz."""
        return Linearisation(self.derivative(after).unsqueeze(-2))
