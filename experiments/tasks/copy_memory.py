"""Repeat ten symbols after a delay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from experiments.fields import Config, integer
from experiments.tasks._task import SYMBOLS, Batch, Task, one_hot

_COPIED = 10
_SYMBOLS = 8
_BLANK = 8
_DELIMITER = 9


@dataclass(frozen=True)
class CopyMemoryConfig(Config):
    """Options of ``task=copy_memory``."""

    test_size: int = integer(1000, at_least=1)


class CopyMemoryTask(Task):
    """Repeat ten symbols after a delay (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016).

    Ten of eight symbols, ``T - 1`` blanks, a delimiter, ten blanks: ``T + 20`` steps of ten one-hot
    inputs. The target is ``T + 10`` blanks, then the symbols: nine classes at every step. Knowing
    only the shape of the answer costs ``10 ln 8 / (T + 20)``.
    """

    name = "copy_memory"
    Config = CopyMemoryConfig
    input_size = 10
    output_size = 9
    reads = "every"
    answer = SYMBOLS
    minimum_horizon = 1

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw input ``[T + 20, B, 10]`` and target ``[T + 20, B]``."""
        copied = torch.randint(0, _SYMBOLS, (_COPIED, batch_size), generator=generator)
        shape = (horizon + 2 * _COPIED, batch_size)
        input_TB = torch.full(shape, _BLANK)
        input_TB[:_COPIED] = copied
        input_TB[_COPIED + horizon - 1] = _DELIMITER
        target_TB = torch.full(shape, _BLANK)
        target_TB[-_COPIED:] = copied
        return one_hot(input_TB, self.input_size), target_TB

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the cost of knowing where the ten symbols go, but not which."""
        return _COPIED * math.log(_SYMBOLS) / (horizon + 2 * _COPIED)

    know_nothing_error = know_nothing_loss

    def dependency(self, horizon: int) -> int:
        """Return the lag between a symbol and its copy, the same for all ten."""
        return horizon + _COPIED
