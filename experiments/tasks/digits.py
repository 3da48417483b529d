"""Name a scikit-learn digit that is shown by rows or pixels, or before noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.fields import ConfigError, fraction, seed
from experiments.tasks._images import ImageConfig, ImageTask


@dataclass(frozen=True)
class DigitsConfig(ImageConfig):
    """Options of ``task=digits``."""

    test_fraction: float = fraction(0.2)
    split_seed: int = seed(0)


class DigitsTask(ImageTask):
    """Name a digit of scikit-learn's: 1,797 real images of 8 x 8 pixels, offline.

    Training never sees the images of the test set, a stratified split. What a step shows and what
    is asked: :class:`~experiments.tasks._images.ImageTask`.
    """

    name = "digits"
    Config = DigitsConfig

    def __init__(self, config: DigitsConfig) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        try:
            parts = train_test_split(
                images.reshape(-1, 8, 8),
                labels,
                test_size=config.test_fraction,
                random_state=config.split_seed,
                stratify=labels,
            )
        except ValueError as error:
            raise ConfigError(
                "task.test_fraction must leave an image of each digit to train on and to test on; "
                f"got {config.test_fraction:g} ({error})"
            ) from error
        train_images, test_images, train_labels, test_labels = (
            torch.as_tensor(part, dtype=torch.uint8) for part in parts
        )
        super().__init__(
            config, (train_images, train_labels), (test_images, test_labels), brightest=16
        )
