"""Name an MNIST digit that is shown by rows or pixels, or before noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.fields import ConfigError, text
from experiments.tasks._idx import IDXError, find_idx, read_idx
from experiments.tasks._images import ImageConfig, ImageTask
from experiments.tasks._task import Batch

_SIDE = 28
_CLASSES = 10
_FILES = "{part}-images-idx3-ubyte", "{part}-labels-idx1-ubyte"


@dataclass(frozen=True)
class MnistConfig(ImageConfig):
    """Options of ``task=mnist``; ``root`` is the folder that holds the files."""

    root: str = text("data/mnist")


class MnistTask(ImageTask):
    """Name a digit of MNIST (LeCun et al. 1998): 60,000 training and 10,000 test images of 28 x 28.

    The four IDX files (``train-images-idx3-ubyte`` and so on, with ``.gz`` or without) are read
    from ``root`` or from where torchvision puts them below it, and never downloaded. Fashion-MNIST
    has the same format. What a step shows and what is asked:
    :class:`~experiments.tasks._images.ImageTask`. With rows and ``question=odd`` this is the
    classic example of a recurrent layer of 128 units under one sigmoid output.
    """

    name = "mnist"
    Config = MnistConfig

    def __init__(self, config: MnistConfig) -> None:
        try:
            train, test = (
                _read(Path(config.root).expanduser(), part) for part in ("train", "t10k")
            )
        except IDXError as error:
            raise ConfigError(
                "task.root (MNIST_ROOT in the environment) must be the folder with MNIST's IDX "
                "files (train-images-idx3-ubyte and so on, with .gz or without; nothing is "
                f"downloaded): {error}"
            ) from error
        super().__init__(config, train, test, brightest=255)


def _read(root: Path, part: str) -> Batch:
    """Return images ``[N, 28, 28]`` and labels ``[N]``, uint8."""
    images_file, labels_file = (find_idx(root, name.format(part=part)) for name in _FILES)
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if images.shape[1:] != (_SIDE, _SIDE):
        raise IDXError(
            f"{images_file}: expected images of {_SIDE} x {_SIDE} pixels, got "
            f"{images.shape[1]} x {images.shape[2]}"
        )
    if len(images) != len(labels):
        raise IDXError(
            f"{labels_file}: {len(labels)} labels, but {images_file} holds {len(images)} images"
        )
    if labels.max() >= _CLASSES:
        raise IDXError(
            f"{labels_file}: expected labels from 0 to {_CLASSES - 1}, got {labels.max().item()}"
        )
    return images, labels
