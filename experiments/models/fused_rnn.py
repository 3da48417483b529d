"""The Elman RNN on the fused kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

import rnn_cuda
from experiments.fields import choice
from experiments.models._model import Core, CoreConfig


@dataclass(frozen=True)
class FusedRNNConfig(CoreConfig):
    """Options of ``model.core=fused_rnn``."""

    nonlinearity: str = choice("tanh", ("tanh", "relu", "sigmoid", "identity", "softplus"))


class FusedRNNCore(Core):
    """:class:`rnn_cuda.FusedRNN`, initialised as ``torch.nn.RNN`` is."""

    name = "fused_rnn"
    Config = FusedRNNConfig

    def layer(self, input_size: int, hidden_size: int, **options: Any) -> nn.Module:
        """Build the layer."""
        return rnn_cuda.FusedRNN(
            input_size, hidden_size, nonlinearity=self.config.nonlinearity, **options
        )
