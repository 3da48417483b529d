"""How much each time step adds to the gradient of the recurrent weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.models import GATED, PLAIN, SequenceModel
from experiments.probes._layer import Layer, lowest_layer, shifted
from experiments.probes._probe import Probe, as_json, log10_or_none, recorded
from experiments.tasks import Task
from rnn_cuda import LeakyRNN
from rnn_cuda.cells.elman import activation_derivative
from rnn_cuda.instruments import lag_contribution


class LagContribution(Probe):
    """Frobenius norm of each step's term in ``dL/dU``, of each sample's own loss; exact.

    The terms are ``delta_t h_{t-1}^T``, which have rank one. In an antisymmetric layer they have
    rank two, so that is refused.
    """

    name = "lag_contribution"
    layers = (*PLAIN, LeakyRNN, *GATED)

    def measure(
        self, model: SequenceModel, task: Task, x_TBI: Tensor, target: Tensor
    ) -> dict[str, Any]:
        """Return ``contribution`` ``[T]``, in the order of time, the mean over the batch.

        Its last entry is that of lag 0. The first is zero, since no state is before it.
        ``log10_ratio`` is the second over the last.
        """
        layer = lowest_layer(model.core, x_TBI)
        is_lstm = isinstance(model.core, nn.LSTM)
        flow = recorded(model, task, x_TBI, target, vectors=True, cell_through_hidden=is_lstm)
        a_TBH = flow.adjoint["core.l0"].double()
        c_TBH = flow.cell_adjoint["core.l0"].double() if is_lstm else None
        values = lag_contribution(deltas(layer, a_TBH, c_TBH), layer.h).mean(dim=1)
        ratio = values[1] / values[-1] if len(values) > 1 and values[-1] > 0 else torch.zeros(())
        return {"contribution": as_json(values), "log10_ratio": log10_or_none(float(ratio))}


@torch.no_grad()
def deltas(layer: Layer, a_TBH: Tensor, cell_TBH: Tensor | None = None) -> Tensor:
    """Return the adjoint of ``U h_{t-1} + b_hh``, all gates side by side.

    Args:
        layer: what the layer did.
        a_TBH: ``dL/dh_t``.
        cell_TBH: of an LSTM, ``dL/dc_t`` with its path through ``h_t``.

    Source: the chain rule over torch's definitions of LSTM and GRU.
    """
    if cell_TBH is not None:
        i, f, g, o = (layer.gates[name] for name in ("input", "forget", "cell", "output"))
        assert layer.cell is not None
        parts = (
            cell_TBH * g * i * (1 - i),
            cell_TBH * shifted(layer.cell) * f * (1 - f),
            cell_TBH * i * (1 - g * g),
            a_TBH * torch.tanh(layer.cell) * o * (1 - o),
        )
        return torch.cat(parts, -1)
    if layer.gates:
        r, z, n = (layer.gates[name] for name in ("reset", "update", "new"))
        hidden = len(layer.core.weight_hh_l0) // 3
        weight, bias = layer.core.weight_hh_l0.double(), layer.core.bias_hh_l0.double()
        from_h = layer.before @ weight[2 * hidden :].mT + bias[2 * hidden :]
        to_n = a_TBH * (1 - z) * (1 - n * n)
        parts = (to_n * from_h * r * (1 - r), a_TBH * (layer.before - n) * z * (1 - z), to_n * r)
        return torch.cat(parts, -1)
    _, rate, _ = layer.coefficients
    return rate * activation_derivative(layer.activation, layer.core.nonlinearity) * a_TBH
