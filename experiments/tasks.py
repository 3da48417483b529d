"""Sequence tasks whose horizon can be set: input, target, cost of ignorance.

Batches are drawn on the CPU from a ``torch.Generator``, so the same seed gives the same data on
every device and to every model. Sequences are time-major, as ``torch.nn.RNN`` takes them.

Shape legend: T time steps, B batch, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, one_hot

Batch = tuple[Tensor, Tensor]
"""Input ``[T, B, I]`` and target (``[B, O]`` or class indices ``[B]``, ``[T, B]``)."""


class Task(Protocol):
    """What the training loop, the ladder and the reports need to know about a task.

    An *error* is what verdicts are taken on: lower is better, and 0 is perfect. Its ratio to
    ``know_nothing_error`` is comparable between tasks.
    """

    name: str
    input_size: int
    output_size: int
    reads: Literal["last", "every"]
    """Which steps' predictions count: the last one's (``[B, O]``) or all (``[T, B, O]``)."""
    metric: Literal["MSE", "accuracy", "cross-entropy"]
    """What tables show; see :func:`shown_metric`."""
    minimum_horizon: int

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw a fresh training batch."""
        ...

    def test_set(self, horizon: int, generator: torch.Generator) -> Batch:
        """Return held-out data; the same for the same generator state."""
        ...

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the training loss, a mean over the batch (scalar)."""
        ...

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the test error, a mean over the batch (scalar)."""
        ...

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the loss of the best prediction that ignores the input."""
        ...

    def know_nothing_error(self, horizon: int) -> float:
        """Return the error of the best prediction that ignores the input."""
        ...


class AddingTask:
    """Add two marked numbers (Hochreiter & Schmidhuber 1997, in the form of Arjovsky et al. 2016).

    ``x_t = (u_t, mark_t)`` with ``u_t ~ U[0, 1]`` and one mark in each half of the sequence. The
    target is the sum of the two marked numbers, read at the last step. Its variance, 2/12, is the
    mean squared error of always answering 1.
    """

    name = "adding"
    input_size = 2
    output_size = 1
    reads: Literal["last"] = "last"
    metric: Literal["MSE"] = "MSE"
    minimum_horizon = 2

    def __init__(self, test_size: int) -> None:
        self.test_size = test_size

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw input ``[T, B, 2]`` and target ``[B, 1]``."""
        values_TB = torch.rand(horizon, batch_size, generator=generator)
        half = horizon // 2
        first = torch.randint(0, half, (batch_size,), generator=generator)
        second = torch.randint(half, horizon, (batch_size,), generator=generator)
        sample = torch.arange(batch_size)
        marks_TB = torch.zeros(horizon, batch_size)
        marks_TB[first, sample] = 1.0
        marks_TB[second, sample] = 1.0
        target = values_TB[first, sample] + values_TB[second, sample]
        return torch.stack((values_TB, marks_TB), dim=-1), target.unsqueeze(-1)

    def test_set(self, horizon: int, generator: torch.Generator) -> Batch:
        """Draw ``test_size`` sequences."""
        return self.sample(self.test_size, horizon, generator)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error."""
        return mse_loss(prediction, target)

    error = loss

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the variance of the sum of two uniform numbers."""
        return 1 / 6

    know_nothing_error = know_nothing_loss


class _LastStepClassification:
    """What tasks share whose class is asked for at the last step and equally likely a priori."""

    reads: Literal["last"] = "last"
    metric: Literal["accuracy"] = "accuracy"
    output_size: int

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(prediction, target)

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction.argmax(dim=-1) != target).double().mean()

    def know_nothing_loss(self, horizon: int) -> float:
        return math.log(self.output_size)

    def know_nothing_error(self, horizon: int) -> float:
        return 1 - 1 / self.output_size


