"""Ask every step to hand the gradient on at its norm.

Shape legend: T time steps, B batch, L layers, D directions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.fields import Config, choice, positive
from experiments.models import PLAIN, SequenceModel
from experiments.remedies._remedy import Problem, Remedy
from rnn_cuda.cells.elman import activation_derivative
from rnn_cuda.functional import elman_rnn
from rnn_cuda.instruments import omega, total_adjoint


@dataclass(frozen=True)
class OmegaConfig(Config):
    """Options of ``remedy=[omega]``.

    Attributes:
        alpha: what Omega is multiplied by; the paper takes 0.5 to 4.
        form: of `rnn_cuda.instruments.omega`: ``paper``, or ``code`` as the authors' program.
    """

    alpha: float = positive(2.0)
    form: str = choice("paper", ("paper", "code"))


class Omega(Remedy):
    """The regulariser of Pascanu, Mikolov & Bengio (2013), summed over layers and directions.

    As in the paper, the adjoints ``a_t`` and states ``h_t`` are held constant, so it pulls at U
    alone. Under truncated_bptt the adjoints are those that training sees: none passes a cut.
    """

    name = "omega"
    Config = OmegaConfig
    layers = PLAIN

    def change(self, model: SequenceModel, problem: Problem) -> None:
        """Have the model keep what the penalty is computed from."""
        model.keeps_states = True

    def penalty(self, model: SequenceModel, x_TBI: Tensor, loss: Tensor) -> Tensor:
        """Return ``alpha * Omega`` of the batch.

        The gradient runs back through the readout once more, then along each layer by one linear
        recurrence in float64; no second pass through the model.
        """
        assert model.states is not None
        output, h_n = model.states
        model.states = None
        direct, direct_n = torch.autograd.grad(
            loss, (output, h_n), retain_graph=True, allow_unused=True
        )
        with torch.autocast(x_TBI.device.type, enabled=False):
            total = output.new_zeros((), dtype=torch.float64)
            weights = model.core.all_weights
            for index, a_TBH, h_TBH in _adjoints(model, weights, x_TBI, output, direct, direct_n):
                total = total + omega(
                    a_TBH,
                    h_TBH,
                    weights[index][1],
                    nonlinearity=model.core.nonlinearity,
                    form=self.config.form,
                )
        return (self.config.alpha * total).to(loss.dtype)


@torch.no_grad()
def _adjoints(
    model: SequenceModel,
    weights: list[list[Tensor]],
    x_TBI: Tensor,
    output: Tensor,
    direct: Tensor | None,
    direct_n: Tensor | None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the place of each layer and direction in ``weights``, its adjoints and its states.

    Args:
        model: whose core is Elman's.
        weights: of the core.
        x_TBI: its input.
        output: the states of the highest layer, ``(T, B, D * H)``.
        direct: what arrives there directly, ``dloss/doutput``; ``None`` for nothing.
        direct_n: the same for the final states, ``(L * D, B, H)``.
    """
    core, directions = model.core, model.directions
    weights = [[w.double() for w in each] for each in weights]
    states = _lower_states(model, weights, x_TBI)
    states.append(output.double())
    if direct is None:
        arriving = torch.zeros_like(states[-1])
    else:
        arriving = direct.to(torch.float64, copy=True)
    for layer in reversed(range(core.num_layers)):
        below = []
        for direction in range(directions):
            index, is_reverse = layer * directions + direction, direction == 1
            weight_ih, weight_hh = weights[index][:2]
            h, own = (each.chunk(directions, -1)[direction] for each in (states[layer], arriving))
            if direct_n is not None:
                own[0 if is_reverse else -1] += direct_n[index]
            pieces = [
                total_adjoint(*pair, weight_hh, nonlinearity=core.nonlinearity, reverse=is_reverse)
                for pair in zip(*(e.split(model.segment or len(h)) for e in (own, h)), strict=True)
            ]
            a = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            yield index, a, h
            if layer > 0:
                below.append(activation_derivative(h, core.nonlinearity) * a @ weight_ih)
        arriving = sum(below)


def _lower_states(model: SequenceModel, weights: list[list[Tensor]], x_TBI: Tensor) -> list[Tensor]:
    """Return the states of every layer but the highest, which the core does not give out."""
    core, directions = model.core, model.directions
    states, x = [], x_TBI.double()
    for layer in range(core.num_layers - 1):
        outputs = [
            elman_rnn(
                x,
                None,
                *weights[layer * directions + direction],
                nonlinearity=core.nonlinearity,
                reverse=direction == 1,
            )[0]
            for direction in range(directions)
        ]
        x = torch.cat(outputs, -1)
        states.append(x)
    return states
