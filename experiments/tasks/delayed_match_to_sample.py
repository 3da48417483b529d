"""Say whether two directions, a delay apart, were the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.tasks._trials import TrialConfig, TrialTask

_RING = 16


@dataclass(frozen=True)
class DelayedMatchToSampleConfig(TrialConfig):
    """Options of ``task=delayed_match_to_sample``."""


class DelayedMatchToSampleTask(TrialTask):
    """Say whether a test is the sample of before the delay (Miller, Erickson & Desimone 1996).

    Fixation 300 ms, sample 500 ms, delay, test 500 ms, response 900 ms; inputs as NeuroGym's
    DelayMatchSample: fixation and a ring of 16 channels, (1 + cos of the angle between the stimulus
    and the channel) / 2. A stimulus is one of 16 directions; half of the tests match (class 0), the
    others are any other direction (class 1). The horizon is the delay in steps.
    """

    name = "delayed_match_to_sample"
    Config = DelayedMatchToSampleConfig
    input_size = 1 + _RING
    epochs = (("fixation", 300), ("sample", 500), ("delay", None), ("test", 500), ("response", 900))
    first_stimulus = "sample"

    def add_stimuli(
        self, x_TBI: Tensor, steps: dict[str, slice], generator: torch.Generator
    ) -> Tensor:
        """Add sample and test; return 0 for a match, else 1."""
        batch_size = x_TBI.shape[1]
        sample = torch.randint(0, _RING, (batch_size,), generator=generator)
        differs = torch.randint(0, 2, (batch_size,), generator=generator)
        turn = torch.randint(1, _RING, (batch_size,), generator=generator)
        channels = torch.arange(_RING)
        for epoch, direction in (("sample", sample), ("test", sample + differs * turn)):
            angle = 2 * math.pi / _RING * (channels - direction.unsqueeze(-1))
            x_TBI[steps[epoch], :, 1:] += 0.5 + 0.5 * torch.cos(angle)
        return differs
