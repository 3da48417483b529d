"""torch's GRU."""

from __future__ import annotations

from typing import Any

from torch import nn

from experiments.models._model import Core


class GRUCore(Core):
    """``torch.nn.GRU``, initialised as torch does it."""

    name = "gru"

    def layer(self, input_size: int, hidden_size: int, **options: Any) -> nn.Module:
        """Build the layer."""
        return nn.GRU(input_size, hidden_size, **options)
