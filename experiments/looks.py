"""What a person looks at to judge a model: text, pictures, videos.

A task returns them (`experiments.tasks.Task.looks`); a run's folder holds those of several steps,
``looks/000500_samples.txt`` and the like; a report shows the last ones.

Shape legend: T frames, H height, W width.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

LOOKS = "looks"


@dataclass(frozen=True)
class Look(ABC):
    """Something to look at; ``name`` is the stem of its file."""

    name: str
    suffix: ClassVar[str]

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the file."""


@dataclass(frozen=True)
class Text(Look):
    """Lines of text."""

    text: str
    suffix = ".txt"

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text(self.text.rstrip("\n") + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Picture(Look):
    """Pixels, uint8, ``[H, W]`` or ``[H, W, 3]``."""

    pixels: np.ndarray
    suffix = ".png"

    def save(self, path: Path) -> None:
        """Write the file."""
        from PIL import Image

        Image.fromarray(self.pixels).save(path, optimize=True)


@dataclass(frozen=True)
class Animation(Look):
    """Frames, uint8, ``[T, H, W]`` or ``[T, H, W, 3]``, shown in a loop."""

    frames: np.ndarray
    milliseconds: int = 120
    suffix = ".gif"

    def save(self, path: Path) -> None:
        """Write the file."""
        from PIL import Image

        first, *others = (Image.fromarray(frame) for frame in self.frames)
        first.save(path, save_all=True, append_images=others, duration=self.milliseconds, loop=0)


@dataclass(frozen=True)
class Drawing(Look):
    """A figure of matplotlib, made without pyplot."""

    figure: Any
    suffix = ".svg"

    def save(self, path: Path) -> None:
        """Write the file."""
        from rnn_cuda.instruments import plots

        plots.save(self.figure, path.with_suffix(""), ["svg"])


def save_looks(looks: Iterable[Look], folder: Path, step: int) -> None:
    """Write what there is to look at after a training step into a run's folder.

    A file is there whole or not at all, whatever ends the process.
    """
    for look in looks:
        path = folder / LOOKS / f"{step:06d}_{look.name}{look.suffix}"
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        look.save(unfinished)
        os.replace(unfinished, path)


def saved_looks(folder: Path) -> Mapping[str, dict[int, Path]]:
    """Return the files of a run's folder: by name, then by step, in order."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted((folder / LOOKS).glob("*")):
        if match := re.fullmatch(r"(\d{6,})_(.+)\.(txt|png|gif|svg)", path.name):
            found.setdefault(match[2], {})[int(match[1])] = path
    return {name: dict(sorted(files.items())) for name, files in found.items()}
