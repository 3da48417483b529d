"""Let a share of the state stay as it is at every step."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.fields import Config, positive
from experiments.models import PLAIN, SequenceModel
from experiments.remedies._remedy import Order, Problem, Remedy, apply


@dataclass(frozen=True)
class LeakyConfig(Config):
    """Options of ``remedy=[leaky]``; ``leak`` is the share that is renewed, dt/tau."""

    leak: float = positive(0.2, at_most=1.0)


class Leaky(Remedy):
    """:class:`rnn_cuda.LeakyRNN` in place of an Elman layer, with its weights (Jaeger 2007)."""

    name = "leaky"
    Config = LeakyConfig
    order = Order.LAYERS
    layers = PLAIN

    def change(self, model: SequenceModel, problem: Problem) -> None:
        """Replace the recurrence."""
        apply(self, model, "leaky", leak=self.config.leak)
