"""Keep one bit under noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from experiments.fields import Config, integer, number
from experiments.tasks._task import BIT, Batch, Task


@dataclass(frozen=True)
class LatchConfig(Config):
    """Options of ``task=latch``: steps that show the class, standard deviation of the noise."""

    class_steps: int = integer(3, at_least=1)
    noise: float = number(0.2, at_least=0)
    test_size: int = integer(2000, at_least=1)


class LatchTask(Task):
    """Keep one bit under noise (Bengio, Simard & Frasconi 1994).

    The input is +1 or -1 for the first ``class_steps`` steps, then Gaussian noise until step T; the
    sign is asked for at the last step. In the paper the values of the first steps are learned; here
    they are given. Random guessing of the weights solves this task (Hochreiter & Schmidhuber
    1997), so it is never the only evidence.
    """

    name = "latch"
    Config = LatchConfig
    input_size = 1
    output_size = 1
    answer = BIT

    def __init__(self, config: LatchConfig) -> None:
        super().__init__(config)
        self.minimum_horizon = config.class_steps + 1

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw input ``[T, B, 1]`` and target ``[B, 1]``."""
        bit = torch.randint(0, 2, (batch_size, 1), generator=generator, dtype=torch.float32)
        x_TBI = self.config.noise * torch.randn(horizon, batch_size, 1, generator=generator)
        x_TBI[: self.config.class_steps] = 2 * bit - 1
        return x_TBI, bit

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the entropy of a bit."""
        return math.log(2)

    def know_nothing_error(self, horizon: int) -> float:
        """Return the share of wrong guesses."""
        return 0.5

    def dependency(self, horizon: int) -> int:
        """Return the lag of the first step."""
        return horizon - 1
