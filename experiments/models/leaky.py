"""The Elman RNN of leaky integrators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

import rnn_cuda
from experiments.fields import choice, positive
from experiments.models._model import Core, CoreConfig


@dataclass(frozen=True)
class LeakyConfig(CoreConfig):
    """Options of ``model.core=leaky``; ``leak`` is dt/tau."""

    nonlinearity: str = choice("tanh", ("tanh", "relu", "sigmoid", "identity", "softplus"))
    leak: float = positive(0.2, at_most=1.0)


class LeakyCore(Core):
    """:class:`rnn_cuda.LeakyRNN`: ``h_t = (1 - a) h_{t-1} + a f(W x_t + U h_{t-1} + b)``."""

    name = "leaky"
    Config = LeakyConfig

    def layer(self, input_size: int, hidden_size: int, **options: Any) -> nn.Module:
        """Build the layer."""
        return rnn_cuda.LeakyRNN(
            input_size,
            hidden_size,
            nonlinearity=self.config.nonlinearity,
            leak=self.config.leak,
            **options,
        )
