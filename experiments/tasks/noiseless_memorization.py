"""Repeat a pattern after constant input."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from experiments.fields import Config, integer
from experiments.tasks._task import SYMBOLS, Batch, Task, one_hot


@dataclass(frozen=True)
class NoiselessMemorizationConfig(Config):
    """Options of ``task=noiseless_memorization``; the harder form is ``symbols=5 pattern=10``."""

    symbols: int = integer(2, at_least=2)
    pattern: int = integer(5, at_least=1)
    test_size: int = integer(1000, at_least=1)


class NoiselessMemorizationTask(Task):
    """Repeat a pattern after T steps of constant input (Martens & Sutskever 2011; Pascanu 2013).

    ``pattern`` steps show one of ``symbols`` each, T steps a blank. A cue then asks for the
    pattern, which is due from the step of the cue on, under blanks: ``T + 2 pattern`` steps of
    ``symbols + 2`` one-hot inputs. The target is ``T + pattern`` blanks, then the pattern:
    ``symbols + 1`` classes at every step. Knowing only the shape of the answer costs
    ``pattern ln symbols / (T + 2 pattern)``.
    """

    name = "noiseless_memorization"
    Config = NoiselessMemorizationConfig
    reads = "every"
    answer = SYMBOLS
    minimum_horizon = 1

    def __init__(self, config: NoiselessMemorizationConfig) -> None:
        super().__init__(config)
        self.input_size = config.symbols + 2
        self.output_size = config.symbols + 1

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw input ``[T + 2 pattern, B, symbols + 2]`` and target ``[T + 2 pattern, B]``."""
        length, symbols = self.config.pattern, self.config.symbols
        blank, cue = symbols, symbols + 1
        pattern = torch.randint(0, symbols, (length, batch_size), generator=generator)
        shape = (horizon + 2 * length, batch_size)
        input_TB = torch.full(shape, blank)
        input_TB[:length] = pattern
        input_TB[length + horizon] = cue
        target_TB = torch.full(shape, blank)
        target_TB[-length:] = pattern
        return one_hot(input_TB, self.input_size), target_TB

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the cost of knowing where the pattern goes, but not which."""
        length = self.config.pattern
        return length * math.log(self.config.symbols) / (horizon + 2 * length)

    know_nothing_error = know_nothing_loss

    def dependency(self, horizon: int) -> int:
        """Return the lag between a symbol and its copy, the same for all."""
        return horizon + self.config.pattern
