"""Small images that move with constant velocity and bounce off the walls of a frame.

What the tasks on videos share: where their sprites come from, how they move, how they are drawn,
and how frames are laid out to be looked at.

Shape legend: N images, S side of a sprite and L side of a frame in pixels, P = L * L pixels, T
frames, B batch, R rows and C columns of a layout.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.fields import Config, ConfigError, integer, number, optional, text
from experiments.tasks._idx import IDXError, find_idx, read_idx
from experiments.tasks._npy import NPYError, read_npy, words

_GREY, _ORANGE = (70, 70, 70), (255, 140, 0)
_GAP = 2


@dataclass(frozen=True)
class SpriteConfig(Config):
    """Options of tasks whose videos show moving sprites.

    Attributes:
        root: a folder with MNIST's image files; ``None`` for scikit-learn's digits.
        sprite: the side that images are reduced to; ``None`` for as they are.
        side: of a frame.
        speed: pixels per frame.
    """

    root: str | None = optional(text("."))
    sprite: int | None = optional(integer(8, at_least=1))
    side: int = integer(16, at_least=2)
    speed: float = number(1.0, at_least=0.0)
    test_size: int = integer(1000, at_least=1)


class MovingSprites:
    """Draws videos of sprites; those of held-out videos are images that training never shows.

    scikit-learn's last 360 digits are held out, of MNIST the images of its test set. The brightest
    pixel of a sprite is 1.

    Attributes:
        digest: a hash of the images.
        reach: the largest coordinate of a sprite's corner; the smallest is 0.
    """

    def __init__(self, config: SpriteConfig) -> None:
        self._parts = _digits() if config.root is None else _mnist(config.root)
        if config.sprite is not None:
            self._parts = [shrunk(images, config.sprite) for images in self._parts]
        self._parts = [images / images.amax((1, 2), keepdim=True) for images in self._parts]
        self.digest = digest(*self._parts)
        self._side, self._speed = config.side, config.speed
        self._sprite = self._parts[0].shape[-1]
        self.reach = config.side - self._sprite
        if self.reach < 1:
            raise ConfigError(
                f"task.side must be larger than the sprites, {self._sprite} x {self._sprite} "
                f"pixels (task.sprite reduces them); got {config.side}"
            )

    def draw(
        self, count: int, steps: int, generator: torch.Generator, is_held_out: bool
    ) -> tuple[Tensor, Tensor]:
        """Draw one sprite in each of so many videos, at a random place, in a random direction.

        Returns:
            The frames ``[T, B, L, L]`` and the sprite's centre of mass in each, row and column in
            pixels, ``[T, B, 2]``.
        """
        images = self._parts[is_held_out]
        chosen = torch.randint(0, len(images), (count,), generator=generator)
        angle = 2 * math.pi * torch.rand(count, generator=generator)
        velocity = self._speed * torch.stack((angle.sin(), angle.cos()), -1)
        start = self.reach * torch.rand(count, 2, generator=generator)
        time = torch.arange(steps).view(-1, 1, 1)
        corner_TB2 = reflected(start + velocity * time, self.reach)
        sprites = images[chosen]
        # Bilinear: a pixel gets what of the sprite lies within it, a row and a column at a time.
        rows, columns = (self._overlap(corner_TB2[..., axis]) for axis in (0, 1))
        frames = rows.transpose(-1, -2) @ (sprites @ columns)
        return frames, corner_TB2 + centre_of_mass(sprites)

    def _overlap(self, corner_TB: Tensor) -> Tensor:
        """Return how much of each pixel of a sprite falls on each of a frame, ``[T, B, S, L]``."""
        offset = torch.arange(self._sprite).view(-1, 1) - torch.arange(self._side)
        distance = (corner_TB[..., None, None] + offset).abs_()
        return distance.neg_().add_(1).clamp_(min=0)


def reflected(place: Tensor, reach: float) -> Tensor:
    """Return where something is that would be at ``place`` if walls at 0 and reach let it pass."""
    unfolded = place % (2 * reach)
    return torch.minimum(unfolded, 2 * reach - unfolded)


def centre_of_mass(frames: Tensor) -> Tensor:
    """Return row and column ``[..., 2]`` of the mean brightness; the middle where all is dark."""
    height, width = frames.shape[-2:]
    weight = frames.sum((-2, -1))
    row, column = ((length - 1) / 2 for length in (height, width))
    moments = (
        (frames.sum(-1) * (torch.arange(height, device=frames.device) - row)).sum(-1),
        (frames.sum(-2) * (torch.arange(width, device=frames.device) - column)).sum(-1),
    )
    centre = torch.stack(moments, -1) / weight.clamp(min=1e-6).unsqueeze(-1)
    return centre + torch.tensor((row, column), device=frames.device)


def shrunk(images: Tensor, side: int) -> Tensor:
    """Return images ``[..., side, side]``; a pixel is the mean over the area that it covers."""
    rows, columns = (_shares(length, side) for length in images.shape[-2:])
    return rows @ images @ columns.T


def _shares(length: int, side: int) -> Tensor:
    """Return the share of each of ``length`` pixels in each of ``side``; rows sum to 1."""
    size = length / side
    edges = torch.arange(side + 1) * size
    pixel = torch.arange(length)
    overlap = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    return overlap.clamp(min=0) / size


def digest(*tensors: Tensor) -> str:
    """Return a hash of the tensors' values."""
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(tensor.contiguous().numpy())
    return hasher.hexdigest()


