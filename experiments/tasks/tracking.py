"""Follow a digit among others while it is hidden.

Shape legend: T time steps, B batch, L side of a frame in pixels, P = L * L pixels.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from experiments.fields import fraction, integer
from experiments.looks import Animation, Drawing, Look
from experiments.tasks._frames import (
    Colour,
    add_arguments,
    check_output,
    film,
    predicted,
    read_video,
    streamed,
)
from experiments.tasks._sprites import (
    MovingSprites,
    SpriteConfig,
    centre_of_mass,
    identity,
    reflected,
    shrunk,
)
from experiments.tasks._task import Answer, Batch, Task, generator_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.models import SequenceModel

_INTO = (1, 2, 5, 10, 20)
_SHOWN = 3
_GREEN, _PINK = (0, 190, 90), (255, 60, 160)


@dataclass(frozen=True)
class TrackingConfig(SpriteConfig):
    """Options of ``task=tracking``.

    Attributes:
        seen: frames before the occlusion.
        after: frames after it.
        distractors: other digits that move about.
        dimmed: their brightness over that of the target.
    """

    seen: int = integer(10, at_least=2)
    after: int = integer(5, at_least=0)
    distractors: int = integer(1, at_least=0)
    dimmed: float = fraction(0.5)


class TrackingTask(Task):
    """Say where a digit is in every frame of a video that hides it for T frames.

    The target is the brightest of the digits; all move with constant velocity and bounce off the
    walls. After ``config.seen`` frames the target is not drawn for T frames, the others are. The
    answer is its centre of mass, row and column from the middle of the frame, in halves of its
    side. Training is on every frame; the test error is the distance in pixels while it is hidden.
    """

    name = "tracking"
    Config = TrackingConfig
    output_size = 2
    reads = "every"
    is_shown_later = True  # the frames after the occlusion show where the target has gone
    minimum_horizon = 1

    def __init__(self, config: TrackingConfig) -> None:
        super().__init__(config)
        self.name = "synthetic_tracking"
        self.input_size = config.side**2
        self._sprites = MovingSprites(config)
        self.answer = Answer("pixel error", mse_loss, self._hidden_error, self._hidden_count)
        self._ignorance: dict[bool, tuple[float, float]] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """The settings, with a hash of the digits for the place they came from."""
        return identity(self, self._sprites.digest)

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw input ``[seen + T + after, B, P]`` and target ``[seen + T + after, B, 2]``."""
        return self._videos(batch_size, horizon, generator, is_held_out=False)

    def test_set(self, horizon: int, generator: torch.Generator) -> Batch:
        """Return the same of digits that training never shows."""
        return self._videos(self.config.test_size, horizon, generator, is_held_out=True)

    def _videos(
        self, count: int, horizon: int, generator: torch.Generator, *, is_held_out: bool
    ) -> Batch:
        config, draw = self.config, self._sprites.draw
        steps = config.seen + horizon + config.after
        frames, place_TB2 = draw(count, steps, generator, is_held_out)
        frames[self._hidden(frames)] = 0
        for _ in range(config.distractors):
            others, _ = draw(count, steps, generator, is_held_out)
            frames = torch.maximum(frames, config.dimmed * others)
        return frames.flatten(-2), self._in_halves(place_TB2)

    def _hidden(self, sequence: Tensor) -> slice:
        """Return at which steps of a sequence the target is hidden."""
        return slice(self.config.seen, len(sequence) - self.config.after)

    def _hidden_steps(self, sequence: Tensor) -> range:
        return range(len(sequence))[self._hidden(sequence)]

    def _in_halves(self, pixels: Tensor) -> Tensor:
        side = self.config.side
        return (pixels - (side - 1) / 2) / (side / 2)

    def _in_pixels(self, answer: Tensor) -> Tensor:
        return _pixels(answer, self.config.side)

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return how far apart answers are, in pixels."""
        return (prediction - target).norm(dim=-1) * (self.config.side / 2)

    def _hidden_error(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self._distance(prediction, target)[self._hidden(target)].mean()

    def _hidden_count(self, target: Tensor) -> Tensor:
        return torch.tensor(target[self._hidden(target), :, 0].numel())

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the error of always saying the mean place."""
        return self._error_of_mean(is_held_out=False)[0]

    def know_nothing_error(self, horizon: int) -> float:
        """Return the distance in pixels of held-out targets from the mean place in training."""
        return self._error_of_mean(is_held_out=True)[1]

    def _error_of_mean(self, *, is_held_out: bool) -> tuple[float, float]:
        """Return loss and distance; a place is as likely at every step, so one step is drawn."""
        if is_held_out not in self._ignorance:
            generator = torch.Generator().manual_seed(0)
            seen, asked = (
                self._in_halves(self._sprites.draw(20_000, 1, generator, part)[1])
                for part in (False, is_held_out)
            )
            mean = seen.mean((0, 1)).expand_as(asked)
            self._ignorance[is_held_out] = (
                mse_loss(mean, asked).item(),
                self._distance(mean, asked).mean().item(),
            )
        return self._ignorance[is_held_out]

    def dependency(self, horizon: int) -> int:
        """Return the lag from the last but one frame before the occlusion to its last.

        Two frames show where the target is and how fast.
        """
        return horizon + 1

    def baselines(self, x_TBI: Tensor, target: Tensor, horizon: int) -> dict[str, float]:
        """Return the errors of going on as from the last frame but one to the last before hiding.

        One starts from the true places. The others see what the model sees: the centre of mass of
        what is brighter than a distractor can be. One of them is told where the walls are.
        """
        lit = (x_TBI[: self.config.seen] - self.config.dimmed).clamp(min=0)
        detected = self._in_halves(centre_of_mass(self._square(lit)))
        wall = self._sprites.reach / self.config.side  # of the middle of a sprite, in halves
        answers = {
            "constant velocity": self._moved(detected, horizon).clamp(-wall, wall),
            "constant velocity from true places": self._moved(target, horizon).clamp(-wall, wall),
            "constant velocity and bounces": (
                reflected(self._moved(detected, horizon) + wall, 2 * wall) - wall
            ),
        }
        asked = target[self._hidden(target)]
        return {
            name: self._distance(answer, asked).mean().item() for name, answer in answers.items()
        }

    def _moved(self, places_TB2: Tensor, horizon: int) -> Tensor:
        before, last = places_TB2[self.config.seen - 2 : self.config.seen]
        ahead = torch.arange(1, horizon + 1, device=last.device).view(-1, 1, 1)
        return last + ahead * (last - before)

    def measures(
        self, model: SequenceModel, x_TBI: Tensor, target: Tensor, horizon: int
    ) -> dict[str, float]:
        """Return the pixel errors while the target is seen, into the occlusion, and after it."""
        distance_TB = self._distance(model(x_TBI).float(), target)
        hidden = self._hidden(target)
        parts = {
            "seen": distance_TB[: hidden.start],
            **{
                f"hidden for {into}": distance_TB[hidden.start + into - 1]
                for into in _INTO
                if into <= horizon
            },
            "after": distance_TB[hidden.stop :],
        }
        return {
            f"pixel error, {when}": part.mean().item() for when, part in parts.items() if len(part)
        }

    def _square(self, frames: Tensor) -> Tensor:
        return frames.unflatten(-1, (self.config.side, self.config.side))

    def looks(self, model: SequenceModel, horizon: int, generator: torch.Generator) -> list[Look]:
        """Return held-out videos with the true and the predicted path, drawn and moving."""
        x_TBI, target = self._videos(_SHOWN, horizon, generator, is_held_out=True)
        true, said = self._in_pixels(target), self._in_pixels(predicted(model, x_TBI))
        frames, hidden = self._square(x_TBI), self._hidden_steps(x_TBI)
        marks = (true, _GREEN), (said, _PINK)
        return [
            Animation(self.name, film(frames.unsqueeze(0), 8, hidden, marks)),
            Drawing(f"{self.name}_paths", _paths(self.name, frames, true, said, hidden)),
        ]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of ``python -m experiments.use RUN``."""
        add_arguments(parser, needs_output=False)

    def use(self, model: SequenceModel, arguments: argparse.Namespace, horizon: int) -> None:
        """Print where the target is in each frame of a video: frame, x and y in its pixels."""
        if arguments.output is not None:
            check_output(arguments.output)
        if arguments.video is None:
            generator = generator_of(arguments.seed)
            x_TBI, target = self._videos(1, horizon, generator, is_held_out=True)
            side, hidden = self.config.side, self._hidden_steps(x_TBI)
            marks = [(self._in_pixels(target), _GREEN)]
        else:
            video = read_video(arguments.video)
            x_TBI = shrunk(video, self.config.side).flatten(1).unsqueeze(1)
            side, hidden, marks = video.shape[-1], range(0), []
        answer_TB2 = streamed(model, x_TBI)
        for frame, (row, column) in enumerate(_pixels(answer_TB2[:, 0], side).tolist()):
            print(f"{frame} {column:.2f} {row:.2f}")
        if arguments.output is not None:
            marks.append((self._in_pixels(answer_TB2), _PINK))
            shown = film(self._square(x_TBI).unsqueeze(0), 8, hidden, marks)
            Animation(self.name, shown).save(arguments.output)


def _pixels(answer: Tensor, side: int) -> Tensor:
    """Return a place in pixels of a frame: 0 is the middle of the first."""
    return answer * (side / 2) + (side - 1) / 2


def _paths(
    name: str, frames_TBHW: Tensor, true_TB2: Tensor, said_TB2: Tensor, hidden: range
) -> Figure:
    """Draw a row per video: some of its frames, then the true and the predicted path.

    Where the target is hidden, paths are dashed.
    """
    from matplotlib.figure import Figure

    steps = {
        "first": 0,
        "last seen": hidden.start - 1,
        "hidden": (hidden.start + hidden.stop) // 2,
        "last hidden": hidden.stop - 1,
    }
    count, side = frames_TBHW.shape[1], frames_TBHW.shape[-1]
    height = 1.7 * count + 0.4
    figure = Figure(figsize=(8, height))
    # A layout that is solved for differs in its last bits from time to time.
    edges = {"left": 0.015, "right": 0.985, "bottom": 0.1 / height, "top": 1 - 0.55 / height}
    grid = figure.subplots(
        count, len(steps) + 1, squeeze=False, gridspec_kw={**edges, "wspace": 0.05, "hspace": 0.18}
    )
    figure.suptitle(
        f"{name}: green is true, pink is said, dashed is hidden",
        fontsize=9,
        y=1 - 0.1 / height,
        va="top",
    )
    for video, row in enumerate(grid):
        paths = [(true_TB2[:, video].numpy(), _GREEN), (said_TB2[:, video].numpy(), _PINK)]
        for axes, (what, step) in zip(row[:-1], steps.items(), strict=True):
            axes.imshow(frames_TBHW[step, video].numpy(), cmap="gray", vmin=0, vmax=1)
            for places, colour in paths:
                axes.plot(*places[step, ::-1], "+", color=_fraction(colour))
            axes.set_title(f"{what}, frame {step + 1}", fontsize=7)
        for places, colour in paths:
            for part, line in (
                (slice(0, hidden.start), "-"),
                (slice(hidden.start - 1, hidden.stop + 1), "--"),
                (slice(hidden.stop, None), "-"),
            ):
                row[-1].plot(
                    places[part, 1], places[part, 0], line, color=_fraction(colour), lw=1.2
                )
        row[-1].set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5), aspect="equal")
        for axes in row:
            axes.set(xticks=[], yticks=[])
    return figure


def _fraction(colour: Colour) -> tuple[float, ...]:
    return tuple(part / 255 for part in colour)
