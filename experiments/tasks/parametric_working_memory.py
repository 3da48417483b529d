"""Say which of two frequencies, a delay apart, was the higher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.tasks._trials import TrialConfig, TrialTask, pick

# Hertz, the higher first; every frequency but the outermost occurs as the higher and as the lower.
_PAIRS = torch.tensor([(18, 10), (22, 14), (26, 18), (30, 22), (34, 26)])
_LOWEST, _HIGHEST = 10, 34


@dataclass(frozen=True)
class ParametricWorkingMemoryConfig(TrialConfig):
    """Options of ``task=parametric_working_memory``."""


class ParametricWorkingMemoryTask(TrialTask):
    """Say whether the first of two vibrations had the higher frequency (Romo et al. 1999).

    Fixation 100 ms, f1 500 ms, delay, f2 500 ms, response 300 ms; frequencies and tuning as in
    Song, Yang & Wang (2016) after Barak, Tsodyks & Romo (2010): inputs are fixation and two
    channels, one that rises with the frequency from .4 to 1.2 and one that falls. Class 0: f1 was
    the higher. The horizon is the delay in steps.
    """

    name = "parametric_working_memory"
    Config = ParametricWorkingMemoryConfig
    input_size = 3
    epochs = (("fixation", 100), ("f1", 500), ("delay", None), ("f2", 500), ("response", 300))
    first_stimulus = "f1"

    def add_stimuli(
        self, x_TBI: Tensor, steps: dict[str, slice], generator: torch.Generator
    ) -> Tensor:
        """Add both frequencies; return which was the higher."""
        batch_size = x_TBI.shape[1]
        higher, lower = pick(_PAIRS, batch_size, generator).unbind(-1)
        choice = torch.randint(0, 2, (batch_size,), generator=generator)
        f1, f2 = higher.where(choice == 0, lower), lower.where(choice == 0, higher)
        for epoch, frequency in (("f1", f1), ("f2", f2)):
            rising = 0.4 + 0.8 * (frequency - _LOWEST) / (_HIGHEST - _LOWEST)
            x_TBI[steps[epoch], :, 1:] += torch.stack((rising, 1.6 - rising), dim=-1)
        return choice
