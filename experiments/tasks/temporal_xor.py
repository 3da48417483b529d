"""XOR of this step's bit and the bit of d steps ago."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from experiments.tasks.delayed_recall import DelayedRecallConfig, DelayedRecallTask


@dataclass(frozen=True)
class TemporalXorConfig(DelayedRecallConfig):
    """Options of ``task=temporal_xor``."""


class TemporalXorTask(DelayedRecallTask):
    """Give, at every step, the XOR of the random bit and the one of d steps ago.

    With d = 1 this is temporal XOR as in Elman (1990); the horizon is the delay d. As in
    :class:`~experiments.tasks.delayed_recall.DelayedRecallTask`, the first d steps do not count.
    Neither bit says anything about the answer without the other.
    """

    name = "temporal_xor"
    Config = TemporalXorConfig

    def _asked(self, now: Tensor, then: Tensor) -> Tensor:
        return (now != then).float()
