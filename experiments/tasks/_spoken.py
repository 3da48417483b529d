"""Spoken digits: recorded ones in a Speech Commands tree, or ones that a program says.

Speakers of the test set are never heard in training.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from experiments.tasks import _formants
from experiments.tasks._wav import RATE, WavError, parse_wav, read_wav, wav_bytes

WORDS = tuple(_formants.WORDS)
"""The digits in order; names of folders, too."""

LOUDNESS = 0.08
"""Root mean square of a clip, where 1 is the largest sample."""

TRAINING_VOICES, TEST_VOICES = 48, 12
_HELD_OUT = 0.2
_FILE_NAME = re.compile(r"(.+)_nohash_.+")
_TESTED, _LEFT_OUT = "testing_list.txt", "validation_list.txt"
_LANGUAGES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029")
_TRAINING_VARIANTS = ("m1", "m3", "m4", "m6", "m7", "f1", "f2", "f3", "klatt", "croak")
_TEST_VARIANTS = ("m5", "m8", "f5", "klatt3")


class SpokenError(ValueError):
    """Sounds that cannot be had; the message names the file or program, and the fault."""


@dataclass(frozen=True)
class Clip:
    """One recording of a digit; ``load`` returns the samples."""

    digit: int
    speaker: str
    load: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Spoken:
    """Clips to train on and to test on, and words for where they are from."""

    train: list[Clip]
    test: list[Clip]
    source: str


def levelled(samples: np.ndarray) -> np.ndarray:
    """Return samples as loud as all clips are; silence stays silence."""
    loudness = np.sqrt(np.square(samples, dtype=np.float64).mean())
    return samples if loudness == 0 else (samples * (LOUDNESS / loudness)).astype(np.float32)


def recorded(root: Path) -> Spoken:
    """Find the digits of a Speech Commands tree (Warden 2018): ``seven/SPEAKER_nohash_N.wav``.

    ``testing_list.txt`` and ``validation_list.txt`` say what is tested on, and what is left out.
    Without them a fifth of the speakers is tested on, those whose names have the lowest hashes.

    Raises:
        SpokenError: a folder is missing or empty, a file has another name, or a digit or speaker
            is missing in a part.
    """
    if not root.is_dir():
        got = "a file" if root.exists() else "nothing"
        raise SpokenError(f"{root}: expected a folder, got {got}")
    found = {
        f"{WORDS[digit]}/{path.name}": clip
        for digit in range(len(WORDS))
        for path, clip in _clips_in(root / WORDS[digit], digit)
    }
    tested, left_out = (_listed(root / name) for name in (_TESTED, _LEFT_OUT))
    if not tested:
        speakers = sorted({clip.speaker for clip in found.values()}, key=_hash)
        if len(speakers) < 2:
            raise SpokenError(f"{root}: expected 2 speakers or more, got only {speakers[0]}")
        held_out = speakers[: max(1, round(_HELD_OUT * len(speakers)))]
        tested = {key for key, clip in found.items() if clip.speaker in held_out}
        left_out = set()
    train = [clip for key, clip in found.items() if key not in tested | left_out]
    test = [clip for key, clip in found.items() if key in tested]
    missing = sorted(set(range(len(WORDS))) - {clip.digit for clip in train})
    if missing:
        raise SpokenError(f"{root / WORDS[missing[0]]}: no file of it is left to train on")
    if not test:
        raise SpokenError(f"{root / _TESTED}: names no file of a digit that is there")
    shared = {clip.speaker for clip in train} & {clip.speaker for clip in test}
    if shared:
        raise SpokenError(f"{root / _TESTED}: speaker {min(shared)} is tested on and trained on")
    return Spoken(train, test, "recorded")


def _clips_in(folder: Path, digit: int) -> Iterator[tuple[Path, Clip]]:
    if not folder.is_dir():
        raise SpokenError(f"{folder}: missing; expected a folder for each of {', '.join(WORDS)}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".wav")
    if not files:
        raise SpokenError(f"{folder}: expected WAV files, got none")
    for path in files:
        match = _FILE_NAME.fullmatch(path.stem)
        if match is None:
            raise SpokenError(f"{path}: expected a name such as SPEAKER_nohash_0.wav")
        yield path, Clip(digit, match[1], partial(read_wav, path))


def _listed(path: Path) -> set[str]:
    """Return the files that a list names; none if there is no list."""
    try:
        return set(path.read_text(encoding="utf-8").split())
    except FileNotFoundError:
        return set()
    except (OSError, UnicodeDecodeError) as error:
        raise SpokenError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _hash(speaker: str) -> str:
    return hashlib.sha256(speaker.encode()).hexdigest()


def has_espeak() -> bool:
    """Return whether espeak-ng is installed."""
    return shutil.which("espeak-ng") is not None


def by_espeak(seed: int) -> Spoken:
    """Let espeak-ng say the digits: accents, variants of the voice, speeds and pitches.

    Raises:
        SpokenError: it fails, or says something else than ten words.
    """
    generator = np.random.default_rng(seed)

    def said(variants: tuple[str, ...], voices: int) -> list[Clip]:
        spoken = []
        for i in range(voices):
            accent, variant = divmod(i, len(variants))
            language = _LANGUAGES[(variant + accent) % len(_LANGUAGES)]
            voice = f"{language}+{variants[variant]}"
            speed, pitch = int(generator.integers(110, 181)), int(generator.integers(20, 81))
            name = f"{voice} at speed {speed}, pitch {pitch}"
            spoken.append((name, _espeak(voice, speed, pitch)))
        return _clips(spoken)

    train = said(_TRAINING_VARIANTS, TRAINING_VOICES)
    return Spoken(train, said(_TEST_VARIANTS, TEST_VOICES), "espeak-ng")


def by_formants(seed: int) -> Spoken:
    """Let the formant synthesiser say the digits, in voices that are drawn."""
    generator = np.random.default_rng(seed)
    voices = [_formants.Voice.draw(generator) for _ in range(TRAINING_VOICES + TEST_VOICES)]
    spoken = _formants.say(voices, generator)
    named = [
        (f"voice {i}, {voice.pitch:.0f} Hz", words)
        for i, (voice, words) in enumerate(zip(voices, spoken, strict=True))
    ]
    train, test = named[:TRAINING_VOICES], named[TRAINING_VOICES:]
    return Spoken(_clips(train), _clips(test), "formant synthesiser")


def _clips(spoken: Iterable[tuple[str, list[np.ndarray]]]) -> list[Clip]:
    """Return the clips of speakers who said all ten digits, with the 16 bits of a WAV file."""
    return [
        Clip(digit, speaker, partial(parse_wav, wav_bytes(levelled(samples)), WORDS[digit]))
        for speaker, said in spoken
        for digit, samples in enumerate(said)
    ]


def _espeak(voice: str, speed: int, pitch: int) -> list[np.ndarray]:
    """Return the ten digits in one voice; one call, since starting the program costs the most."""
    words = " ".join(f'{word}. <break time="600ms"/>' for word in WORDS)
    command = ["espeak-ng", "-m", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout"]
    name = " ".join(command)
    try:
        done = subprocess.run([*command, words], capture_output=True, check=True, timeout=60)
        samples = parse_wav(done.stdout, name)
    except (OSError, subprocess.SubprocessError, WavError) as error:
        raise SpokenError(f"{name}: failed ({error})") from error
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    ends = np.flatnonzero(np.diff(loud) > 0.25 * RATE)
    clips = [samples[run[0] : run[-1] + 1] for run in np.split(loud, ends + 1) if len(run)]
    if len(clips) != len(WORDS):
        raise SpokenError(f"{name}: expected {len(WORDS)} words, heard {len(clips)}")
    return clips
