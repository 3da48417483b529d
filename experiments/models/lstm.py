"""torch's LSTM."""

from __future__ import annotations

from typing import Any

from torch import nn

from experiments.models._model import Core


class LSTMCore(Core):
    """``torch.nn.LSTM``, initialised as torch does it."""

    name = "lstm"

    def layer(self, input_size: int, hidden_size: int, **options: Any) -> nn.Module:
        """Build the layer."""
        return nn.LSTM(input_size, hidden_size, **options)
