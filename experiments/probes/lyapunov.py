"""How fast neighbouring trajectories part or meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from experiments.fields import integer, number
from experiments.models import RECURRENT, SequenceModel
from experiments.probes._probe import Probe, ProbeConfig, ProbeError, as_json
from experiments.tasks import Task
from rnn_cuda.instruments import lyapunov_exponents, relaxation_time


@dataclass(frozen=True)
class LyapunovConfig(ProbeConfig):
    """Options of ``probe=[lyapunov]``.

    Attributes:
        exponents: how many, the largest first.
        warmup: share of the steps, from the first, that does not count.
        sequences: how many of the batch.
    """

    exponents: int = integer(8, at_least=1)
    warmup: float = number(0.1, at_least=0.0, at_most=0.9)
    sequences: int = integer(8, at_least=1)


class Lyapunov(Probe):
    """The largest Lyapunov exponents, in natural logarithms per time step."""

    name = "lyapunov"
    Config = LyapunovConfig
    layers = RECURRENT

    def check(self, model: SequenceModel, task: Task) -> None:
        """Refuse more exponents than the state has dimensions."""
        super().check(model, task)
        if self.config.exponents > model.state_size:
            raise ProbeError(
                f"probe.lyapunov.exponents must be at most {model.state_size}, the size of the "
                f"state of this {model.core_name}; got {self.config.exponents}"
            )

    def measure(
        self, model: SequenceModel, task: Task, x_TBI: Tensor, target: Tensor
    ) -> dict[str, Any]:
        """Return ``exponents``, the mean over sequences, and ``relaxation_time``.

        That is -1 / the largest, in steps. What is infinite is ``None``: an exponent of a Jacobian
        that takes a direction to zero, the time of a network that forgets nothing.
        """
        exponents = lyapunov_exponents(
            model.core,
            x_TBI[:, : self.config.sequences],
            self.config.exponents,
            warmup=int(self.config.warmup * len(x_TBI)),
        ).mean(dim=0)
        return {
            "exponents": as_json(exponents),
            "relaxation_time": as_json(relaxation_time(exponents[0])),
        }
