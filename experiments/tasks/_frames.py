"""Lays out frames to be looked at, and reads the videos that users give.

Shape legend: T time steps, B batch, I inputs, O outputs, R rows and C columns of a layout, H height
and W width of a frame.
"""

from __future__ import annotations

import argparse
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from experiments.fields import ConfigError
from experiments.tasks._npy import NPYError, read_npy, words

if TYPE_CHECKING:
    from experiments.models import SequenceModel

Colour = tuple[int, int, int]
Marks = tuple[Tensor, Colour]
"""Places ``[T, C, 2]``, row and column in pixels of a frame, and the colour of their crosses."""

_GREY, _ORANGE = (70, 70, 70), (255, 140, 0)
_GAP, _ARM = 2, 5


def tiled(frames_RCHW: Tensor, zoom: int, *, is_orange: bool = False) -> np.ndarray:
    """Lay out frames, 0 for black and 1 for white, with gaps around them.

    Args:
        frames_RCHW: in rows and columns.
        zoom: by how much they are enlarged.
        is_orange: the gaps are that, else grey.

    Returns:
        The picture, RGB, uint8.
    """
    rows, columns, height, width = (
        size * by for size, by in zip(frames_RCHW.shape, (1, 1, zoom, zoom), strict=True)
    )
    grey = (255 * frames_RCHW.clamp(0, 1)).round().byte().numpy()
    shape = rows, height + _GAP, columns, width + _GAP, 3
    padded = np.empty(shape, np.uint8)
    padded[:] = _ORANGE if is_orange else _GREY
    padded[:, :height, :, :width] = (
        grey.repeat(zoom, 2).repeat(zoom, 3).transpose(0, 2, 1, 3)[..., None]
    )
    picture = padded.reshape(rows * (height + _GAP), columns * (width + _GAP), 3)
    border = ((_GAP, 0), (_GAP, 0), (0, 0))
    return np.pad(picture, border, mode="wrap")  # the gaps at the far sides


def sheet(frames_RCHW: Tensor, zoom: int, orange: int) -> np.ndarray:
    """Lay out frames, a video in a row; the gap before one of the columns is orange."""
    picture = tiled(frames_RCHW, zoom)
    left = orange * (frames_RCHW.shape[3] * zoom + _GAP)
    picture[:, left : left + _GAP] = _ORANGE
    return picture


def film(
    frames_RTCHW: Tensor, zoom: int, orange: Container[int], marks: Iterable[Marks] = ()
) -> np.ndarray:
    """Lay out videos in rows and columns; gaps are orange at some steps.

    Args:
        frames_RTCHW: the videos.
        zoom: by how much they are enlarged.
        orange: the steps.
        marks: on the videos of the first row.

    Returns:
        The film, RGB, uint8, ``[T, height, width, 3]``.
    """
    marks = tuple(marks)
    pictures = []
    for step in range(frames_RTCHW.shape[1]):
        picture = tiled(frames_RTCHW[:, step], zoom, is_orange=step in orange)
        for places, colour in marks:
            for column, place in enumerate(places[step]):
                row, col = ((zoom * (place + 0.5)).round().int() + _GAP).tolist()
                col += column * (frames_RTCHW.shape[-1] * zoom + _GAP)
                for high, wide in ((_ARM, 1), (1, _ARM)):
                    top, left = max(row - high, 0), max(col - wide, 0)
                    picture[top : max(row + high, 0), left : max(col + wide, 0)] = colour
        pictures.append(picture)
    return np.stack(pictures)


@torch.no_grad()
def predicted(model: SequenceModel, x_TBI: Tensor) -> Tensor:
    """Return what a model says at every step ``[T, B, O]``, on the CPU, wherever the model is."""
    return model(_like(model, x_TBI)).float().cpu()


def streamed(model: SequenceModel, x_TBI: Tensor) -> Tensor:
    """Return the same; the model is shown one step at a time."""
    said, state = [], None
    for x_1BI in _like(model, x_TBI).split(1):
        prediction, state = model.stream(x_1BI, state)
        said.append(prediction)
    return torch.cat(said).float().cpu()


def _like(model: SequenceModel, x_TBI: Tensor) -> Tensor:
    parameter = next(model.parameters())
    return x_TBI.to(parameter.device, parameter.dtype)


def add_arguments(parser: argparse.ArgumentParser, *, needs_output: bool) -> None:
    """Add what the use of both tasks takes: a video that is given, and one that is written."""
    parser.add_argument(
        "--video",
        metavar="FILE.npy",
        type=Path,
        help="unsigned bytes [T, H, H], or [20, N, 64, 64] as Moving MNIST's, of which the first "
        "video is taken; without it: one that training did not show",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the video that is drawn without --video"
    )
    parser.add_argument(
        "--output",
        metavar="FILE.gif",
        type=Path,
        required=needs_output,
        help="where to write the video",
    )


def check_output(path: Path) -> None:
    """Raise :class:`ConfigError` unless a GIF can be written there."""
    if path.suffix.lower() != ".gif":
        raise ConfigError(f"--output must be a file whose name ends with .gif; got {path}")
    if not path.parent.is_dir():
        raise ConfigError(f"--output must lie in a folder that exists; got {path}")


def read_video(path: Path) -> Tensor:
    """Read the video that ``--video`` names: ``[T, H, H]``, from 0 to 1.

    Raises:
        ConfigError: it cannot be read, or has another shape.
    """
    try:
        frames = read_npy(path)
    except NPYError as error:
        raise ConfigError(f"--video: {error}") from error
    if frames.ndim == 4 and (frames.shape[0], *frames.shape[2:]) == (20, 64, 64):
        frames = frames[:, 0]
    if frames.ndim != 3 or frames.shape[1] != frames.shape[2]:
        raise ConfigError(
            f"--video: {path}: expected the shape [T, H, H] or [20, N, 64, 64], got "
            f"{words(frames.shape)}"
        )
    return torch.tensor(frames, dtype=torch.float32) / 255
