"""Continue a video of moving digits.

Shape legend: T time steps, B batch, L side of a frame in pixels, P = L * L pixels.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.fields import ConfigError, integer, optional, text
from experiments.looks import Animation, Look, Picture
from experiments.tasks._frames import (
    add_arguments,
    check_output,
    film,
    predicted,
    read_video,
    sheet,
    streamed,
)
from experiments.tasks._npy import NPYError, read_npy, words
from experiments.tasks._sprites import MovingSprites, SpriteConfig, digest, identity, shrunk
from experiments.tasks._task import MASKED_NUMBERS, Batch, Task, generator_of

if TYPE_CHECKING:
    from experiments.models import SequenceModel

_FILE_STEPS, _FILE_SIDE = 20, 64  # of Moving MNIST
_AHEAD = (1, 2, 5, 10, 20)
_SHOWN = 4


@dataclass(frozen=True)
class VideoConfig(SpriteConfig):
    """Options of ``task=video``.

    Attributes:
        file: Moving MNIST's ``.npy``; ``None`` for moving sprites.
        sprites: how many of them a video shows.
        given: how many frames the model sees.
    """

    file: str | None = optional(text("."))
    sprites: int = integer(1, at_least=1)
    given: int = integer(10, at_least=2)


class VideoTask(Task):
    """Say the next T frames of a video after some of its frames.

    The input is the frames that are given, then T black ones: the model does not see what it says
    (the unconditional decoder of Srivastava, Mansimov & Salakhutdinov 2015). At each of those T
    steps its prediction is the next frame; the steps before do not count. Digits move with constant
    velocity and bounce off the walls, as in Moving MNIST, whose own file ``config.file`` may name.
    """

    name = "video"
    Config = VideoConfig
    reads = "masked"
    answer = MASKED_NUMBERS
    minimum_horizon = 1

    def __init__(self, config: VideoConfig) -> None:
        super().__init__(config)
        if config.file is None:
            self.name = "synthetic_video"
            self._source = _Sprites(config)
        else:
            self._source = _MovingMnist(config)
            self.maximum_horizon = _FILE_STEPS - config.given
        self.input_size = self.output_size = config.side**2
        self._errors_of_mean: dict[tuple[int, bool], float] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """The settings, with a hash of the data for the places it came from."""
        return identity(self, self._source.digest)

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw input ``[given + T, B, P]``, and target, nan where it does not count."""
        return self._asked(self._videos(batch_size, horizon, generator, is_held_out=False))

    def test_set(self, horizon: int, generator: torch.Generator) -> Batch:
        """Return videos of digits that training never shows, or those of the file's last tenth."""
        size = self.config.test_size
        return self._asked(self._videos(size, horizon, generator, is_held_out=True))

    def _videos(
        self, count: int, horizon: int, generator: torch.Generator, *, is_held_out: bool
    ) -> Tensor:
        return self._source.videos(count, self.config.given + horizon, generator, is_held_out)

    def _asked(self, frames_TBP: Tensor) -> Batch:
        x_TBP, target_TBP = frames_TBP.clone(), frames_TBP.clone()
        x_TBP[self.config.given :] = 0
        target_TBP[: self.config.given] = torch.nan
        return x_TBP, target_TBP

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the error of always saying the mean frame."""
        return self._error_of_mean(horizon, is_held_out=False)

    def know_nothing_error(self, horizon: int) -> float:
        """Return the error, on held-out videos, of always saying the mean frame of training."""
        return self._error_of_mean(horizon, is_held_out=True)

    def _error_of_mean(self, horizon: int, *, is_held_out: bool) -> float:
        key = horizon, is_held_out
        if key not in self._errors_of_mean:
            generator = torch.Generator().manual_seed(0)
            seen, asked = (
                self._videos(count, horizon, generator, is_held_out=part)[self.config.given :]
                for count, part in ((1000, False), (self.config.test_size, is_held_out))
            )
            self._errors_of_mean[key] = (asked - seen.mean((0, 1))).square().mean().item()
        return self._errors_of_mean[key]

    def dependency(self, horizon: int) -> int:
        """Return the lag from the last but one frame that is given to the last that is asked.

        Two frames show what moves, where it is and how fast.
        """
        return horizon + 1

    def baselines(self, x_TBI: Tensor, target: Tensor, horizon: int) -> dict[str, float]:
        """Return the errors of the last frame, as it is and moved on as it moved before."""
        copied, moved = self._copied(x_TBI), self._moved(x_TBI)
        return {
            "copying the last frame": self.error(copied, target).item(),
            "constant velocity": self.error(moved, target).item(),
        }

    def _copied(self, x_TBI: Tensor) -> Tensor:
        return x_TBI[self.config.given - 1].expand_as(x_TBI)

    def _moved(self, x_TBI: Tensor) -> Tensor:
        """Return the last frame, shifted at each step by the pixels that led to it best."""
        given, limit = self.config.given, max(1, self.config.side // 8)
        frames = self._square(x_TBI)
        before, last = frames[given - 2 : given]
        shifts = [(y, x) for y in range(-limit, limit + 1) for x in range(-limit, limit + 1)]
        misfits = [(_shifted(before, *s) - last).square().sum((1, 2)) for s in shifts]
        best = torch.stack(misfits).argmin(0)
        answer = torch.zeros_like(frames)
        for index, (y, x) in enumerate(shifts):
            chosen = best == index
            for ahead in range(1, len(frames) - given + 1):
                answer[given + ahead - 1, chosen] = _shifted(last[chosen], ahead * y, ahead * x)
        return answer.flatten(-2)

    def measures(
        self, model: SequenceModel, x_TBI: Tensor, target: Tensor, horizon: int
    ) -> dict[str, float]:
        """Return the errors of single frames, beside those of copying the last one given."""
        answers = {"": model(x_TBI).float(), ", copying the last frame": self._copied(x_TBI)}
        steps = {ahead: self.config.given + ahead - 1 for ahead in _AHEAD if ahead <= horizon}
        return {
            f"MSE {ahead} ahead{of}": self.error(answer[step], target[step]).item()
            for ahead, step in steps.items()
            for of, answer in answers.items()
        }

    def looks(self, model: SequenceModel, horizon: int, generator: torch.Generator) -> list[Look]:
        """Return held-out videos, what the model says below the truth: moving, and as a sheet."""
        given = self.config.given
        frames_TBP = self._videos(_SHOWN, horizon, generator, is_held_out=True)
        said_TBP = predicted(model, self._asked(frames_TBP)[0])
        said_TBP[:given] = 0
        rows = self._square(torch.stack((frames_TBP, said_TBP)))
        of_each = rows.permute(2, 0, 1, 3, 4).flatten(0, 1)  # the truth, what is said; the next
        return [
            Animation(self.name, film(rows, 6, range(given, given + horizon))),
            Picture(f"{self.name}_sheet", sheet(of_each, 3, given)),
        ]

    def _square(self, frames: Tensor) -> Tensor:
        return frames.unflatten(-1, (self.config.side, self.config.side))

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of ``python -m experiments.use RUN``."""
        add_arguments(parser, needs_output=True)
        parser.add_argument("--frames", metavar="N", type=int, help="how many to add; T by default")

    def use(self, model: SequenceModel, arguments: argparse.Namespace, horizon: int) -> None:
        """Continue a video after its last frames, or a held-out one below what really follows."""
        given = self.config.given
        frames = horizon if arguments.frames is None else arguments.frames
        check_output(arguments.output)
        if frames < 1:
            raise ConfigError(f"--frames must be at least 1; got {frames}")
        if arguments.video is None:
            self.check_horizon("--frames", frames)
            generator = generator_of(arguments.seed)
            truth_TBP = self._videos(1, frames, generator, is_held_out=True)
            shown = [truth_TBP]
        else:
            video = read_video(arguments.video)
            if len(video) < given:
                raise ConfigError(
                    f"--video: {arguments.video}: expected at least the {given} frames that the "
                    f"model was trained to see, got {len(video)}"
                )
            truth_TBP = shrunk(video[-given:], self.config.side).flatten(1).unsqueeze(1)
            shown = []
        black = torch.zeros(frames, *truth_TBP.shape[1:])
        said_TBP = streamed(model, torch.cat((truth_TBP[:given], black)))
        said_TBP[:given] = truth_TBP[:given]
        rows = self._square(torch.stack([*shown, said_TBP]))
        Animation(self.name, film(rows, 6, range(given, given + frames))).save(arguments.output)
        print(f"{arguments.output}: {given} frames that were given, then {frames} predicted ones")


