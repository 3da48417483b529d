"""Draw the recurrent weights of every layer in another way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import rnn_cuda
from experiments.fields import Config, ConfigError, choice, flag, number, optional
from experiments.models import RECURRENT, SequenceModel
from experiments.remedies._remedy import Order, Problem, Remedy


@dataclass(frozen=True)
class InitialisationConfig(Config):
    """Options of ``remedy=[initialisation]``.

    Attributes:
        recurrent: how U is drawn: ``default`` leaves it; ``gaussian`` has entries from
            N(0, gain^2 / H); ``identity`` is for Elman layers.
        gain: the factor of U; 1 has all singular values of an orthogonal U at 1.
        input_std: W from N(0, input_std^2); null leaves it.
        zero_bias: whether both biases become zero.
    """

    recurrent: str = choice("orthogonal", ("default", "orthogonal", "identity", "gaussian"))
    gain: float = number(1.0, at_least=0.0)
    input_std: float | None = optional(number(0.0, at_least=0.0))
    zero_bias: bool = flag(False)


class Initialisation(Remedy):
    """Recurrent, input and bias weights of `rnn_cuda.init`.

    Identity U with zero bias and ReLU is the IRNN of Le, Jaitly & Hinton (2015); orthogonal U is
    that of Saxe, McClelland & Ganguli (2014).
    """

    name = "initialisation"
    Config = InitialisationConfig
    order = Order.WEIGHTS
    layers = RECURRENT

    def __init__(self, config: InitialisationConfig) -> None:
        super().__init__(config)
        if config.recurrent == "default" and config.gain != 1:
            raise ConfigError(
                "remedy.initialisation.gain scales a U that is drawn anew, so with "
                f"recurrent=default it must be 1; got {config.gain:g}"
            )

    @torch.no_grad()
    def change(self, model: SequenceModel, problem: Problem) -> None:
        """Draw the weights anew."""
        config, core = self.config, model.core
        draw = {
            "orthogonal": rnn_cuda.init.orthogonal_,
            "identity": rnn_cuda.init.identity_,
            "gaussian": rnn_cuda.init.scaled_gaussian_,
        }.get(config.recurrent)
        if draw is not None:
            try:
                draw(core, config.gain)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"remedy.initialisation.recurrent={config.recurrent}: {error}"
                ) from error
        for name, parameter in core.named_parameters():
            if config.input_std is not None and name.startswith("weight_ih"):
                nn.init.normal_(parameter, std=config.input_std)
            elif config.zero_bias and name.startswith("bias"):
                nn.init.zeros_(parameter)
