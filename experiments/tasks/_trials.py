"""What trials of neuroscience tasks share: fixation, epochs, input noise, a binary choice.

A trial is a row of epochs. Input 0 is the fixation cue, 1 until the response epoch; the other
inputs are the stimulus. Only the response epoch counts. Every input carries noise at every step,
as in Song, Yang & Wang (2016): standard deviation ``noise * sqrt(2 tau / dt)``, tau = 100 ms.
Their catch trials, which show nothing, are left out, and so are held outputs during fixation.

Shape legend: T time steps, B batch, I inputs.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.fields import Config, integer, number
from experiments.tasks._task import CLASS, UNSCORED, Batch, Task

_TAU_MS = 100


@dataclass(frozen=True)
class TrialConfig(Config):
    """Options that all trial tasks have: milliseconds of a step, input noise, test trials."""

    dt: int = integer(20, at_least=1, at_most=100)
    noise: float = number(0.01, at_least=0)
    test_size: int = integer(2000, at_least=1)


class TrialTask(Task):
    """A trial of epochs, the last of which asks for one of two choices, equally likely.

    A subclass names its epochs in order, with their milliseconds; ``None`` marks the one that the
    horizon sets, in steps. The first is ``fixation``, the last ``response``.
    """

    epochs: tuple[tuple[str, int | None], ...]
    first_stimulus: str
    """The epoch that shows the first of what the choice depends on."""
    output_size = 2
    reads = "masked"
    answer = CLASS
    minimum_horizon = 1

    def epoch_steps(self, horizon: int) -> dict[str, slice]:
        """Return the steps of each epoch of a trial."""
        steps, start = {}, 0
        for name, milliseconds in self.epochs:
            duration = (
                horizon if milliseconds is None else max(1, round(milliseconds / self.config.dt))
            )
            steps[name] = slice(start, start + duration)
            start += duration
        return steps

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw input ``[T, B, I]`` and choice ``[T, B]``, unscored before the response epoch."""
        steps = self.epoch_steps(horizon)
        response = steps["response"]
        x_TBI = torch.empty(response.stop, batch_size, self.input_size)
        deviation = self.config.noise * math.sqrt(2 * _TAU_MS / self.config.dt)
        x_TBI.normal_(0, deviation, generator=generator)
        x_TBI[: response.start, :, 0] += 1
        choice = self.add_stimuli(x_TBI, steps, generator)
        target = torch.full((response.stop, batch_size), UNSCORED)
        target[response] = choice
        return x_TBI, target

    @abstractmethod
    def add_stimuli(
        self, x_TBI: Tensor, steps: dict[str, slice], generator: torch.Generator
    ) -> Tensor:
        """Draw trials, add their stimuli to ``x_TBI`` in place, return the choices ``[B]``."""

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the entropy of the choice."""
        return math.log(2)

    def know_nothing_error(self, horizon: int) -> float:
        """Return the share of wrong guesses."""
        return 0.5

    def dependency(self, horizon: int) -> int:
        """Return the lag from the first stimulus to the last step of the response."""
        steps = self.epoch_steps(horizon)
        return steps["response"].stop - 1 - steps[self.first_stimulus].start


def pick(values: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw ``size`` of the ``values`` (along their first dimension) with replacement."""
    return values[torch.randint(0, len(values), (size,), generator=generator)]


def evidence(coherence: Tensor, choice: Tensor) -> Tensor:
    """Return ``[B, 2]``: (1 + c) / 2 for the choice's channel and (1 - c) / 2 for the other."""
    difference = coherence * (1 - 2 * choice)
    return 0.5 + 0.5 * torch.stack((difference, -difference), dim=-1)
