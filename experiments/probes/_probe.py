"""What a probe is: an instrument of the library with a period."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from experiments.fields import Config, integer, optional
from experiments.models import SequenceModel
from experiments.tasks import Task


@dataclass(frozen=True)
class ProbeConfig(Config):
    """Options that all probes have.

    Attributes:
        every: training steps between two measurements; null: at the start and at the end alone,
            where every probe is taken.
    """

    every: int | None = optional(integer(1, at_least=1))


class Probe(ABC):
    """Measures a model on a batch that is held out for it; changes neither.

    Attributes:
        name: the file's name.
        Config: its options, a frozen dataclass.
    """

    name: str
    Config: ClassVar[type[ProbeConfig]] = ProbeConfig

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def measure(
        self, model: SequenceModel, task: Task, x_TBI: Tensor, target: Tensor
    ) -> dict[str, Any]:
        """Return what was measured, JSON-ready: numbers and lists of numbers by name.

        Random numbers come from torch's global generator, which is seeded before and put back
        after. An infinity is ``None`` in a record, so return logarithms only where they exist.

        Raises:
            ProbeError: the model is not of a kind that can be measured.
        """


class ProbeError(ValueError):
    """A probe that cannot be taken of a model; the message names both."""


def log10_or_none(value: float) -> float | None:
    """Return log10, or ``None`` for an exact zero and for what is not finite."""
    return math.log10(value) if value > 0 and math.isfinite(value) else None
