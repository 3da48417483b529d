"""Say in which order two or three cues came."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from experiments.fields import Config, choice, integer
from experiments.tasks._task import CLASS, Batch, Task, one_hot

# In tenths of the sequence: where each cue's tenth begins.
_CUES_BEGIN = {2: (1, 5), 3: (1, 3, 6)}


@dataclass(frozen=True)
class TemporalOrderConfig(Config):
    """Options of ``task=temporal_order``."""

    symbols: int = choice(2, _CUES_BEGIN)
    test_size: int = integer(2000, at_least=1)


class TemporalOrderTask(Task):
    """Say in which order cues came (Pascanu et al. 2013).

    Six one-hot symbols: cues A and B, four distractors. Of two cues, one stands in
    ``[.1 L, .2 L)``, one in ``[.5 L, .6 L)``; the class at the end is AA, AB, BA or BB. Of three,
    they stand in ``[.1 L, .2 L)``, ``[.3 L, .4 L)``, ``[.6 L, .7 L)``, and there are eight classes.
    These are the tasks 6a and 6b of Hochreiter & Schmidhuber (1997), at any length.
    """

    name = "temporal_order"
    Config = TemporalOrderConfig
    input_size = 6
    answer = CLASS
    minimum_horizon = 10

    def __init__(self, config: TemporalOrderConfig) -> None:
        super().__init__(config)
        self.output_size = 2**config.symbols
        if config.symbols != 2:
            self.name = f"temporal_order_{config.symbols}_symbols"

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw input ``[T, B, 6]`` and class ``[B]``."""
        begins = _CUES_BEGIN[self.config.symbols]
        symbols_TB = torch.randint(2, 6, (horizon, batch_size), generator=generator)
        cues = torch.randint(0, 2, (len(begins), batch_size), generator=generator)
        sample = torch.arange(batch_size)
        order = torch.zeros(batch_size, dtype=torch.long)
        for cue, tenth in zip(cues, begins, strict=True):
            start, stop = tenth * horizon // 10, (tenth + 1) * horizon // 10
            position = torch.randint(start, stop, (batch_size,), generator=generator)
            symbols_TB[position, sample] = cue
            order = 2 * order + cue
        return one_hot(symbols_TB, self.input_size), order

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the entropy of the order: all are equally likely."""
        return math.log(self.output_size)

    def know_nothing_error(self, horizon: int) -> float:
        """Return the share of wrong guesses."""
        return 1 - 1 / self.output_size

    def dependency(self, horizon: int) -> int:
        """Return the lag of a first cue that comes as early as it can."""
        return horizon - 1 - horizon // 10