def identity(task: Any, data: str) -> dict[str, Any]:
    """Return a task's settings, with a hash of its data for the places that the data came from."""
    settings = {
        key: value for key, value in asdict(task.config).items() if key not in ("root", "file")
    }
    return {"name": type(task).name, **settings, "data": data}


def _digits() -> list[Tensor]:
    from sklearn.datasets import load_digits

    pixels, _ = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 8, 8)
    return list(images.split([len(images) - 360, 360]))


def _mnist(root: str) -> list[Tensor]:
    folder = Path(root).expanduser()
    try:
        return [_idx_images(folder, part) for part in ("train", "t10k")]
    except IDXError as error:
        raise ConfigError(
            "task.root must be a folder with MNIST's images (train-images-idx3-ubyte and "
            f"t10k-images-idx3-ubyte, with .gz or without; nothing is downloaded): {error}"
        ) from error


def _idx_images(folder: Path, part: str) -> Tensor:
    path = find_idx(folder, f"{part}-images-idx3-ubyte")
    images = read_idx(path, 3)
    if images.shape[1] != images.shape[2]:
        raise IDXError(
            f"{path}: expected square images, got {images.shape[1]} x {images.shape[2]} pixels"
        )
    is_black = images.flatten(1).amax(1) == 0
    if is_black.any():
        first = is_black.nonzero()[0].item()
        raise IDXError(f"{path}: expected images with something on them, image {first} is black")
    return images.float()


@torch.no_grad()
def predicted(model: nn.Module, x_TBI: Tensor) -> Tensor:
    """Return what a model says at every step, on the CPU; the input is moved to where it is."""
    parameter = next(model.parameters())
    return model(x_TBI.to(parameter.device, parameter.dtype)).float().cpu()


def tiled(frames: Tensor, zoom: int, is_marked: bool = False) -> np.ndarray:
    """Lay frames out in rows and columns.

    Args:
        frames: ``[R, C, H, W]``, 0 is black and 1 is white.
        zoom: pixels of the picture, in both directions, for one of a frame.
        is_marked: whether the gaps between frames are orange instead of grey.

    Returns:
        A picture ``[height, width, 3]``, uint8.
    """
    rows, columns, height, width = frames.shape
    grey = (255 * frames.clamp(0, 1)).round().byte().numpy()
    grey = grey.repeat(zoom, 2).repeat(zoom, 3)
    high, wide = height * zoom + _GAP, width * zoom + _GAP
    picture = np.empty((rows * high + _GAP, columns * wide + _GAP, 3), np.uint8)
    picture[:] = _ORANGE if is_marked else _GREY
    for row in range(rows):
        for column in range(columns):
            top, left = row * high + _GAP, column * wide + _GAP
            tile = picture[top : top + height * zoom, left : left + width * zoom]
            tile[:] = grey[row, column, ..., None]
    return picture


def marked_column(picture: np.ndarray, column: int, columns: int) -> np.ndarray:
    """Return a picture that `tiled` made, with the gap before a column in orange."""
    wide = (picture.shape[1] - _GAP) // columns
    picture[:, column * wide : column * wide + _GAP] = _ORANGE
    return picture


def add_video_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the use of both tasks takes: a video that is given, and one that is written."""
    parser.add_argument(
        "--video",
        metavar="FILE.npy",
        type=Path,
        help="unsigned bytes [T, H, W], or [20, N, 64, 64] as Moving MNIST's, of which the first "
        "video is taken; without it: one that training did not show",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the video that is drawn without --video"
    )
    parser.add_argument("--output", metavar="FILE.gif", type=Path, help="where to write the video")


def check_output(path: Path) -> None:
    """Raise :class:`ConfigError` unless a path can be that of a GIF."""
    if path.suffix.lower() != ".gif":
        raise ConfigError(f"--output must be a file whose name ends with .gif; got {path}")
    if not path.parent.is_dir():
        raise ConfigError(f"--output must lie in a folder that is there; got {path}")


def read_video(path: Path) -> Tensor:
    """Read the video that ``--video`` names, ``[T, H, W]`` from 0 to 1.

    Raises:
        ConfigError: it cannot be read, or is of another shape.
    """
    try:
        frames = read_npy(path)
    except NPYError as error:
        raise ConfigError(f"--video: {error}") from error
    if frames.ndim == 4 and frames.shape == (20, frames.shape[1], 64, 64):
        frames = frames[:, 0]
    if frames.ndim != 3 or frames.shape[1] != frames.shape[2]:
        raise ConfigError(
            "--video must have the shape [T, H, H] or [20, N, 64, 64]; "
            f"{path} has {words(frames.shape)}"
        )
    return torch.tensor(frames, dtype=torch.float32) / 255
