"""The LSTM on the fused kernel."""

from __future__ import annotations

from typing import Any

from torch import nn

import rnn_cuda
from experiments.models._model import Core


class FusedLSTMCore(Core):
    """:class:`rnn_cuda.FusedLSTM`; from the same seed it has the weights of ``lstm``."""

    name = "fused_lstm"

    def layer(self, input_size: int, hidden_size: int, **options: Any) -> nn.Module:
        """Build the layer."""
        return rnn_cuda.FusedLSTM(input_size, hidden_size, **options)
