"""What a remedy can do to a run; a subclass overrides what it needs.

Shape legend: T time steps, B batch, I inputs.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import rnn_cuda
from experiments.fields import Config, ConfigError
from experiments.models import SequenceModel
from experiments.tasks import Task


@dataclass(frozen=True)
class Problem:
    """What a model is trained on.

    Attributes:
        task: the task.
        horizon: T, as the task understands it.
    """

    task: Task
    horizon: int


class Remedy(ABC):
    """One change against vanishing or exploding gradients; any number of them can be on at once.

    Attributes:
        name: the file's name.
        Config: its options, a frozen dataclass.
        order: when it is applied; lower first. Weights are drawn (0) before layers are replaced
            (1) and weights constrained (2).
    """

    name: str
    Config: ClassVar[type[Config]] = Config
    order: int = 0

    def __init__(self, config: Any) -> None:
        self.config = config

    def change(self, model: SequenceModel, problem: Problem) -> None:
        """Change the weights or layers of a new model, in place.

        Random numbers come from torch's global generator, which the run has seeded.

        Raises:
            ConfigError: the remedy does not apply to this model.
        """

    def prepare(self, model: SequenceModel, problem: Problem, generator: torch.Generator) -> None:
        """Train the model, in place, before training proper begins."""

    def penalty(self, model: SequenceModel, x_TBI: Tensor, loss: Tensor) -> Tensor | None:
        """Return what is added to the loss of a batch, a differentiable scalar."""
        return None

    def clip(self, parameters: Sequence[nn.Parameter], norm: Tensor) -> None:
        """Change the gradients, in place.

        Args:
            parameters: all that are trained; each has a gradient.
            norm: the global norm of their gradients, a scalar on their device.
        """


def apply(model: SequenceModel, name: str, **options: Any) -> None:
    """Apply a remedy of the library to the core of a model, in place.

    Raises:
        ConfigError: it does not apply to this kind of core.
    """
    try:
        model.core = rnn_cuda.remedies.apply(model.core, name, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"remedy {name}: {error}") from error
