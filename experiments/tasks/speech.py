"""Transcribe spoken digits.

Shape legend: T time steps, B batch, I inputs, O outputs, L digits of a string, M mel bands.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from experiments.fields import Config, ConfigError, choice, integer, number, optional, seed, text
from experiments.looks import Drawing, Look, Text
from experiments.tasks import _spoken
from experiments.tasks._clips import Clips, gathered
from experiments.tasks._edit_distance import edit_distances, error_marks, error_rate
from experiments.tasks._mel import HOP, PAD, MelBands, log_power_
from experiments.tasks._spoken import WORDS, SpokenError
from experiments.tasks._task import UNSCORED, Answer, Batch, Task
from experiments.tasks._templates import Templates
from experiments.tasks._transcript_figure import transcripts_under_spectrograms
from experiments.tasks._transcripts import (
    BLANK,
    constant_error,
    marks,
    peaks,
    texts,
    transcript_loss,
)
from experiments.tasks._wav import RATE, WavError, read_wav, wav_bytes

if TYPE_CHECKING:  # models know tasks
    from experiments.models import SequenceModel

TAIL = 4
"""Steps after a string that is transcribed along: its last digit may come so late."""
ANSWER = 3
"""Steps for each digit of a string that is transcribed after it."""
GAIN = 10.0
"""Strings are louder or softer by up to so many decibels."""
NOISE_RANGE = 40.0
"""The weakest noise is so many decibels below the loudest."""
NOISE_SECONDS = 40
TEMPLATES = 4
"""Clips of each digit that the baseline compares with."""
SHOWN, WRITTEN = 2, 20
"""Strings of the looks: drawn, and written."""


@dataclass(frozen=True)
class SpeechConfig(Config):
    """Options of ``task=speech``."""

    root: str | None = optional(text("data/speech_commands"))
    voice: str = choice("auto", ("auto", "espeak", "formants"))
    answer: str = choice("along", ("along", "after"))
    mels: int = integer(20, at_least=4, at_most=80)
    stack: int = integer(4, at_least=1, at_most=10)
    noise: float = number(0.1, at_least=0, at_most=1)
    test_size: int = integer(480, at_least=1)
    data_seed: int = seed(0)


class SpeechTask(Task):
    """Transcribe a string of T spoken digits, each string by one speaker.

    Digits are drawn with equal chances and stand in silence of random lengths. A step shows
    ``stack`` frames of a log mel spectrogram (``mels`` bands, 25 ms every 10 ms), normalised by
    statistics of the training data. Strings differ in loudness, and in the white noise that is
    added: ``noise`` is its largest deviation, relative to speech. A model is trained by
    connectionist temporal classification: ten digits and a blank, and any alignment will do. Its
    greedy transcript is judged: the edit distance to the digits, over their number.

    ``answer=along``: digits may be named as they are heard, so that the dependency is a word.
    ``after``: only in silence after the whole string, so that all of it has to be remembered;
    ``_after`` is added to the instance's name.

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
                Clips(clips, self._bands, config.stack, digest)
                for clips in (spoken.train, spoken.test)
            )
        except (SpokenError, WavError) as error:
            raise ConfigError(self._fault(error)) from error
        self._digest = digest.hexdigest()
        self._source = spoken.source
        if config.root is None:
            self.name = f"synthetic_{self.name}"
        if not self._is_along:
            self.name = f"{self.name}_after"
        longest = max(int(clips.frames.max()) for clips in (self._train, self._test))
        self._slot = math.ceil(longest / config.stack)
        generator = torch.Generator().manual_seed(config.data_seed)
        noise = torch.randn(NOISE_SECONDS * RATE, generator=generator)
        self._noise = torch.from_numpy(self._bands.powers(noise.numpy()))
        self._mean, self._deviation = torch.zeros(config.mels), torch.ones(config.mels)
        x_TBI, _ = self.sample(256, 2, generator)
        shown = x_TBI.unflatten(-1, (config.stack, config.mels))
        self._mean, self._deviation = shown.mean((0, 1, 2)), shown.std((0, 1, 2))

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

    @property
    def _is_along(self) -> bool:
        return self.config.answer == "along"

    def _steps(self, horizon: int) -> int:
        """Return T: room for the longest words, and for the answer."""
        return horizon * self._slot + (TAIL if self._is_along else ANSWER * horizon)

    @classmethod
    def has_loss_at_first_step(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether strings are transcribed along: any alignment will do."""
        return settings.get("answer", "along") == "along"

    def dependency(self, horizon: int) -> int:
        """Return the lag of a word's beginning; with ``after``, of the first word's at the end."""
        return self._slot if self._is_along else self._steps(horizon) - 1

    # Data

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw strings by training voices: input ``[T, B, I]``, target ``[T, B]``."""
        speaker = torch.randint(0, len(self._train.speakers), (batch_size,), generator=generator)
        return self._strings(self._train, speaker, horizon, generator)

    def test_set(self, horizon: int, generator: torch.Generator) -> Batch:
        """Draw strings by held-out voices, by each in turn."""
        return self._strings(self._test, self._turns(self.config.test_size), horizon, generator)

    def _turns(self, size: int) -> Tensor:
        return torch.arange(size) % len(self._test.speakers)

    def _strings(
        self, clips: Clips, speaker: Tensor, horizon: int, generator: torch.Generator
    ) -> Batch:
        stack, size, steps = self.config.stack, len(speaker), self._steps(horizon)
        digit_LB, clip_LB = clips.draw(speaker, horizon, generator)
        frames_LB = clips.frames[clip_LB]
        # Silence before each word, and after the last one where the answer need not wait for it.
        room_B = horizon * self._slot * stack - frames_LB.sum(0)
        cut_LB = torch.rand(horizon, size, generator=generator).sort(0).values
        if not self._is_along:
            cut_LB[-1] = 1
        begin_LB = (cut_LB * room_B).long() + frames_LB.cumsum(0) - frames_LB

        def power_ratio(low: float, high: float) -> Tensor:
            decibels = torch.rand(1, size, 1, 1, generator=generator) * (high - low) + low
            return 10 ** (decibels / 10)

        loudest = (self.config.noise * _spoken.LOUDNESS) ** 2
        powers = self._noises(size, steps, generator).mul_(loudest * power_ratio(-NOISE_RANGE, 0))
        powers.add_(clips.strings(clip_LB, begin_LB, steps)).mul_(power_ratio(-GAIN, GAIN))
        if self._is_along:
            step_LB = (begin_LB + frames_LB - 1) // stack
        else:
            step_LB = horizon * self._slot + ANSWER * torch.arange(horizon).unsqueeze(1) + 1
        target_TB = torch.full((steps, size), UNSCORED)
        target_TB.scatter_(0, step_LB.expand_as(digit_LB), digit_LB + 1)
        return self._features(powers), target_TB

    def _noises(self, size: int, steps: int, generator: torch.Generator) -> Tensor:
        """Return powers of white noise of variance 1, ``[T, B, stack, M]``."""
        start = torch.randint(0, len(self._noise), (1, size, 1), generator=generator)
        frame = torch.arange(steps * self.config.stack).view(-1, 1, self.config.stack)
        return gathered(self._noise, (start + frame) % len(self._noise))

    def _features(self, powers: Tensor) -> Tensor:
        """Return ``[T, B, I]`` of powers ``[T, B, stack, M]``, which are overwritten."""
        return log_power_(powers).sub_(self._mean).div_(self._deviation).flatten(2)

    # Judgement

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the entropy of a digit: steps that ignore the input are independent."""
        return -sum(share * math.log(share) for share in self._train.shares if share > 0)

    def know_nothing_error(self, horizon: int) -> float:
        """Return the error of the best transcript that is always the same."""
        return constant_error(self._test.shares, horizon)

    def _answering(self, prediction: Tensor) -> Tensor:
        """Return the steps at which a transcript may be written."""
        if self._is_along:
            return prediction
        return prediction[len(prediction) * self._slot // (self._slot + ANSWER) :]

    def _loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return transcript_loss(self._answering(prediction), target)

    def _error(self, prediction: Tensor, target: Tensor) -> Tensor:
        heard = texts(peaks(self._answering(prediction)))
        return torch.tensor(error_rate(heard, texts(marks(target))), dtype=torch.float64)

    def baselines(self, x_TBI: Tensor, target: Tensor, horizon: int) -> dict[str, float]:
        """Compare with clips of training voices, by dynamic time warping."""
        generator = torch.Generator().manual_seed(self.config.data_seed)
        quiet = (self.config.noise * _spoken.LOUDNESS) ** 2 * 10 ** (-NOISE_RANGE / 20)

        def features(powers: Tensor) -> Tensor:
            """Return ``[T, I]`` of frames ``[frames, M]``, in the middle of the range of noise."""
            steps = len(powers) // self.config.stack
            stacked = powers[: steps * self.config.stack].unflatten(0, (steps, 1, -1))
            return self._features(stacked + quiet * self._noises(1, steps, generator))[:, 0]

        words = []
        for digit in range(len(WORDS)):
            of_digit = [i for i, clip in enumerate(self._train.clips) if clip.digit == digit]
            few = np.linspace(0, len(of_digit) - 1, min(TEMPLATES, len(of_digit))).round()
            words += [(str(digit), features(self._train.powers(of_digit[int(i)]))) for i in few]
        silence = features(torch.zeros(100 * self.config.stack, self.config.mels))
        templates = Templates(words, silence.mean(0, keepdim=True))
        heard = templates.transcribe(x_TBI.float().cpu())
        return {"template matching": error_rate(heard, texts(marks(target)))}

    def measures(
        self, model: SequenceModel, x_TBI: Tensor, target: Tensor, horizon: int
    ) -> dict[str, float]:
        """Return what of whole strings is right, the worst voice, and how late digits are named."""
        heard, said = peaks(self._answering(model(x_TBI))), marks(target)
        distances = edit_distances(texts(heard), texts(said)).double()
        turns = self._turns(len(distances))
        by_voice = [distances[turns == voice].mean().item() for voice in turns.unique()]
        found = {
            "strings right": (distances == 0).double().mean().item(),
            "character error rate, worst voice": max(by_voice) / horizon,
        }
        late = [
            (named - ended) * self._step_seconds
            for strings, distance in zip(zip(heard, said, strict=True), distances, strict=True)
            if distance == 0
            for (named, _), (ended, _) in zip(*strings, strict=True)
        ]
        if self._is_along and late:
            found["seconds from a word's end to its digit"] = sum(late) / len(late)
        return found

    @property
    def _step_seconds(self) -> float:
        return self.config.stack * HOP / RATE

    # Looks

    @property
    def _title(self) -> str:
        kind = f"synthetic speech ({self._source})" if self.config.root is None else "speech"
        return (
            f"{kind}, held-out voices{'' if self._is_along else ', transcribed after the string'}"
        )

    @torch.no_grad()
    def looks(self, model: SequenceModel, horizon: int, generator: torch.Generator) -> list[Look]:
        """Show transcripts of held-out strings, a few of them under their spectrograms."""
        x_TBI, target = self._strings(self._test, self._turns(WRITTEN), horizon, generator)
        prediction = model(x_TBI.to(model.readout.weight)).float().cpu()
        heard, said = peaks(self._answering(prediction)), marks(target)
        lines = [self._title, "said -> heard; ^ marks what is wrong"]
        for right, written in zip(texts(said), texts(heard), strict=True):
            lines.append(f"{right} -> {written}")
            if wrong := error_marks(written, right):
                lines.append(" " * len(f"{right} -> ") + wrong)
        first = len(x_TBI) - len(self._answering(x_TBI))
        frames = x_TBI[:, :SHOWN].unflatten(-1, (self.config.stack, self.config.mels))
        figure = transcripts_under_spectrograms(
            frames.permute(1, 3, 0, 2).flatten(2).numpy(),
            prediction[:, :SHOWN].softmax(-1).transpose(0, 1).numpy(),
            [[(step, WORDS[digit]) for step, digit in each] for each in said],
            [[(first + step, str(digit)) for step, digit in each] for each in heard],
            step_seconds=self._step_seconds,
            title=self._title,
        )
        return [Drawing("spectrograms", figure), Text("transcripts", "\n".join(lines))]

    # Use

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add what to transcribe, and in which pieces it comes."""
        parser.add_argument("--wav", type=Path, required=True, metavar="FILE", help="to transcribe")
        parser.add_argument(
            "--say", metavar="DIGITS", help="first write FILE: these, said by a held-out voice"
        )
        parser.add_argument(
            "--chunk", type=float, default=0.1, help="seconds of sound that come at a time (0.1)"
        )

    def use(self, model: SequenceModel, arguments: argparse.Namespace, horizon: int) -> None:
        """Print the digits of a WAV file as they are recognised, piece by piece."""
        if model.core.bidirectional:
            raise ConfigError("RUN must have model.bidirectional=false to listen; got true")
        if not 1 / RATE <= arguments.chunk < math.inf:
            raise ConfigError(
                f"--chunk must be a finite number of at least {1 / RATE:g} s; got {arguments.chunk}"
            )
        if arguments.say is not None:
            self._say(arguments.say, arguments.wav)
        try:
            samples = read_wav(arguments.wav)
        except WavError as error:
            raise ConfigError(f"--wav: {error}") from error
        start = time.perf_counter()
        heard = []
        for second, digit in self.listen(model, samples, round(arguments.chunk * RATE), horizon):
            heard.append(str(digit))
            print(f"{second:6.2f} s  {WORDS[digit]}", flush=True)
        spent = time.perf_counter() - start
        print(f"{arguments.wav}: {''.join(heard) or 'no digit'}")
        length = len(samples) / RATE
        print(f"{length:.2f} s of sound in {spent:.2f} s", file=sys.stderr)

    def listen(
        self, model: SequenceModel, samples: np.ndarray, chunk: int, horizon: int
    ) -> Iterator[tuple[float, int]]:
        """Yield digits, each with the second at which it is recognised.

        Args:
            model: it.
            samples: of the sound; silence is added for the answer.
            chunk: how many of them come at a time.
            horizon: the digits that a model answers with after a sound.
        """
        stack = self.config.stack
        sound = math.ceil((PAD + len(samples)) / (stack * HOP))
        steps = sound + (TAIL if self._is_along else ANSWER * horizon)
        whole = np.zeros(PAD + steps * stack * HOP, np.float32)
        whole[PAD : PAD + len(samples)] = samples
        pieces = (whole[at : at + chunk] for at in range(0, len(whole), chunk))
        state, before, step = None, BLANK, 0
        for powers in self._bands.stream(pieces, stack):
            if len(powers) == 0:
                continue
            x_TBI = self._features(torch.from_numpy(powers).unflatten(0, (-1, 1, stack)))
            prediction, state = model.stream(x_TBI.to(model.readout.weight), state)
            for best in prediction[:, 0].argmax(-1).tolist():
                step += 1
                if not self._is_along and step <= sound:
                    continue
                if best not in (BLANK, before):
                    yield step * self._step_seconds, best - 1
                before = best

    def _say(self, digits: str, path: Path) -> None:
        """Write a WAV file, of the first held-out voice that says these digits."""
        if not digits or not set(digits) <= set("0123456789"):
            raise ConfigError(f"--say must be digits such as 314; got {digits!r}")
        if path.exists():
            raise ConfigError(f"--wav must be a new file, with --say; {path} is there")
        for speaker in self._test.speakers:
            clips = {c.digit: c for c in self._test.clips if c.speaker == speaker}
            if {int(digit) for digit in digits} <= clips.keys():
                break
        else:
            raise ConfigError(f"--say: no held-out voice has said all of {digits}")
        pause = np.zeros(RATE // 5, np.float32)
        sounds = [part for d in digits for part in (pause, _spoken.levelled(clips[int(d)].load()))]
        path.write_bytes(wav_bytes(np.concatenate([*sounds, pause])))
