"""Small images that move with constant velocity and bounce off the walls of a frame.

What the tasks on videos share: where their sprites come from, how they move and are drawn.

Shape legend: N images, S side of a sprite and L side of a frame in pixels, T frames, B batch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.fields import Config, ConfigError, integer, number, optional, text
from experiments.tasks._idx import IDXError, find_idx, read_idx

_HELD_OUT = 360  # of scikit-learn's 1,797 digits


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

    scikit-learn's last 360 digits are held out; of MNIST, the images of its test set. The brightest
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
    return list(images.split([len(images) - _HELD_OUT, _HELD_OUT]))


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
