"""Transcribe spoken digits.

Shape legend: T time steps, B batch, I inputs, O outputs, L digits of a string, K frames, M mel
bands.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import ctc_loss

from experiments.fields import Config, ConfigError, choice, integer, number, optional, seed, text
from experiments.tasks import _spoken
from experiments.tasks._mel import MelBands, log_power_
from experiments.tasks._spoken import WORDS, Clip, SpokenError
from experiments.tasks._task import UNSCORED, Answer, Batch, Task
from experiments.tasks._wav import RATE, WavError

_BLANK = 0
"""The class of no digit; that of digit d is d + 1."""
_TAIL = 4
"""Steps after a string that is transcribed along: the last digit may be named so late."""
_ANSWER = 3
"""Steps for each digit of a string that is transcribed after it."""
_GAIN = 10.0
"""Strings are louder or softer by up to so many decibels."""
_NOISE_RANGE = 40.0
"""The weakest noise is so many decibels below the loudest."""
_NOISE_SECONDS = 40
_BASELINE_STEPS = 300


@dataclass(frozen=True)
class SpeechConfig(Config):
    """Options of ``task=speech``."""

    root: str | None = optional(text("data/speech_commands"))
    voice: str = choice("auto", ("auto", "espeak", "formants"))
    answer: str = choice("along", ("along", "after"))
    mels: int = integer(20, at_least=4, at_most=80)
    stack: int = integer(3, at_least=1, at_most=10)
    noise: float = number(0.1, at_least=0, at_most=1)
    test_size: int = integer(480, at_least=1)
    data_seed: int = seed(0)


class _Clips:
    """Clips as powers in mel bands, one after the other, where a batch can gather them.

    Attributes:
        powers: ``[frames, M]``; the first frame is silence.
        offset, frames: of each clip.
        first, count: which clips a speaker has of a digit, ``[speakers, 10]``.
    """

    def __init__(self, clips: list[Clip], bands: MelBands, shortest: int, digest: Any) -> None:
        self.clips = sorted(clips, key=lambda clip: (clip.speaker, clip.digit))
        self.speakers = sorted({clip.speaker for clip in clips})
        powers = [np.zeros((1, bands.bands), np.float32)]
        for clip in self.clips:
            samples = clip.load()
            digest.update(f"{clip.speaker} {clip.digit} {len(samples)} ".encode())
            digest.update(samples)
            of_clip = bands.of_clip(_spoken.levelled(samples))
            powers.append(np.pad(of_clip, ((0, max(0, shortest - len(of_clip))), (0, 0))))
        self.powers = torch.from_numpy(np.concatenate(powers))
        self.frames = torch.tensor([len(each) for each in powers[1:]])
        self.offset = 1 + self.frames.cumsum(0) - self.frames
        self.count = torch.zeros(len(self.speakers), len(WORDS), dtype=torch.long)
        number_of = {speaker: i for i, speaker in enumerate(self.speakers)}
        for clip in self.clips:
            self.count[number_of[clip.speaker], clip.digit] += 1
        self.first = (self.count.flatten().cumsum(0) - self.count.flatten()).view_as(self.count)

    def draw(
        self, speaker: Tensor, length: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw digits and clips of them ``[L, B]`` for speakers ``[B]``: any digit that they say."""
        said = (self.count > 0).double()[speaker]
        digit = torch.multinomial(said, length, replacement=True, generator=generator).T
        takes = self.count[speaker, digit]
        share = torch.rand(takes.shape, generator=generator, dtype=torch.float64)
        return digit, self.first[speaker, digit] + (share * takes).long()


