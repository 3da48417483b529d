"""The antisymmetric RNN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

import rnn_cuda
from experiments.fields import choice, number, positive
from experiments.models._model import Core, CoreConfig


@dataclass(frozen=True)
class AntisymmetricConfig(CoreConfig):
    """Options of ``model.core=antisymmetric``."""

    nonlinearity: str = choice("tanh", ("tanh", "relu", "sigmoid", "identity", "softplus"))
    step_size: float = positive(0.1)
    diffusion: float = number(0.01, at_least=0.0)


class AntisymmetricCore(Core):
    """:class:`rnn_cuda.AntisymmetricRNN` (Chang et al. 2019)."""

    name = "antisymmetric"
    Config = AntisymmetricConfig

    def layer(self, input_size: int, hidden_size: int, **options: Any) -> nn.Module:
        """Build the layer."""
        return rnn_cuda.AntisymmetricRNN(
            input_size,
            hidden_size,
            nonlinearity=self.config.nonlinearity,
            step_size=self.config.step_size,
            diffusion=self.config.diffusion,
            **options,
        )
