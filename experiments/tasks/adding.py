"""Add two marked numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.fields import Config, integer
from experiments.tasks._task import NUMBERS, Batch, Task


@dataclass(frozen=True)
class AddingConfig(Config):
    """Options of ``task=adding``."""

    test_size: int = integer(2000, at_least=1)


class AddingTask(Task):
    """Add two marked numbers (Hochreiter & Schmidhuber 1997, in the form of Arjovsky et al. 2016).

    ``x_t = (u_t, mark_t)`` with ``u_t ~ U[0, 1]`` and one mark in each half of the sequence. The
    target is the sum of the two marked numbers, read at the last step. Its variance, 2/12, is the
    mean squared error of always answering 1.
    """

    name = "adding"
    Config = AddingConfig
    input_size = 2
    output_size = 1
    answer = NUMBERS
    minimum_horizon = 2

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw input ``[T, B, 2]`` and target ``[B, 1]``."""
        values_TB = torch.rand(horizon, batch_size, generator=generator)
        half = horizon // 2
        first = torch.randint(0, half, (1, batch_size), generator=generator)
        second = torch.randint(half, horizon, (1, batch_size), generator=generator)
        marked = torch.cat((first, second))
        marks_TB = torch.zeros(horizon, batch_size).scatter_(0, marked, 1.0)
        target = values_TB.gather(0, marked).sum(0)
        return torch.stack((values_TB, marks_TB), dim=-1), target.unsqueeze(-1)

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the variance of the sum of two uniform numbers."""
        return 1 / 6

    know_nothing_error = know_nothing_loss

    def dependency(self, horizon: int) -> int:
        """Return the lag of a mark at the first step."""
        return horizon - 1
