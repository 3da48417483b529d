"""Reproduce the bit of d steps ago."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.fields import Config, integer
from experiments.tasks._task import BIT, UNSCORED, Batch, Task


@dataclass(frozen=True)
class DelayedRecallConfig(Config):
    """Options of ``task=delayed_recall``."""

    length: int = integer(300, at_least=2)
    test_size: int = integer(1000, at_least=1)


class DelayedRecallTask(Task):
    """Reproduce, at every step, the random bit of d steps ago; the horizon is the delay d.

    ``length`` steps of one random bit, 0 or 1. The target of step t is ``x_{t-d}``; the first d
    steps do not count.
    """

    name = "delayed_recall"
    Config = DelayedRecallConfig
    input_size = 1
    output_size = 1
    reads = "masked"
    answer = BIT
    minimum_horizon = 1

    def __init__(self, config: DelayedRecallConfig) -> None:
        super().__init__(config)
        self.maximum_horizon = config.length - 1

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw input ``[T, B, 1]`` and target ``[T, B, 1]``, T = ``length``."""
        shape = (self.config.length, batch_size, 1)
        bits = torch.randint(0, 2, shape, generator=generator, dtype=torch.float32)
        target = torch.full(shape, float(UNSCORED))
        target[horizon:] = self._asked(bits[horizon:], bits[:-horizon])
        return bits, target

    def _asked(self, now: Tensor, then: Tensor) -> Tensor:
        """Return the answer to a bit and the bit of d steps before."""
        return then

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the entropy of a bit."""
        return math.log(2)

    def know_nothing_error(self, horizon: int) -> float:
        """Return the share of wrong guesses."""
        return 0.5

    def dependency(self, horizon: int) -> int:
        """Return the delay."""
        return horizon
