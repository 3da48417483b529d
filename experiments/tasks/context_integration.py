"""Say which channel is the larger, in the modality that the context names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.tasks._task import one_hot
from experiments.tasks._trials import TrialConfig, TrialTask, evidence, pick

_COHERENCES = torch.tensor([0.05, 0.15, 0.5])


@dataclass(frozen=True)
class ContextIntegrationConfig(TrialConfig):
    """Options of ``task=context_integration``."""


class ContextIntegrationTask(TrialTask):
    """Integrate the evidence of one modality and ignore the other's (Mante et al. 2013).

    Fixation 100 ms, stimulus, response 300 ms, as in Song, Yang & Wang (2016). Inputs: fixation;
    the context, one of two, during the stimulus; two channels of motion; two of colour. Each
    modality has a coherence of 5, 15 or 50 % and a direction of its own; the choice is the larger
    channel of the modality in context. The horizon is the stimulus's length in steps.
    """

    name = "context_integration"
    Config = ContextIntegrationConfig
    input_size = 7
    epochs = (("fixation", 100), ("stimulus", None), ("response", 300))
    first_stimulus = "stimulus"

    def add_stimuli(
        self, x_TBI: Tensor, steps: dict[str, slice], generator: torch.Generator
    ) -> Tensor:
        """Add context and evidence; return the larger channel of the modality in context."""
        batch_size = x_TBI.shape[1]
        context = torch.randint(0, 2, (batch_size,), generator=generator)
        stimuli, choices = [one_hot(context, 2)], []
        for _ in ("motion", "colour"):
            coherence = pick(_COHERENCES, batch_size, generator)
            choices.append(torch.randint(0, 2, (batch_size,), generator=generator))
            stimuli.append(evidence(coherence, choices[-1]))
        x_TBI[steps["stimulus"], :, 1:] += torch.cat(stimuli, dim=-1)
        return choices[0].where(context == 0, choices[1])
