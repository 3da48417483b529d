"""The module that FusedRNN replaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from experiments.fields import choice
from experiments.models._model import Core, CoreConfig


@dataclass(frozen=True)
class RNNConfig(CoreConfig):
    """Options of ``model.core=rnn``."""

    nonlinearity: str = choice("tanh", ("tanh", "relu"))


class RNNCore(Core):
    """``torch.nn.RNN``; from the same seed it has the weights of ``fused_rnn``."""

    name = "rnn"
    Config = RNNConfig

    def layer(self, input_size: int, hidden_size: int, **options: Any) -> nn.Module:
        """Build the layer."""
        return nn.RNN(input_size, hidden_size, nonlinearity=self.config.nonlinearity, **options)
