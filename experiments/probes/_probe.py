"""What a probe is: an instrument of the library with a period."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from experiments.fields import Config, ConfigError, integer, optional
from experiments.models import SequenceModel
from experiments.tasks import Task
from rnn_cuda.instruments import GradientFlow


@dataclass(frozen=True)
class ProbeConfig(Config):
    """Options that all probes have.

    Attributes:
        every: training steps between two measurements; null: at the start and at the end alone,
            where every probe is taken.
    """

    every: int | None = optional(integer(1, at_least=1))


class Probe(ABC):
    """Measures a model on a batch that is held out for it.

    Where a probe says nothing else, it looks at the lowest layer, forward direction.

    Attributes:
        name: the file's name.
        Config: its options, a frozen dataclass.
        layers: the recurrent layers that can be measured; any core, unless a subclass says more.
    """

    name: str
    Config: ClassVar[type[ProbeConfig]] = ProbeConfig
    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    def __init__(self, config: Any) -> None:
        self.config = config

    def check(self, model: SequenceModel, task: Task) -> None:
        """Refuse a model that cannot be measured, before anything runs.

        Args:
            model: as new, on the CPU, with all remedies.
            task: what it will be trained on.

        Raises:
            ProbeError: names the probe, what it measures and what came.
        """
        if not isinstance(model.core, self.layers):
            raise ProbeError(
                f"probe.{self.name} measures {', '.join(k.__name__ for k in self.layers)}; "
                f"got {model.core_name}"
            )

    @abstractmethod
    def measure(
        self, model: SequenceModel, task: Task, x_TBI: Tensor, target: Tensor
    ) -> dict[str, Any]:
        """Return what was measured, JSON-ready: numbers and lists of numbers by name.

        Random numbers come from torch's global generator, which is seeded before and put back
        after. An infinity is ``None`` in a record, so return logarithms only where they exist.

        Args:
            model: a copy of the one in training, in evaluation mode.
            task: what it is trained on.
            x_TBI: input of the batch.
            target: its answers, for ``task.loss``.
        """


class ProbeError(ConfigError):
    """A probe that cannot be taken of a model; the message names both."""


def recorded(
    model: SequenceModel, task: Task, x_TBI: Tensor, target: Tensor, **options: Any
) -> GradientFlow:
    """Return the gradient's flow through a model, each sample's being that of its own loss.

    Args:
        model: what is measured; its core is ``core`` in what is returned.
        task: whose loss it is.
        x_TBI: input of the batch.
        target: its answers.
        options: of `rnn_cuda.instruments.GradientFlow`.
    """
    with GradientFlow(model, **options) as flow:
        loss = task.loss(model(x_TBI), target) * x_TBI.shape[1]  # a sum over the samples
        torch.autograd.grad(loss, list(model.parameters()))
    return flow


def log10_or_none(value: float) -> float | None:
    """Return log10, or ``None`` for an exact zero and for what is not finite."""
    return math.log10(value) if value > 0 and math.isfinite(value) else None


def as_json(values: Tensor) -> Any:
    """Return a tensor as a number or nested lists; ``None`` for what is not finite."""

    def strict(value: Any) -> Any:
        if isinstance(value, list):
            return [strict(each) for each in value]
        return value if math.isfinite(value) else None

    return strict(values.tolist())
