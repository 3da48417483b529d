"""Say which of two noisy channels is the larger."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.tasks._trials import TrialConfig, TrialTask, evidence, pick

# Roitman & Shadlen (2002) from 3.2 % up, and 1 % in place of their 0, which has no right answer.
_COHERENCES = torch.tensor([0.01, 0.032, 0.064, 0.128, 0.256, 0.512])


@dataclass(frozen=True)
class PerceptualDecisionConfig(TrialConfig):
    """Options of ``task=perceptual_decision``."""


class PerceptualDecisionTask(TrialTask):
    """Say which of two noisy channels is the larger (Roitman & Shadlen 2002).

    Fixation 100 ms, stimulus, response 300 ms, as in Song, Yang & Wang (2016). Inputs: fixation and
    two channels of (1 + c) / 2 and (1 - c) / 2 with a coherence c of 1 to 51.2 %. The horizon is
    the stimulus's length in steps. Noise hides the weakest evidence: the shorter the stimulus, the
    more errors the best possible observer makes.
    """

    name = "perceptual_decision"
    Config = PerceptualDecisionConfig
    input_size = 3
    epochs = (("fixation", 100), ("stimulus", None), ("response", 300))
    first_stimulus = "stimulus"

    def add_stimuli(
        self, x_TBI: Tensor, steps: dict[str, slice], generator: torch.Generator
    ) -> Tensor:
        """Add the evidence; return the larger channel."""
        batch_size = x_TBI.shape[1]
        coherence = pick(_COHERENCES, batch_size, generator)
        choice = torch.randint(0, 2, (batch_size,), generator=generator)
        x_TBI[steps["stimulus"], :, 1:] += evidence(coherence, choice)
        return choice
