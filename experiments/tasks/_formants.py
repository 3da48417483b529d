"""Says the ten digits: a formant synthesiser after Klatt (1980), for many voices at once.

Glottal pulses and breath run through a cascade of time-varying resonators, the formants of the
vocal tract; noise runs through one more, the place of a consonant. A digit is a row of segments,
each with what the resonators and the sources are to reach; smoothing makes the movements between
them.

Shape legend: M clips, K frames of 5 ms, N samples, R resonators.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from scipy.ndimage import gaussian_filter1d

from experiments.tasks._wav import RATE

_FRAME = RATE // 200
_BANDWIDTHS = np.array([70.0, 100.0, 150.0, 250.0, 300.0])
_HIGHER_FORMANTS = (3500.0, 4500.0)

# Milliseconds; formants 1 to 3 of a man in Hz; loudness of voice, breath and friction; centre and
# bandwidth of the friction in Hz. Formants after Peterson & Barney (1952) and Klatt (1980).
_Segment = tuple[float, float, float, float, float, float, float, float, float]


def _vowel(ms: float, f1: float, f2: float, f3: float, voice: float = 1.0) -> _Segment:
    return (ms, f1, f2, f3, voice, 0.0, 0.0, 4000.0, 2000.0)


def _noise(
    ms: float, f1: float, f2: float, f3: float, friction: float, centre: float, width: float,
    voice: float = 0.0,
) -> _Segment:  # fmt: skip
    return (ms, f1, f2, f3, voice, 0.0, friction, centre, width)


def _closure(ms: float, f1: float, f2: float, f3: float) -> _Segment:
    return (ms, f1, f2, f3, 0.0, 0.0, 0.0, 4000.0, 2000.0)


def _breath(ms: float, f1: float, f2: float, f3: float) -> _Segment:
    return (ms, f1, f2, f3, 0.0, 0.7, 0.1, 4500.0, 2500.0)


def _n(ms: float) -> _Segment:
    return _vowel(ms, 260, 1500, 2500, 0.35)


_S = (0.4, 6000.0, 2000.0)
_F = (0.1, 5500.0, 6000.0)
_AY = (_vowel(120, 730, 1150, 2450), _vowel(90, 380, 2050, 2650))

WORDS: dict[str, tuple[_Segment, ...]] = {
    "zero": (
        _noise(90, 300, 1700, 2550, 0.3, 6000, 2000, voice=0.25),
        _vowel(80, 370, 2000, 2600),
        _vowel(80, 380, 1200, 1650, 0.8),
        _vowel(110, 560, 950, 2400),
        _vowel(110, 400, 800, 2350, 0.7),
    ),
    "one": (
        _vowel(80, 310, 650, 2200, 0.6),
        _vowel(130, 660, 1200, 2450),
        _n(130),
    ),
    "two": (
        _noise(20, 300, 1700, 2700, 0.7, 4500, 2500),
        _breath(50, 320, 1500, 2500),
        _vowel(110, 310, 1150, 2300),
        _vowel(100, 310, 900, 2250, 0.7),
    ),
    "three": (
        _noise(100, 350, 1300, 2500, 0.08, 6500, 5000),
        _vowel(80, 360, 1150, 1650, 0.7),
        _vowel(130, 290, 2200, 2950),
        _vowel(90, 280, 2300, 3000, 0.7),
    ),
    "four": (
        _noise(110, 350, 900, 2300, *_F),
        _vowel(170, 560, 850, 2400),
        _vowel(130, 460, 1250, 1680, 0.7),
    ),
    "five": (
        _noise(110, 350, 1000, 2300, *_F),
        *_AY,
        _noise(90, 300, 1100, 2300, 0.08, 5500, 6000, voice=0.3),
    ),
    "six": (
        _noise(120, 350, 1700, 2600, *_S),
        _vowel(90, 420, 1950, 2550),
        _closure(60, 320, 1900, 2400),
        _noise(20, 320, 1900, 2400, 0.5, 1900, 800),
        _noise(130, 350, 1700, 2600, *_S),
    ),
    "seven": (
        _noise(120, 350, 1700, 2600, *_S),
        _vowel(100, 560, 1800, 2500),
        _noise(60, 300, 1100, 2300, 0.06, 5500, 6000, voice=0.4),
        _vowel(60, 520, 1350, 2450, 0.8),
        _n(120),
    ),
    "eight": (
        _vowel(100, 500, 1850, 2550),
        _vowel(90, 340, 2200, 2750),
        _closure(70, 320, 1850, 2700),
        _noise(20, 320, 1800, 2700, 0.6, 4500, 2500),
        _breath(40, 350, 1700, 2600),
    ),
    "nine": (_n(90), *_AY, _n(120)),
}  # fmt: skip


@dataclass(frozen=True)
class Voice:
    """How one speaker speaks.

    Attributes:
        pitch: of the glottal pulses, Hz.
        scale: of all formants, relative to a man's: a shorter vocal tract has higher ones.
        formants: of each of the first three formants beside that.
        rate: of speech, relative to the table of segments.
        fall: of the pitch over a word, as a share of it.
        breath: noise in the voice.
        friction: loudness of noise consonants.
        openness: the share of a period in which the glottis is open.
    """

    pitch: float
    scale: float
    formants: tuple[float, float, float]
    rate: float
    fall: float
    breath: float
    friction: float
    openness: float

    @classmethod
    def draw(cls, generator: np.random.Generator) -> Voice:
        """Draw a speaker: a low, a high or a middle voice, the vocal tract to match."""
        height = generator.uniform(0, 1)
        return cls(
            pitch=90 * 2.6 ** (height + generator.normal(0, 0.08)),
            scale=0.94 + 0.24 * height + generator.normal(0, 0.025),
            formants=tuple(generator.normal(1, 0.05, 3)),
            rate=generator.uniform(0.75, 1.3),
            fall=generator.uniform(0.0, 0.35),
            breath=generator.uniform(0.02, 0.3),
            friction=2 ** generator.normal(0, 0.8),
            openness=generator.uniform(0.45, 0.75),
        )


def say(voices: list[Voice], generator: np.random.Generator) -> list[list[np.ndarray]]:
    """Return the ten digits as each voice says them, ``[N]`` each, float32, of any loudness."""
    spoken = [(voice, word) for voice in voices for word in WORDS]
    targets = [_targets(voice, WORDS[word], generator) for voice, word in spoken]
    lengths = [len(each) for each in targets]
    # Padded with the last segment, silent: the smoothing lets it die away.
    longest = max(lengths) + 6
    tracks_MK8 = np.stack([np.pad(t, ((0, longest - len(t)), (0, 0)), "edge") for t in targets])
    for track, length in zip(tracks_MK8, lengths, strict=True):
        track[length:, 3:6] = 0
    tracks_MK8[..., :3] = gaussian_filter1d(tracks_MK8[..., :3], 4, axis=1, mode="nearest")
    tracks_MK8[..., 3:6] = gaussian_filter1d(tracks_MK8[..., 3:6], 1.5, axis=1, mode="constant")
    voice_NM, friction_NM = (np.empty((longest * _FRAME, len(spoken)), np.float32) for _ in "vf")
    for clip, ((voice, _), track_K8, length) in enumerate(
        zip(spoken, tracks_MK8, lengths, strict=True)
    ):
        voice_NM[:, clip], friction_NM[:, clip] = _sources(voice, track_K8, length, generator)
    sound_MN = _filtered(voice_NM, friction_NM, *_resonators(voices, tracks_MK8))
    clips = [
        sound[: (length + 6) * _FRAME] for sound, length in zip(sound_MN, lengths, strict=True)
    ]
    return [clips[at : at + len(WORDS)] for at in range(0, len(clips), len(WORDS))]


def _targets(
    voice: Voice, segments: tuple[_Segment, ...], generator: np.random.Generator
) -> np.ndarray:
    """Return ``[K, 8]``: what a word's segments are to reach; no two times quite the same."""
    table = np.array(segments)
    table[:, 1:4] *= voice.scale * np.array(voice.formants)
    table[:, 1:4] *= generator.normal(1, 0.04, table[:, 1:4].shape)
    table[:, 6] *= voice.friction
    table[:, 5] += voice.breath * table[:, 4]
    ms = table[:, 0] / voice.rate * generator.uniform(0.7, 1.3, len(table))
    ends = [round(end / 5) for end in accumulate(ms)]
    return np.repeat(table[:, 1:], np.diff([0, *ends]), axis=0)


