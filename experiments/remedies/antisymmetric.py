"""Let the state turn rather than grow or decay."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.fields import Config, number, positive
from experiments.models import PLAIN, SequenceModel
from experiments.remedies._remedy import Order, Problem, Remedy, apply


@dataclass(frozen=True)
class AntisymmetricConfig(Config):
    """Options of ``remedy=[antisymmetric]``.

    Attributes:
        step_size: epsilon, that of the Euler step.
        diffusion: gamma, which damps what the step adds.
    """

    step_size: float = positive(0.1)
    diffusion: float = number(0.01, at_least=0.0)


class Antisymmetric(Remedy):
    """:class:`rnn_cuda.AntisymmetricRNN` in place of an Elman layer, with its weights (Chang 2019).

    The recurrent matrix is ``M - M^T - gamma I``, M what was U.
    """

    name = "antisymmetric"
    Config = AntisymmetricConfig
    order = Order.LAYERS
    layers = PLAIN

    def change(self, model: SequenceModel, problem: Problem) -> None:
        """Replace the recurrence."""
        apply(
            self,
            model,
            "antisymmetric",
            step_size=self.config.step_size,
            diffusion=self.config.diffusion,
        )
