"""Writes MNIST's four files in their true format, with few images."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor


def idx_bytes(data: Tensor) -> bytes:
    """Return a uint8 tensor as an IDX file: two zero bytes, type, dimensions, sizes, data."""
    header = struct.pack(f">HBB{data.dim()}I", 0, 0x08, data.dim(), *data.shape)
    return header + data.numpy().tobytes()


def mnist_like(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return ``count`` random images, all different, and labels of every class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
    return images, (torch.arange(count) % 10).to(torch.uint8)


def write_mnist(folder: Path, compressed: bool = False, train: int = 60, test: int = 20) -> None:
    """Write the four files; images and labels as :func:`mnist_like` of seeds 0 and 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (part, count) in enumerate({"train": train, "t10k": test}.items()):
        images, labels = mnist_like(count, seed)
        for name, data in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_bytes(data)
            if compressed:
                (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{part}-{name}-ubyte").write_bytes(content)
