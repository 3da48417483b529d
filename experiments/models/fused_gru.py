"""The GRU on the fused kernel."""

from __future__ import annotations

from typing import Any

from torch import nn

import rnn_cuda
from experiments.models._model import Core


class FusedGRUCore(Core):
    """:class:`rnn_cuda.FusedGRU`; from the same seed it has the weights of ``gru``."""

    name = "fused_gru"

    def layer(self, input_size: int, hidden_size: int, **options: Any) -> nn.Module:
        """Build the layer."""
        return rnn_cuda.FusedGRU(input_size, hidden_size, **options)
