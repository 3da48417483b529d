"""What the lowest layer of a model does on a batch, forward direction, in float64.

Shape legend: T time steps, B batch, I inputs, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from experiments.models import RESIDUAL
from rnn_cuda.modules import ElmanStack
from rnn_cuda.trajectory import trajectory_of


@dataclass(frozen=True)
class Layer:
    """A layer's trajectory.

    Attributes:
        core: the recurrent module.
        h: its states, ``(T, B, H)``.
        gates: activations by name, as `rnn_cuda.instruments.gate_activations` returns them.
        cell: an LSTM's ``c_t``, ``(T, B, H)``.
    """

    core: nn.Module
    h: Tensor
    gates: dict[str, Tensor]
    cell: Tensor | None = None

    @property
    def before(self) -> Tensor:
        """``h_{t-1}``, zeros first."""
        return shifted(self.h)

    @cached_property
    def coefficients(self) -> tuple[float, float, Tensor]:
        """Keep, rate and A of ``h_t = keep h_{t-1} + rate f(W x_t + A h_{t-1} + b)``."""
        weight = self.core.weight_hh_l0
        if isinstance(self.core, ElmanStack):
            return self.core._coefficients(weight)
        return 0.0, 1.0, weight

    @property
    def activation(self) -> Tensor:
        """``f(z_t)`` of an Elman layer; ``h_t`` but where the state has a path of its own."""
        keep, rate, _ = self.coefficients
        if keep == 0:
            return self.h
        value = (self.h - keep * self.before) / rate
        low, high = {"tanh": (-1, 1), "sigmoid": (0, 1), "relu": (0, None)}.get(
            self.core.nonlinearity, (None, None)
        )
        # Rounding takes a value that is flat against its bound a little beyond.
        return value if low is None else value.clamp(low, high)


@torch.no_grad()
def lowest_layer(core: nn.Module, x_TBI: Tensor) -> Layer:
    """Run the lowest layer of a core, forward direction, over a batch."""
    if isinstance(core, RESIDUAL):
        weights = [[w.double() for w in each] for each in core.all_weights]
        h, _ = core._layer(x_TBI.double(), None, weights[:1], None)
        return Layer(core, h, {})
    steps = trajectory_of(core, x_TBI, None, layer=0, reverse=False)
    if isinstance(core, nn.LSTM):
        h, cell = steps.states[1:].chunk(2, -1)
        return Layer(core, h, steps.gates, cell)
    return Layer(core, steps.states[1:], steps.gates)


def shifted(rows: Tensor) -> Tensor:
    """Return at each step the row of the one before, zeros first."""
    return torch.cat([torch.zeros_like(rows[:1]), rows[:-1]])
