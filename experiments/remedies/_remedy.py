"""What a remedy can do to a run; a subclass overrides what it needs.

Shape legend: T time steps, B batch, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import rnn_cuda
from experiments.fields import Config, ConfigError
from experiments.models import SequenceModel
from experiments.tasks import Task


class Order(IntEnum):
    """When a remedy is applied to a new model; lower first, then by name."""

    WEIGHTS = 0
    """Draws weights."""
    BIASES = 1
    """Sets some of what was drawn."""
    LAYERS = 2
    """Replaces layers."""
    CONSTRAINTS = 3
    """Computes weights from others."""
    TRAINING = 4
    """Trains the model that all the others have made."""


@dataclass(frozen=True)
class Problem:
    """What a model is trained on.

    Attributes:
        task: the task.
        horizon: T, as the task understands it.
    """

    task: Task
    horizon: int


class Remedy:
    """One change against vanishing or exploding gradients; any number of them can be on at once.

    Attributes:
        name: the file's name.
        Config: its options, a frozen dataclass.
        order: when it is applied.
        layers: the recurrent layers that it applies to; any core, unless a subclass says more.

    One remedy serves many runs, also at the same time: it keeps nothing of a model.
    """

    name: str
    Config: ClassVar[type[Config]] = Config
    order: Order = Order.TRAINING
    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    def __init__(self, config: Any) -> None:
        self.config = config

    def check(self, model: SequenceModel) -> None:
        """Refuse a model that this remedy does not apply to.

        Raises:
            ConfigError: names the remedy, what it applies to and what came.
        """
        if not isinstance(model.core, self.layers):
            raise ConfigError(
                f"remedy.{self.name} applies to {', '.join(k.__name__ for k in self.layers)}; "
                f"got {model.core_name}"
            )

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


def apply(remedy: Remedy, model: SequenceModel, function: str, **options: Any) -> None:
    """Apply a remedy of the library to the core of a model, in place.

    Args:
        remedy: on whose behalf, for an error.
        model: what is changed.
        function: one of `rnn_cuda.remedies.REMEDIES`.
        options: that it takes.

    Raises:
        ConfigError: it cannot be applied to this core.
    """
    try:
        model.core = rnn_cuda.remedies.apply(model.core, function, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"remedy.{remedy.name}: {error}") from error