def _sources(
    voice: Voice, track_K8: np.ndarray, length: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return what goes into the resonators, ``[N]`` each: voice with breath, and friction."""
    frames = len(track_K8)
    ramp = np.arange(_FRAME) / _FRAME

    def over_samples(track_K: np.ndarray) -> np.ndarray:
        steps_K = np.diff(track_K, append=track_K[-1])
        return (track_K[:, None] + steps_K[:, None] * ramp).ravel()

    at_K = (np.arange(frames) / length).clip(0, 1)
    flutter_K = gaussian_filter1d(generator.normal(0, 0.06, frames), 4)
    pitch_K = voice.pitch * (1 + voice.fall / 2 - voice.fall * at_K + flutter_K)
    phase = np.cumsum(over_samples(pitch_K) / RATE) % 1
    # The derivative of the flow t^2 - t^3 while the glottis is open (Klatt & Klatt 1990).
    opening = phase / voice.openness
    pulses = np.where(opening < 1, 3 * opening * (2 - 3 * opening), 0)
    pulses[1:] -= 0.6 * pulses[:-1]  # a voice that carries: high tones fall less
    noise = generator.normal(0, 1, frames * _FRAME)
    voiced = pulses * over_samples(track_K8[:, 3]) + 0.5 * noise * over_samples(track_K8[:, 4])
    return voiced, np.diff(noise, prepend=0) * over_samples(track_K8[:, 5])


def _resonators(voices: list[Voice], tracks_MK8: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return frequencies and bandwidths ``[M, K, R]``: five formants, then the friction's."""
    clips, frames, _ = tracks_MK8.shape
    scale = np.repeat([voice.scale for voice in voices], len(WORDS))[:, None, None]
    higher = np.broadcast_to(scale * np.array(_HIGHER_FORMANTS), (clips, frames, 2))
    widths = np.broadcast_to(_BANDWIDTHS, (clips, frames, len(_BANDWIDTHS)))
    frequency_MKR = np.concatenate((tracks_MK8[..., :3], higher, tracks_MK8[..., 6:7]), -1)
    return frequency_MKR.clip(50, 0.48 * RATE), np.concatenate((widths, tracks_MK8[..., 7:]), -1)


def _filtered(
    voice_NM: np.ndarray,
    friction_NM: np.ndarray,
    frequency_MKR: np.ndarray,
    bandwidth_MKR: np.ndarray,
) -> np.ndarray:
    """Return the sound ``[M, N]``: voice through the cascade, and friction through the last one.

    A resonator is ``y_t = a x_t + b y_{t-1} + c y_{t-2}``. Each of the cascade takes what the one
    before it gave a sample ago, so that all of them step at once; the sound is late by as much.
    """
    c_MKR = -np.exp(-2 * np.pi * bandwidth_MKR / RATE)
    b_MKR = 2 * np.sqrt(-c_MKR) * np.cos(2 * np.pi * frequency_MKR / RATE)
    a_MKR = 1 - b_MKR - c_MKR  # a gain of 1 at 0 Hz
    a_MKR[..., -1] = 1 - np.sqrt(-c_MKR[..., -1])  # near 1 at the centre
    a_KRM, b_KRM, c_KRM = (np.ascontiguousarray(each.transpose(1, 2, 0), np.float32)
                           for each in (a_MKR, b_MKR, c_MKR))  # fmt: skip
    sound_NM = np.empty_like(voice_NM)
    one, two, into = (np.zeros_like(a_KRM[0]) for _ in range(3))
    for t in range(len(voice_NM)):
        k = t // _FRAME
        into[0], into[1:-1], into[-1] = voice_NM[t], one[:-2], friction_NM[t]
        two *= c_KRM[k]
        two += a_KRM[k] * into
        two += b_KRM[k] * one
        one, two = two, one
        np.add(one[-2], one[-1], out=sound_NM[t])
    return sound_NM.T
