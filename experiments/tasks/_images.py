"""What tasks on small images share: how an image becomes a sequence, and what is asked about it.

Shape legend: N images, S side of an image in pixels, T time steps, B batch, I inputs.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.fields import Config, choice, seed
from experiments.tasks._task import BIT, CLASS, Batch, Task

FORMS = ("rows", "pixels", "permuted", "noise_padded")
QUESTIONS = ("class", "odd")
_DIGITS = 10


@dataclass(frozen=True)
class ImageConfig(Config):
    """Options that all image tasks have."""

    form: str = choice("rows", FORMS)
    question: str = choice("class", QUESTIONS)
    permutation_seed: int = seed(0)


class ImageTask(Task):
    """Name a handwritten digit that is shown a piece at a time.

    A subclass gives the images. ``form`` says what a step sees:

    * ``rows``: a row of the image, top to bottom; T = S.
    * ``pixels``: one pixel, row by row; T = S * S (Le, Jaitly & Hinton 2015).
    * ``permuted``: the pixels in one random order, the same for all images, drawn from
      ``permutation_seed``.
    * ``noise_padded``: the rows, then standard Gaussian noise until step T (after Chang et al.
      2019).

    ``question`` says what is asked at the last step: ``class``, one of ten, or ``odd``, one sigmoid
    output trained by binary cross-entropy. Training batches draw images with replacement; the test
    set holds every test image once. Pixels are scaled to [0, 1].

    Args:
        config: the options.
        train, test: images ``[N, S, S]`` and labels ``[N]``, uint8.
        brightest: the pixel value that becomes 1.
    """

    def __init__(self, config: ImageConfig, train: Batch, test: Batch, brightest: int) -> None:
        super().__init__(config)
        side = train[0].shape[-1]
        self._brightest = brightest
        self._digest = _digest(*train, *test)
        self._train, self._test = (
            (self._as_sequences(images), self._as_targets(labels))
            for images, labels in (train, test)
        )
        is_row = config.form in ("rows", "noise_padded")
        self.input_size = side if is_row else 1
        self.minimum_horizon = side if is_row else side * side
        self.maximum_horizon = None if config.form == "noise_padded" else self.minimum_horizon
        self.output_size = 1 if config.question == "odd" else _DIGITS
        self.answer = BIT if config.question == "odd" else CLASS
        if config.form != "rows":
            self.name = f"{config.form}_{self.name}"
        if config.question == "odd":
            self.name = f"{self.name}_odd"

    @property
    def identity(self) -> dict[str, Any]:
        """The settings, with a hash of the images and labels for the folder they came from."""
        settings = {key: value for key, value in self.settings.items() if key != "root"}
        return {**settings, "data": self._digest}

    def _as_sequences(self, images: Tensor) -> Tensor:
        """Return ``[N, T, I]``, still of bytes: a quarter of the memory of floats."""
        if self.config.form in ("rows", "noise_padded"):
            return images
        pixels = images.flatten(1)
        if self.config.form == "permuted":
            generator = torch.Generator().manual_seed(self.config.permutation_seed)
            pixels = pixels[:, torch.randperm(pixels.shape[1], generator=generator)]
        return pixels.unsqueeze(-1)

    def _as_targets(self, labels: Tensor) -> Tensor:
        if self.config.question == "odd":
            return (labels % 2).float().unsqueeze(-1)
        return labels.long()

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw training images: input ``[T, B, I]``, class ``[B]`` or odd ``[B, 1]``."""
        sequences, targets = self._train
        chosen = torch.randint(0, len(targets), (batch_size,), generator=generator)
        return self._shown(sequences[chosen], horizon, generator), targets[chosen]

    def test_set(self, horizon: int, generator: torch.Generator) -> Batch:
        """Return every test image once, with noise from ``generator``."""
        sequences, targets = self._test
        return self._shown(sequences, horizon, generator), targets

    def _shown(self, sequences: Tensor, horizon: int, generator: torch.Generator) -> Tensor:
        """Return ``[T, B, I]`` floats of ``[B, T, I]`` bytes, padded with noise if asked for."""
        batch_size, steps, inputs = sequences.shape
        length = horizon if self.config.form == "noise_padded" else steps
        x_TBI = torch.empty(length, batch_size, inputs)
        x_TBI[:steps].copy_(sequences.transpose(0, 1)).div_(self._brightest)
        x_TBI[steps:].normal_(generator=generator)
        return x_TBI

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the entropy of the training labels."""
        shares = _label_shares(self._train[1])
        return -sum(share * math.log(share) for share in shares if share > 0)

    def know_nothing_error(self, horizon: int) -> float:
        """Return the error, on the test images, of always giving the most frequent answer."""
        return 1 - max(_label_shares(self._test[1]))

    def dependency(self, horizon: int) -> int:
        """Return the lag of the first row or pixel."""
        return horizon - 1


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _label_shares(targets: Tensor) -> list[float]:
    return (targets.flatten().long().bincount().double() / len(targets)).tolist()
