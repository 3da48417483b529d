"""What every task is, and the kinds of answers it can ask for.

Batches are drawn on the CPU from a ``torch.Generator``, the only source of randomness, so the same
seed gives the same data on every device and to every model. Sequences are time-major, as
``torch.nn.RNN`` takes them.

Shape legend: T time steps, B batch, I inputs, O outputs.
"""

from __future__ import annotations

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from experiments.fields import Config, ConfigError
from experiments.looks import Look

if TYPE_CHECKING:  # models know tasks
    from experiments.models import SequenceModel

Batch = tuple[Tensor, Tensor]
"""Input ``[T, B, I]`` and target; the target's shape depends on the kind of answer."""

UNSCORED = -100
"""Target of a step that does not count; ``cross_entropy`` ignores this value by default."""

Metric = Literal[
    "MSE", "accuracy", "cross-entropy", "bits per character", "character error rate", "pixel error"
]


@dataclass(frozen=True)
class Answer:
    """A kind of answer: how a prediction is trained and judged.

    ``loss`` and ``error`` take prediction and target and return a mean over samples and scored
    steps, a scalar. An *error* is what verdicts are taken on: lower is better, and 0 is perfect.
    Its ratio to that of knowing nothing is comparable between tasks. ``scored`` returns how many
    entries of a target the means are taken over.
    """

    metric: Metric
    loss: Callable[[Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor]
    scored: Callable[[Tensor], Tensor] = lambda target: (target != UNSCORED).sum()


def _masked_mse(prediction: Tensor, target: Tensor) -> Tensor:
    scored = ~target.isnan()
    return (prediction - target).where(scored, 0).square().sum() / scored.sum()


def _class_loss(prediction: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(prediction.flatten(0, -2), target.flatten(), ignore_index=UNSCORED)


def _class_error(prediction: Tensor, target: Tensor) -> Tensor:
    scored = target != UNSCORED
    return ((prediction.argmax(dim=-1) != target) & scored).double().sum() / scored.sum()


def _bit_loss(prediction: Tensor, target: Tensor) -> Tensor:
    scored = target != UNSCORED
    loss = binary_cross_entropy_with_logits(prediction, target, reduction="none")
    return loss.where(scored, 0).sum() / scored.sum()


def _bit_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Accuracy by rounding the sigmoid: a logit above 0 is a 1."""
    scored = target != UNSCORED
    return (((prediction > 0) != (target > 0.5)) & scored).double().sum() / scored.sum()


def _bits(prediction: Tensor, target: Tensor) -> Tensor:
    return _class_loss(prediction, target) / math.log(2)


NUMBERS = Answer("MSE", mse_loss, mse_loss, Tensor.numel)
"""Target: floats of the prediction's shape."""
MASKED_NUMBERS = Answer("MSE", _masked_mse, _masked_mse, lambda target: (~target.isnan()).sum())
"""As ``NUMBERS``; an entry that is nan does not count."""
CLASS = Answer("accuracy", _class_loss, _class_error)
"""Prediction: O logits; target: class indices ``[B]`` or ``[T, B]``."""
SYMBOLS = Answer("cross-entropy", _class_loss, _class_loss)
"""As ``CLASS``, where most steps are easy and accuracy would say little."""
CHARACTERS = Answer("bits per character", _class_loss, _bits)
"""As ``SYMBOLS``; the error is in bits."""
BIT = Answer("accuracy", _bit_loss, _bit_error)
"""Prediction: one logit; target: 0.0 or 1.0, ``[B, 1]`` or ``[T, B, 1]``."""


class Task(ABC):
    """What the training loop, the ladder and the reports need to know about a task.

    Attributes:
        name: the file's name; what is shown. An option that changes what is asked adds to the
            instance's name.
        Config: its configuration, a frozen dataclass; ``hydra_conf/task/NAME.yaml`` shows it.
        reads: which steps' predictions count: the last one's (``[B, O]``), those of every step
            (``[T, B, O]``), or of every step under a mask (targets are ``UNSCORED`` elsewhere).
        answer: loss, error and the metric that tables show.
        minimum_horizon, maximum_horizon: which horizons there are; ``None`` for no upper bound.
        is_shown_later: whether answers are among later inputs, so that a model that reads backwards
            as well would see them.
    """

    name: str
    Config: ClassVar[type[Config]]
    input_size: int
    output_size: int
    reads: Literal["last", "every", "masked"] = "last"
    answer: Answer
    minimum_horizon: int
    maximum_horizon: int | None = None
    is_shown_later: bool = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw a fresh training batch."""

    def test_set(self, horizon: int, generator: torch.Generator) -> Batch:
        """Return held-out data; the same for the same generator state.

        Unless a task says otherwise: ``config.test_size`` fresh sequences.
        """
        return self.sample(self.config.test_size, horizon, generator)

    @abstractmethod
    def know_nothing_loss(self, horizon: int) -> float:
        """Return the training loss of the best prediction that ignores the input."""

    @abstractmethod
    def know_nothing_error(self, horizon: int) -> float:
        """Return the test error of the best prediction that ignores the input."""

    @abstractmethod
    def dependency(self, horizon: int) -> int:
        """Return the longest lag that matters, in steps.

        That is from the earliest input that an answer depends on to the step that is asked.
        """

    def check_horizon(self, key: str, horizon: int) -> None:
        """Raise :class:`ConfigError` if there is no such horizon; ``key`` is where it came from."""
        low, high = self.minimum_horizon, self.maximum_horizon
        if horizon < low or (high is not None and horizon > high):
            if high is None:
                expected = f"at least {low}"
            else:
                expected = f"{low}" if low == high else f"from {low} to {high}"
            raise ConfigError(f"{key} must be {expected} for task {self.name}; got {horizon}")

    @property
    def metric(self) -> Metric:
        """What tables show; see :func:`shown_metric`."""
        return self.answer.metric

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved ``task`` group: ``build_task(task.settings)`` builds the same task."""
        return {"name": type(self).name, **asdict(self.config)}

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two tasks the same: their settings, and the data itself, not where it lies."""
        return self.settings

    @classmethod
    def has_loss_at_first_step(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether even the first step has a loss of its own, with these settings.

        The gradient there then says nothing about how far it travels.
        """
        return cls.reads == "every"

    @property
    def sample_dim(self) -> int:
        """The dimension of a target along which the samples of a batch lie; 1 in the input."""
        return 0 if self.reads == "last" else 1

    def scored(self, target: Tensor) -> int:
        """Return how many entries of a target count; means are over these."""
        return int(self.answer.scored(target))

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the training loss, a mean over the batch (scalar)."""
        return self.answer.loss(prediction, target)

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the test error, a mean over the batch (scalar)."""
        return self.answer.error(prediction, target)

    def judge(self, model: SequenceModel, x_TBI: Tensor, target: Tensor) -> Tensor:
        """Return the test error of a model, as `error` does of a prediction.

        A task whose answers are sequences lets the model write them on its own here.
        """
        prediction = model(x_TBI)
        is_rounded = prediction.dtype == torch.bfloat16
        return self.error(prediction.float() if is_rounded else prediction, target)

    def baselines(self, x_TBI: Tensor, target: Tensor, horizon: int) -> dict[str, float]:
        """Return the errors of simple methods on test data, by name; a model should beat them."""
        return {}

    def measures(
        self, model: SequenceModel, x_TBI: Tensor, target: Tensor, horizon: int
    ) -> dict[str, float]:
        """Return more numbers about a trained model on test data, by name and unit."""
        return {}

    def looks(self, model: SequenceModel, horizon: int, generator: torch.Generator) -> list[Look]:
        """Return what a person would want to see of a model: text, pictures, videos.

        They follow from the weights and the generator alone.
        """
        return []

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of ``python -m experiments.use RUN`` for a model of this task.

        Raises:
            ConfigError: there is no use for one.
        """
        raise ConfigError(f"RUN is of task {self.name}, whose models are of no use beyond it")

    def use(self, model: SequenceModel, arguments: argparse.Namespace, horizon: int) -> None:
        """Do what the arguments ask for, with a trained model; print it, or write files.

        Raises:
            ConfigError: names the argument, what was expected and what came.
        """
        raise NotImplementedError


def generator_of(seed: int) -> torch.Generator:
    """Return what draws for ``--seed``, an argument of `Task.use`.

    Raises:
        ConfigError: it is out of range.
    """
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed must be from 0 to 2**63 - 1; got {seed}")
    return torch.Generator().manual_seed(seed)


def one_hot(symbols: Tensor, size: int) -> Tensor:
    """Return symbols ``[...]`` as floats ``[..., size]``: a 1 where the symbol says, else 0."""
    return torch.zeros(*symbols.shape, size).scatter_(-1, symbols.unsqueeze(-1), 1.0)


def shown_metric(task: Task, error: float) -> float:
    """Return what a table shows for an error: the accuracy of a classifier, else the error."""
    return 1 - error if task.metric == "accuracy" else error