def _shifted(frames: Tensor, down: int, right: int) -> Tensor:
    """Return frames ``[B, L, L]`` with their content moved; what leaves is lost, the rest black."""
    side = frames.shape[-1]
    moved = torch.zeros_like(frames)
    if max(abs(down), abs(right)) < side:
        (to_y, from_y), (to_x, from_x) = (
            (slice(max(by, 0), side + min(by, 0)), slice(max(-by, 0), side - max(by, 0)))
            for by in (down, right)
        )
        moved[:, to_y, to_x] = frames[:, from_y, from_x]
    return moved


class _Sprites:
    """Videos of moving sprites, the brightest on top."""

    def __init__(self, config: VideoConfig) -> None:
        self._sprites = MovingSprites(config)
        self._count = config.sprites
        self.digest = self._sprites.digest

    def videos(
        self, count: int, steps: int, generator: torch.Generator, is_held_out: bool
    ) -> Tensor:
        """Draw ``[T, B, P]``."""
        frames, _ = self._sprites.draw(count, steps, generator, is_held_out)
        for _ in range(self._count - 1):
            other, _ = self._sprites.draw(count, steps, generator, is_held_out)
            frames = torch.maximum(frames, other)
        return frames.flatten(-2)


class _MovingMnist:
    """The videos of Moving MNIST's file, reduced to frames of ``config.side``."""

    def __init__(self, config: VideoConfig) -> None:
        if config.root is not None:
            raise ConfigError("task.root and task.file exclude one another; got both")
        if config.given >= _FILE_STEPS:
            raise ConfigError(
                f"task.given must be less than the {_FILE_STEPS} frames of a video of task.file; "
                f"got {config.given}"
            )
        try:
            self._frames_TNP = _read(Path(str(config.file)).expanduser(), config.side)
        except NPYError as error:
            raise ConfigError(f"task.file must be a file like Moving MNIST's: {error}") from error
        self.digest = digest(self._frames_TNP)
        count = self._frames_TNP.shape[1]
        self._first_held_out = count - max(1, count // 10)

    def videos(
        self, count: int, steps: int, generator: torch.Generator, is_held_out: bool
    ) -> Tensor:
        """Draw videos with replacement, ``[T, B, P]``; of the last tenth: each once, in order."""
        if is_held_out:
            chosen = self._frames_TNP[:steps, self._first_held_out :][:, :count]
        else:
            index = torch.randint(0, self._first_held_out, (count,), generator=generator)
            chosen = self._frames_TNP[:steps, index]
        return chosen.float() / 255


def _read(path: Path, side: int) -> Tensor:
    """Return the videos of a file ``[20, N, P]``, bytes: a quarter of the memory of floats."""
    frames = read_npy(path)
    count = frames.shape[1] if frames.ndim > 1 else 0
    if frames.shape != (_FILE_STEPS, count, _FILE_SIDE, _FILE_SIDE) or count < 2:
        raise NPYError(
            f"{path}: expected the shape [{_FILE_STEPS}, N, {_FILE_SIDE}, {_FILE_SIDE}] with N of "
            f"at least 2, got {words(frames.shape)}"
        )
    reduced = torch.empty(_FILE_STEPS, count, side * side, dtype=torch.uint8)
    for videos in torch.arange(count).split(200):
        piece = torch.tensor(frames[:, videos.numpy()], dtype=torch.float32)
        reduced[:, videos] = shrunk(piece, side).round().byte().flatten(-2)
    return reduced
