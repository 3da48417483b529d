"""Keep the recurrent weights orthogonal while they are trained."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.fields import Config, choice
from experiments.models import RECURRENT, SequenceModel
from experiments.remedies._remedy import Order, Problem, Remedy, apply


@dataclass(frozen=True)
class OrthogonalParametrizationConfig(Config):
    """Options of ``remedy=[orthogonal_parametrization]``.

    Attributes:
        orthogonal_map: from what is trained to an orthogonal matrix, one of torch's.
    """

    orthogonal_map: str = choice("matrix_exp", ("matrix_exp", "cayley", "householder"))


class OrthogonalParametrization(Remedy):
    """Each block of U orthogonal throughout training: `rnn_cuda.remedies` (expRNN 2019).

    It begins with the orthogonal factor of U as drawn. ``optimizer.orthogonal_factor`` is its
    learning rate over that of the other weights.
    """

    name = "orthogonal_parametrization"
    Config = OrthogonalParametrizationConfig
    order = Order.CONSTRAINTS
    layers = RECURRENT

    def change(self, model: SequenceModel, problem: Problem) -> None:
        """Parametrize U of every layer and direction."""
        apply(self, model, self.name, orthogonal_map=self.config.orthogonal_map)
