"""Strings of clips as powers in mel bands, gathered for a batch at once.

Shape legend: T time steps, B batch, L clips of a string, M mel bands.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.tasks._mel import MelBands
from experiments.tasks._spoken import WORDS, Clip, levelled


class Clips:
    """The clips of some speakers.

    Args:
        clips: in any order.
        bands: what their powers are taken by.
        stack: frames of a time step; no clip has fewer.
        digest: is told what the clips are.

    Attributes:
        clips, speakers: ordered by speaker and digit; by name.
        frames: of each clip.
        shares: the probability of each digit in a string.
    """

    def __init__(self, clips: Iterable[Clip], bands: MelBands, stack: int, digest: Any) -> None:
        self.clips = sorted(clips, key=lambda clip: (clip.speaker, clip.digit))
        self.speakers = sorted({clip.speaker for clip in self.clips})
        self._stack = stack
        powers = [np.zeros((1, bands.bands), np.float32)]  # silence, the row 0
        for clip in self.clips:
            samples = clip.load()
            digest.update(f"{clip.speaker} {clip.digit} {len(samples)} ".encode())
            digest.update(samples)
            of_clip = bands.of_clip(levelled(samples))
            powers.append(np.pad(of_clip, ((0, max(0, stack - len(of_clip))), (0, 0))))
        self._powers = torch.from_numpy(np.concatenate(powers))
        self.frames = torch.tensor([len(each) for each in powers[1:]])
        self._offset = 1 + self.frames.cumsum(0) - self.frames
        self._count = torch.zeros(len(self.speakers), len(WORDS), dtype=torch.long)
        place = {speaker: i for i, speaker in enumerate(self.speakers)}
        for clip in self.clips:
            self._count[place[clip.speaker], clip.digit] += 1
        before = self._count.flatten().cumsum(0) - self._count.flatten()
        self._first = before.view_as(self._count)
        said = (self._count > 0).double()
        self.shares = tuple((said / said.sum(1, keepdim=True)).mean(0).tolist())

    def draw(
        self, speaker: Tensor, length: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw digits for speakers ``[B]``, of those that each says, and clips: ``[L, B]`` both."""
        said = (self._count > 0).double()[speaker]
        digit = torch.multinomial(said, length, replacement=True, generator=generator).T
        takes = self._count[speaker, digit]
        share = torch.rand(takes.shape, generator=generator, dtype=torch.float64)
        return digit, self._first[speaker, digit] + (share * takes).long()

    def powers(self, clip: int) -> Tensor:
        """Return the powers of a clip, ``[frames, M]``."""
        return self._powers[self._offset[clip] :][: self.frames[clip]]

    def strings(self, clip_LB: Tensor, begin_LB: Tensor, steps: int) -> Tensor:
        """Return the powers of clips in silence, ``[T, B, stack, M]``.

        Args:
            clip_LB: which clips.
            begin_LB: the frame at which each begins.
            steps: T.
        """
        frame = torch.arange(steps * self._stack).view(-1, 1, self._stack)
        rows = torch.zeros(steps, clip_LB.shape[1], self._stack, dtype=torch.long)
        for clip, begin in zip(clip_LB, begin_LB, strict=True):
            frames, offset = (each[clip].view(1, -1, 1) for each in (self.frames, self._offset))
            at = frame - begin.view(1, -1, 1)
            rows = torch.where((at >= 0) & (at < frames), offset + at, rows)
        return gathered(self._powers, rows)


def gathered(rows: Tensor, numbers: Tensor) -> Tensor:
    """Return some of the rows ``[rows, M]``, as ``[*numbers.shape, M]``."""
    return rows.index_select(0, numbers.flatten()).view(*numbers.shape, -1)
