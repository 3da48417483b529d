"""Recognises words in a row by templates and dynamic time warping, without training.

All templates are warped along the input at once, in one pass, and a word may follow another at any
step (Bridle, Brown & Chamberlain 1982; Ney 1984).

Shape legend: T time steps, B batch, I inputs, S template steps, W templates and silence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Templates:
    """Words as they were said once, and silence.

    Args:
        words: their symbols and steps, ``[steps, I]`` each.
        silence: one step, ``[1, I]``.
    """

    def __init__(self, words: Sequence[tuple[str, Tensor]], silence: Tensor) -> None:
        self._symbols = [symbol for symbol, _ in words] + [""]
        self._steps_SI = torch.cat([*(steps for _, steps in words), silence])
        lengths = torch.tensor([*(len(steps) for _, steps in words), 1])
        self._ends_W = lengths.cumsum(0) - 1
        place_S = torch.arange(len(self._steps_SI))
        place_S -= (self._ends_W - lengths + 1).repeat_interleave(lengths)
        self._is_begin_S = place_S == 0
        # A step of the input goes one template step on, stays, or leaves one out.
        self._is_reached_3S = torch.stack((place_S >= 0, place_S >= 1, place_S >= 2))

    def transcribe(self, x_TBI: Tensor) -> list[str]:
        """Return the symbols of the words that fit each sequence with the least distance."""
        size = x_TBI.shape[1]
        cost_BS = torch.full((size, len(self._steps_SI)), torch.inf, dtype=x_TBI.dtype)
        begun_BS = torch.zeros(cost_BS.shape, dtype=torch.long)
        ended_B = torch.zeros(size, dtype=x_TBI.dtype)
        words, begins = [], []
        for t, x_BI in enumerate(x_TBI):
            before = torch.stack([cost_BS.roll(shift, 1) for shift in range(3)], 1)
            cost_BS, came_BS = before.where(self._is_reached_3S, torch.inf).min(1)
            begun = torch.stack([begun_BS.roll(shift, 1) for shift in range(3)], 1)
            begun_BS = begun.gather(1, came_BS.unsqueeze(1)).squeeze(1)
            is_new_BS = self._is_begin_S & (ended_B.unsqueeze(1) < cost_BS)
            cost_BS = torch.where(is_new_BS, ended_B.unsqueeze(1), cost_BS)
            cost_BS += torch.cdist(x_BI, self._steps_SI)
            begun_BS = begun_BS.masked_fill(is_new_BS, t)
            ended_B, word_B = cost_BS[:, self._ends_W].min(1)
            words.append(word_B)
            begins.append(begun_BS[:, self._ends_W].gather(1, word_B.unsqueeze(1)).squeeze(1))
        return [
            self._traced(word_T, begin_T)
            for word_T, begin_T in zip(
                torch.stack(words, 1).tolist(), torch.stack(begins, 1).tolist(), strict=True
            )
        ]

    def _traced(self, word_T: list[int], begin_T: list[int]) -> str:
        """Return the symbols of a path, from the words that end at each step and their begins."""
        symbols, t = [], len(word_T) - 1
        while t >= 0:
            symbols.append(self._symbols[word_T[t]])
            t = begin_T[t] - 1
        return "".join(reversed(symbols))
