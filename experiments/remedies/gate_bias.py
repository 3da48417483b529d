"""Set the bias of the gate that keeps the state."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.fields import Config, number_or_name
from experiments.models import GATED, SequenceModel
from experiments.remedies._remedy import Order, Problem, Remedy, apply


@dataclass(frozen=True)
class GateBiasConfig(Config):
    """Options of ``remedy=[gate_bias]``; ``chrono`` spreads memories over the dependency."""

    value: float | str = number_or_name(1.0, ("chrono",))


class GateBias(Remedy):
    """Forget gate of an LSTM, update gate of a GRU: a number, or spread over the dependency.

    1 is that of Jozefowicz, Zaremba & Sutskever (2015), chrono that of Tallec & Ollivier (2018),
    with the longest lag that matters to the task as T_max.
    """

    name = "gate_bias"
    Config = GateBiasConfig
    order = Order.BIASES
    layers = GATED

    @torch.no_grad()
    def change(self, model: SequenceModel, problem: Problem) -> None:
        """Set the biases."""
        if self.config.value == "chrono":
            # Below 3 steps there is nothing to spread.
            lag = max(3, problem.task.dependency(problem.horizon))
            apply(self, model, "chrono", max_lag=lag)
        else:
            apply(self, model, "forget_bias", value=self.config.value)
