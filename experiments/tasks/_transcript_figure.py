"""Transcripts under spectrograms, as a figure.

Shape legend: N strings, T time steps, O classes, M mel bands, K frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Symbols = Sequence[Sequence[tuple[int, str]]]
"""Of each string, what there is to read, with its time step."""


def transcripts_under_spectrograms(
    frames_NMK: np.ndarray,
    chances_NTO: np.ndarray,
    said: Symbols,
    heard: Symbols,
    *,
    step_seconds: float,
    title: str,
) -> Figure:
    """Draw each string's spectrogram, and below it the probability of each class but the first.

    Args:
        frames_NMK: log mel spectrograms of deviation 1.
        chances_NTO: probabilities; class 0 is the blank.
        said: the right symbols, at the steps where they end.
        heard: those of the transcript, at the steps where they appear.
        step_seconds: the length of a time step.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    from rnn_cuda.instruments.plots import COLOURS

    strings, bands, _ = frames_NMK.shape
    steps, classes = chances_NTO.shape[1:]
    height = 2.6 * strings + 1
    figure = Figure(figsize=(8, height))
    # A layout that is solved for differs in its last bits from time to time.
    edges = {"left": 0.09, "right": 0.98, "bottom": 0.55 / height, "top": 1 - 0.45 / height}
    axes = figure.subplots(
        2 * strings, 1, sharex=True, height_ratios=[3, 2] * strings, gridspec_kw=edges
    )
    figure.suptitle(title, y=1 - 0.12 / height, va="top")
    times = (np.arange(steps) + 0.5) * step_seconds
    for string in range(strings):
        spectrogram, chances = axes[2 * string : 2 * string + 2]
        spectrogram.imshow(
            frames_NMK[string],
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=-2,
            vmax=2.5,
            extent=(0, steps * step_seconds, 0, bands),
        )
        for symbol in range(1, classes):
            if chances_NTO[string, :, symbol].max() < 0.05:
                continue
            colour = COLOURS[symbol % len(COLOURS)]
            chances.plot(times, chances_NTO[string, :, symbol], color=colour, linewidth=1.2)
        for step, word in said[string]:
            end = (step + 1) * step_seconds
            chances.axvline(end, color="0.6", linewidth=0.8)
            chances.text(end, 1.12, f"{word} ", ha="right", va="center", color="0.35")
        for step, symbol in heard[string]:
            chances.text(times[step], 0.5, symbol, weight="bold", ha="center", va="center")
        spectrogram.set(ylabel="mel band", yticks=[])
        chances.set(ylim=(0, 1.3), yticks=(0, 1), ylabel="probability")
    axes[-1].set_xlabel("seconds; above: what was said, to its end; bold: what was heard")
    return figure
