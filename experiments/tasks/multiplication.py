"""Multiply two marked numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.fields import Config, integer
from experiments.tasks._task import NUMBERS, Batch, Task


@dataclass(frozen=True)
class MultiplicationConfig(Config):
    """Options of ``task=multiplication``."""

    test_size: int = integer(2000, at_least=1)


class MultiplicationTask(Task):
    """Multiply two marked numbers (Hochreiter & Schmidhuber 1997, experiment 5).

    ``x_t = (u_t, mark_t)`` with ``u_t ~ U[0, 1]``, marked as Pascanu et al. (2013) do: one mark in
    ``[0, .1 T)``, one in ``[.1 T, .5 T)``; T is fixed, where theirs is drawn from ``[T, 1.1 T)``.
    The target is the product of the two marked numbers, read at the last step. Its variance is
    E[u^2]^2 - E[u]^4 = 1/9 - 1/16.
    """

    name = "multiplication"
    Config = MultiplicationConfig
    input_size = 2
    output_size = 1
    answer = NUMBERS
    minimum_horizon = 10

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw input ``[T, B, 2]`` and target ``[B, 1]``."""
        x_TBI = torch.zeros(horizon, batch_size, 2)
        values_TB = torch.rand(horizon, batch_size, generator=generator)
        x_TBI[..., 0] = values_TB
        target = torch.ones(batch_size)
        sample = torch.arange(batch_size)
        tenth = horizon // 10
        for start, stop in ((0, tenth), (tenth, horizon // 2)):
            marked = torch.randint(start, stop, (batch_size,), generator=generator)
            x_TBI[marked, sample, 1] = 1.0
            target *= values_TB[marked, sample]
        return x_TBI, target.unsqueeze(-1)

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the variance of the product of two uniform numbers."""
        return 1 / 9 - 1 / 16

    know_nothing_error = know_nothing_loss

    def dependency(self, horizon: int) -> int:
        """Return the lag of a mark at the first step."""
        return horizon - 1
