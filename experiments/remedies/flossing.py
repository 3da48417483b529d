"""Draw Lyapunov exponents towards zero before training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.fields import Config, ConfigError, integer, positive
from experiments.models import RECURRENT, SequenceModel
from experiments.remedies._remedy import Problem, Remedy
from rnn_cuda.instruments import gradient_flossing


@dataclass(frozen=True)
class FlossingConfig(Config):
    """Options of ``remedy=[flossing]``.

    Attributes:
        steps: of Adam, before the first step of training.
        learning_rate: of that Adam.
        exponents: how many of the largest are drawn towards zero, in each layer and direction.
        batch_size: sequences of the task that drive the network, fresh in each step.
    """

    steps: int = integer(200, at_least=1)
    learning_rate: float = positive(1e-3)
    exponents: int = integer(8, at_least=1)
    batch_size: int = integer(8, at_least=1)


class Flossing(Remedy):
    """Gradient flossing (Engelken 2023): the mean squared Lyapunov exponent as a first loss.

    The sum over layers and directions, minimised by Adam over the weights of the core. Its inputs
    are drawn from a copy of the generator, so training sees the data that it sees without flossing.
    """

    name = "flossing"
    Config = FlossingConfig
    layers = RECURRENT

    def check(self, model: SequenceModel) -> None:
        """Refuse more exponents than the state has dimensions."""
        super().check(model)
        if self.config.exponents > model.state_size:
            raise ConfigError(
                f"remedy.flossing.exponents must be at most {model.state_size}, the size of the "
                f"state of this {model.core_name}; got {self.config.exponents}"
            )

    def prepare(self, model: SequenceModel, problem: Problem, generator: torch.Generator) -> None:
        """Minimise the exponents.

        Raises:
            ConfigError: an exponent is minus infinity, as behind closed ReLUs.
        """
        config, core = self.config, model.core
        own = torch.Generator()
        own.set_state(generator.get_state())
        optimizer = torch.optim.Adam(core.parameters(), config.learning_rate)
        places = [
            {"layer": layer, "reverse": reverse}
            for layer in range(core.num_layers)
            for reverse in (False, True)[: model.directions]
        ]
        device = next(core.parameters()).device
        for _ in range(config.steps):
            x_TBI, _ = problem.task.sample(config.batch_size, problem.horizon, own)
            x_TBI = x_TBI.to(device)
            try:
                loss = sum(
                    gradient_flossing(core, x_TBI, config.exponents, generator=own, **place)
                    for place in places
                )
            except ValueError as error:
                raise ConfigError(f"remedy.flossing: {error}") from error
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