class TemporalOrderTask(_LastStepClassification):
    """Say in which order two cues came (Pascanu et al. 2013).

    Six one-hot symbols: cues A and B, four distractors. One cue stands in ``[.1 L, .2 L)``, one in
    ``[.5 L, .6 L)``; the class at the end is AA, AB, BA or BB.
    """

    name = "temporal_order"
    input_size = 6
    output_size = 4
    minimum_horizon = 10

    def __init__(self, test_size: int) -> None:
        self.test_size = test_size

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw input ``[T, B, 6]`` and class ``[B]``."""
        symbols_TB = torch.randint(2, 6, (horizon, batch_size), generator=generator)
        cues = torch.randint(0, 2, (2, batch_size), generator=generator)
        sample = torch.arange(batch_size)
        for cue, tenth in zip(cues, (1, 5), strict=True):
            start, stop = tenth * horizon // 10, (tenth + 1) * horizon // 10
            position = torch.randint(start, stop, (batch_size,), generator=generator)
            symbols_TB[position, sample] = cue
        return one_hot(symbols_TB, self.input_size).float(), 2 * cues[0] + cues[1]

    def test_set(self, horizon: int, generator: torch.Generator) -> Batch:
        """Draw ``test_size`` sequences."""
        return self.sample(self.test_size, horizon, generator)


class CopyMemoryTask:
    """Repeat ten symbols after a delay (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016).

    Ten of eight symbols, ``T - 1`` blanks, a delimiter, ten blanks: ``T + 20`` steps of ten one-hot
    inputs. The target is ``T + 10`` blanks, then the symbols: nine classes at every step. Knowing
    only the shape of the answer costs ``10 ln 8 / (T + 20)``.
    """

    name = "copy_memory"
    input_size = 10
    output_size = 9
    reads: Literal["every"] = "every"
    metric: Literal["cross-entropy"] = "cross-entropy"
    minimum_horizon = 1

    _COPIED = 10
    _SYMBOLS = 8
    _BLANK = 8
    _DELIMITER = 9

    def __init__(self, test_size: int) -> None:
        self.test_size = test_size

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw input ``[T + 20, B, 10]`` and target ``[T + 20, B]``."""
        copied = torch.randint(0, self._SYMBOLS, (self._COPIED, batch_size), generator=generator)
        shape = (horizon + 2 * self._COPIED, batch_size)
        input_TB = torch.full(shape, self._BLANK)
        input_TB[: self._COPIED] = copied
        input_TB[self._COPIED + horizon - 1] = self._DELIMITER
        target_TB = torch.full(shape, self._BLANK)
        target_TB[-self._COPIED :] = copied
        return one_hot(input_TB, self.input_size).float(), target_TB

    def test_set(self, horizon: int, generator: torch.Generator) -> Batch:
        """Draw ``test_size`` sequences."""
        return self.sample(self.test_size, horizon, generator)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy, a mean over all time steps."""
        return cross_entropy(prediction.flatten(0, 1), target.flatten())

    error = loss

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the cost of knowing where the ten symbols go, but not which."""
        return self._COPIED * math.log(self._SYMBOLS) / (horizon + 2 * self._COPIED)

    know_nothing_error = know_nothing_loss


class NoisePaddedDigitsTask(_LastStepClassification):
    """Name a digit after ``T - 8`` steps of noise (after Chang et al. 2019, on offline images).

    The eight rows of a scikit-learn 8x8 digit (1,797 real images, pixels scaled to [0, 1]), then
    standard Gaussian noise until step T. Training batches draw images with replacement and fresh
    noise; the test set holds every image of a stratified split that training never sees.
    """

    name = "noise_padded_digits"
    input_size = 8
    output_size = 10
    minimum_horizon = 8

    def __init__(self, test_fraction: float, split_seed: int) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train_images, test_images, train_labels, test_labels = train_test_split(
            digits.images / 16.0,
            digits.target,
            test_size=test_fraction,
            random_state=split_seed,
            stratify=digits.target,
        )
        self._train = self._rows_first(train_images, train_labels)
        self._test = self._rows_first(test_images, test_labels)

    @staticmethod
    def _rows_first(images, labels) -> Batch:
        """Turn arrays ``[N, 8, 8]``, ``[N]`` into tensors ``[8 rows, N, 8 pixels]``, ``[N]``."""
        rows = torch.as_tensor(images, dtype=torch.float32).transpose(0, 1).contiguous()
        return rows, torch.as_tensor(labels, dtype=torch.long)

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw input ``[T, B, 8]`` and class ``[B]`` from the training images."""
        rows, labels = self._train
        chosen = torch.randint(0, len(labels), (batch_size,), generator=generator)
        return self._pad(rows[:, chosen], horizon, generator), labels[chosen]

    def test_set(self, horizon: int, generator: torch.Generator) -> Batch:
        """Return every test image once, with noise from ``generator``."""
        rows, labels = self._test
        return self._pad(rows, horizon, generator), labels

    def _pad(self, rows: Tensor, horizon: int, generator: torch.Generator) -> Tensor:
        steps, batch_size, pixels = rows.shape
        noise = torch.randn(horizon - steps, batch_size, pixels, generator=generator)
        return torch.cat((rows, noise))


TASKS: dict[str, Callable[..., Task]] = {
    task.name: task
    for task in (AddingTask, CopyMemoryTask, TemporalOrderTask, NoisePaddedDigitsTask)
}


def build_task(config: Mapping[str, Any]) -> Task:
    """Build the task that ``config`` (the ``task`` group) names, with its remaining keys."""
    options = dict(config)
    return TASKS[options.pop("name")](**options)


def shown_metric(task: Task, error: float) -> float:
    """Return what a table shows for an error: the accuracy of a classifier, else the error."""
    return 1 - error if task.metric == "accuracy" else error
