"""Bound the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_

from experiments.fields import Config, ConfigError, optional, positive
from experiments.remedies._remedy import Remedy


@dataclass(frozen=True)
class ClippingConfig(Config):
    """Options of ``remedy=[clipping]``; one of the two.

    Attributes:
        norm: bound on the global norm of all gradients together.
        value: bound on the magnitude of each entry.
    """

    norm: float | None = optional(positive(1.0))
    value: float | None = optional(positive(1.0))


class Clipping(Remedy):
    """Clip gradients by global norm (Pascanu, Mikolov & Bengio 2013) or by value (Mikolov 2012).

    What is recorded as the gradient's norm is that before clipping.
    """

    name = "clipping"
    Config = ClippingConfig

    def __init__(self, config: ClippingConfig) -> None:
        super().__init__(config)
        if config.norm is not None and config.value is not None:
            raise ConfigError(
                "remedy.clipping.norm and remedy.clipping.value must not both be set; got "
                f"{config.norm} and {config.value}"
            )
        if config.norm is None and config.value is None:
            raise ConfigError("remedy.clipping needs norm or value; got null for both")

    def clip(self, parameters: Sequence[nn.Parameter], norm: Tensor) -> None:
        """Scale the gradients down, or cut their entries off."""
        if self.config.norm is not None:
            clip_grads_with_norm_(parameters, self.config.norm, norm, foreach=True)
        else:
            clip_grad_value_(parameters, self.config.value, foreach=True)