class SpeechTask(Task):
    """Transcribe a string of T spoken digits, each string by one speaker.

    Digits are drawn with equal chances and stand in silence of random lengths. A step shows
    ``stack`` frames of a log mel spectrogram (``mels`` bands, 25 ms every 10 ms), normalised by
    statistics of the training data. Strings differ in loudness, and in the white noise that is
    added: ``noise`` is the largest deviation, relative to speech. The model is trained by
    connectionist temporal classification (Graves et al. 2006): ten digits and a blank, and any
    alignment will do. The greedy transcript is judged: at each step the likeliest class, repeats
    and blanks left out; its edit distance to the digits, over their number.

    ``answer=along``: digits may be named as they are heard, so that the dependency is a word.
    ``after``: only in silence after the whole string, so that all of it is to be remembered.

    Sounds are those of ``root``, a Speech Commands tree. Without one, the instance's name begins
    with ``synthetic_`` and ``voice`` speaks: espeak-ng, a formant synthesiser, or (``auto``) the
    first if it is installed. No voice of the test set is heard in training.

    A target ``[T, B]`` holds a digit's class at the step where its word ends (with ``after``, at
    steps of the answer); what counts is their order.
    """

    name = "speech"
    Config = SpeechConfig
    output_size = 1 + len(WORDS)
    reads = "masked"
    minimum_horizon = 1

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__(config)
        self.answer = Answer("character error rate", self._loss, self._error)
        self.input_size = config.mels * config.stack
        self._bands = MelBands(config.mels)
        digest = hashlib.sha256()
        try:
            spoken = self._spoken()
            self._train, self._test = (
                _Clips(clips, self._bands, config.stack, digest)
                for clips in (spoken.train, spoken.test)
            )
        except (SpokenError, WavError) as error:
            raise ConfigError(self._fault(error)) from error
        self._digest = digest.hexdigest()
        self.source = spoken.source
        if config.root is None:
            self.name = f"synthetic_{self.name}"
        longest = int(max(self._train.frames.max(), self._test.frames.max()))
        self._slot = -(-longest // config.stack)
        generator = torch.Generator().manual_seed(config.data_seed)
        noise = torch.randn(_NOISE_SECONDS * RATE, generator=generator).numpy()
        self._noise = torch.from_numpy(self._bands.powers(noise))
        self._mean, self._deviation = torch.zeros(config.mels), torch.ones(config.mels)
        shown = self.sample(256, 2, generator)[0].unflatten(-1, (config.stack, config.mels))
        self._mean = shown.mean((0, 1, 2))
        self._deviation = shown.std((0, 1, 2))
        self._linear: dict[int, nn.Linear] = {}

    def _spoken(self) -> _spoken.Spoken:
        config = self.config
        if config.root is not None:
            return _spoken.recorded(Path(config.root).expanduser())
        has_espeak = _spoken.has_espeak()
        if config.voice == "espeak" and not has_espeak:
            raise SpokenError("espeak-ng is not installed")
        is_espeak = has_espeak and config.voice != "formants"
        return (_spoken.by_espeak if is_espeak else _spoken.by_formants)(config.data_seed)

    def _fault(self, error: Exception) -> str:
        if self.config.root is None:
            return f"task.voice={self.config.voice} (formants needs no program): {error}"
        return (
            "task.root must be the folder of a Speech Commands tree (zero/SPEAKER_nohash_0.wav "
            f"and so on; nothing is downloaded): {error}"
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The settings, with a hash of the sounds for where they came from."""
        settings = {k: v for k, v in self.settings.items() if k not in ("root", "voice")}
        return {**settings, "data": self._digest}

    def steps(self, horizon: int) -> int:
        """Return the length of an input: room for the longest words, and for the answer."""
        return horizon * self._slot + (
            _TAIL if self.config.answer == "along" else _ANSWER * horizon
        )

    def dependency(self, horizon: int) -> int:
        """Return the lag of a word's beginning: with ``after``, of the first word's at the end."""
        return self._slot if self.config.answer == "along" else self.steps(horizon) - 1

    # Data

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw strings by training voices: input ``[T, B, I]``, target ``[T, B]``."""
        speaker = torch.randint(0, len(self._train.speakers), (batch_size,), generator=generator)
        return self._batch(self._train, speaker, horizon, generator)

    def test_set(self, horizon: int, generator: torch.Generator) -> Batch:
        """Draw strings by held-out voices, by each in turn."""
        speaker = torch.arange(self.config.test_size) % len(self._test.speakers)
        return self._batch(self._test, speaker, horizon, generator)

    def _batch(
        self, clips: _Clips, speaker: Tensor, horizon: int, generator: torch.Generator
    ) -> Batch:
        stack, size = self.config.stack, len(speaker)
        is_along = self.config.answer == "along"
        digit_LB, clip_LB = clips.draw(speaker, horizon, generator)
        frames_LB = clips.frames[clip_LB]
        # Silence before each word, and after the last one where the answer need not wait for it.
        room_B = horizon * self._slot * stack - frames_LB.sum(0)
        cuts_LB = torch.rand(horizon, size, generator=generator).sort(0).values
        if not is_along:
            cuts_LB[-1] = 1
        begins_LB = (cuts_LB * room_B).long() + frames_LB.cumsum(0) - frames_LB
        # In the order of the input: frame s of step t of string b, as [T, B, stack].
        frame = torch.arange(self.steps(horizon) * stack).view(-1, 1, stack)
        rows = torch.zeros(self.steps(horizon), size, stack, dtype=torch.long)
        for word in zip(begins_LB, frames_LB, clips.offset[clip_LB], strict=True):
            begin, frames, offset = (each.view(1, -1, 1) for each in word)
            at = frame - begin
            rows = torch.where((at >= 0) & (at < frames), offset + at, rows)
        start = torch.randint(0, len(self._noise), (1, size, 1), generator=generator)
        noise_rows = (start + frame) % len(self._noise)

        def decibels(low: float, high: float) -> Tensor:
            drawn = torch.rand(1, size, 1, 1, generator=generator) * (high - low) + low
            return 10 ** (drawn / 10)

        level = (self.config.noise * _spoken.LOUDNESS) ** 2 * decibels(-_NOISE_RANGE, 0)
        powers = _gathered(self._noise, noise_rows).mul_(level)
        powers.add_(_gathered(clips.powers, rows)).mul_(decibels(-_GAIN, _GAIN))
        if is_along:
            step_LB = (begins_LB + frames_LB - 1) // stack
        else:
            step_LB = horizon * self._slot + _ANSWER * torch.arange(horizon).unsqueeze(1) + 1
            step_LB = step_LB.expand_as(digit_LB)
        target_TB = torch.full((self.steps(horizon), size), UNSCORED)
        return self._as_input(powers), target_TB.scatter_(0, step_LB, digit_LB + 1)

    def _as_input(self, powers: Tensor) -> Tensor:
        """Return ``[T, B, I]`` of powers ``[T, B, stack, M]``, which are overwritten."""
        return log_power_(powers).sub_(self._mean).div_(self._deviation).flatten(2)

    # Judgement

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the entropy of a digit, per digit: steps that ignore the input are independent."""
        shares = _shares(self._train)
        return -sum(share * math.log(share) for share in shares if share > 0)

    def know_nothing_error(self, horizon: int) -> float:
        """Return the error of the best constant transcript, on many strings.

        It names different digits, the most frequent ones first, and may be shorter than T.
        """
        generator = torch.Generator().manual_seed(0)
        speaker = torch.arange(20_000) % len(self._test.speakers)
        digit_LB, _ = self._test.draw(speaker, horizon, generator)
        order = torch.tensor(_shares(self._test)).argsort(descending=True, stable=True)
        constant_L1 = order.repeat(-(-horizon // len(order)))[:horizon].unsqueeze(1)
        lengths = torch.full((20_000,), horizon)
        return min(
            edit_distances(
                constant_L1.expand(-1, 20_000), torch.full((20_000,), length), digit_LB, lengths
            ).double().mean().item()
            / horizon
            for length in range(horizon + 1)
        )  # fmt: skip

    def _answering(self, steps_TB: Tensor) -> Tensor:
        """Return the steps at which a transcript may be written."""
        if self.config.answer == "along":
            return steps_TB
        return steps_TB[len(steps_TB) * self._slot // (self._slot + _ANSWER) :]

    def _loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the CTC loss per digit."""
        log_probabilities = self._answering(prediction).log_softmax(-1)
        steps, size, _ = log_probabilities.shape
        spoken_BT = (target != UNSCORED).T
        lengths = spoken_BT.sum(1)
        digits = target.T[spoken_BT]
        total = ctc_loss(
            log_probabilities, digits, torch.full((size,), steps), lengths, reduction="sum"
        )
        return total / len(digits)

    def _error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the edit distance of the greedy transcript, per digit."""
        return self._distances(prediction, target).double().sum() / self.scored(target)

    def _distances(self, prediction: Tensor, target: Tensor) -> Tensor:
        heard = pack(*self.peaks(prediction))
        spoken = pack(target, target != UNSCORED)
        return edit_distances(*heard, *spoken)

    def peaks(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Return the likeliest classes ``[T, B]``, and at which steps each is a new digit."""
        best = self._answering(prediction).argmax(-1)
        before = torch.cat((torch.full_like(best[:1], _BLANK), best[:-1]))
        return best, (best != _BLANK) & (best != before)

    def baselines(self, x_TBI: Tensor, target: Tensor, horizon: int) -> dict[str, float]:
        """A linear classifier of single steps, trained by the same loss on training voices."""
        if self.config.answer == "after":
            return {}
        if horizon not in self._linear:
            self._linear[horizon] = self._trained_linear(horizon)
        with torch.no_grad():
            prediction = self._linear[horizon](x_TBI.float().cpu())
        return {"a step at a time": self._error(prediction, target.cpu()).item()}

    def _trained_linear(self, horizon: int) -> nn.Linear:
        generator = torch.Generator().manual_seed(self.config.data_seed)
        linear = nn.Linear(self.input_size, self.output_size)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        optimizer = torch.optim.Adam(linear.parameters(), lr=0.03)
        x_TBI, target = self.sample(8 * 64, horizon, generator)
        batches = list(zip(x_TBI.split(64, 1), target.split(64, 1), strict=True))
        for step in range(_BASELINE_STEPS):
            optimizer.zero_grad()
            x, y = batches[step % len(batches)]
            self._loss(linear(x), y).backward()
            optimizer.step()
        return linear


def _gathered(rows: Tensor, numbers: Tensor) -> Tensor:
    """Return some of the rows ``[rows, M]``, as ``[*numbers.shape, M]``."""
    return rows.index_select(0, numbers.flatten()).view(*numbers.shape, -1)


def _shares(clips: _Clips) -> list[float]:
    """Return the share of each digit in strings."""
    said = (clips.count > 0).double()
    return (said / said.sum(1, keepdim=True)).mean(0).tolist()


def pack(classes_TB: Tensor, is_kept_TB: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is kept, moved up: ``[L, B]`` for the largest number L, and the numbers ``[B]``."""
    numbers = is_kept_TB.sum(0)
    order = (~is_kept_TB).byte().argsort(stable=True, dim=0)
    return classes_TB.gather(0, order)[: int(numbers.max())], numbers


def edit_distances(one_LB: Tensor, ones: Tensor, other_MB: Tensor, others: Tensor) -> Tensor:
    """Return the edit distance (Levenshtein 1966) of each pair of strings, ``[B]``.

    Args:
        one_LB, other_MB: the strings; what stands after their lengths does not count.
        ones, others: their lengths, ``[B]``.
    """
    columns = [torch.arange(len(other_MB) + 1).unsqueeze(1).expand(-1, len(ones))]
    columns[0] = columns[0].to(ones.device)
    for i, symbol_B in enumerate(one_LB):
        before = columns[-1]
        column = [torch.full_like(ones, i + 1)]
        changed_MB = before[:-1] + (other_MB != symbol_B)
        for j in range(len(other_MB)):
            column.append(torch.minimum(changed_MB[j], torch.minimum(before[j + 1], column[j]) + 1))
        columns.append(torch.stack(column))
    return torch.stack(columns)[ones, others, torch.arange(len(ones), device=ones.device)]
