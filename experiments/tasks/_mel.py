"""Log mel spectrogram of sound, whole or as it comes.

Shape legend: N samples, K frames, M mel bands.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from experiments.tasks._wav import RATE

WINDOW, HOP = RATE * 25 // 1000, RATE * 10 // 1000
PAD = WINDOW - HOP
"""Silence before a clip of sound, so that windows between two clips see only one of them."""

_FFT = 512
_LOWEST, _HIGHEST = 60.0, 7600.0
_FLOOR = 1e-8


class MelBands:
    """Powers in bands that are spaced evenly on the mel scale, of windows of 25 ms every 10 ms.

    White noise of variance v has a mean power of v in every band.

    Args:
        bands: M.
    """

    def __init__(self, bands: int) -> None:
        self.bands = bands
        self._window = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
        self._filters = (_filters(bands) / np.square(self._window).sum()).astype(np.float32)

    def powers(self, samples: np.ndarray) -> np.ndarray:
        """Return ``[K, M]`` of samples ``[N]``: of every window that lies in them."""
        from scipy.fft import rfft

        if len(samples) < WINDOW:
            return np.zeros((0, self.bands), np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP]
        spectrum = rfft(windows * self._window, _FFT)
        return (spectrum.real**2 + spectrum.imag**2) @ self._filters

    def of_clip(self, samples: np.ndarray) -> np.ndarray:
        """Return ``[K, M]`` of a clip in silence: of every window that sees some of it.

        The first of them sees only its first 10 ms. In a longer sound, the clip begins ``PAD``
        samples after the beginning of the first window.
        """
        frames = -(-(PAD + len(samples)) // HOP)
        after = (frames - 1) * HOP + WINDOW - PAD - len(samples)
        return self.powers(np.pad(samples, (PAD, after)))

    def stream(self, pieces: Iterator[np.ndarray], stack: int) -> Iterator[np.ndarray]:
        """Yield what can be computed after each piece of a sound: ``[K, M]``, K by ``stack``.

        It is computed ``stack`` frames at a time, so that no rounding depends on the pieces.
        """
        buffer = np.zeros(0, np.float32)
        for piece in pieces:
            buffer = np.concatenate((buffer, piece))
            powers = [np.zeros((0, self.bands), np.float32)]
            while len(buffer) >= WINDOW + (stack - 1) * HOP:
                powers.append(self.powers(buffer[: WINDOW + (stack - 1) * HOP]))
                buffer = buffer[stack * HOP :]
            yield np.concatenate(powers)


def log_power_(powers: Tensor) -> Tensor:
    """Return the natural logarithm, in place, with a floor well below speech."""
    return powers.add_(_FLOOR).log_()


def _filters(bands: int) -> np.ndarray:
    """Return triangles ``[frequencies, M]`` that each sum to 1."""

    def mel(frequency: float | np.ndarray) -> np.ndarray:
        return 2595 * np.log10(1 + np.asarray(frequency) / 700)

    edges = np.linspace(mel(_LOWEST), mel(_HIGHEST), bands + 2)
    frequencies = mel(np.arange(_FFT // 2 + 1) * RATE / _FFT)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    triangles = np.minimum(rising, falling).clip(0)
    return triangles / triangles.sum(0)
