"""How much each time step adds to the gradient of the recurrent weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments.models import GATED, PLAIN, SequenceModel
from experiments.probes._probe import Probe, as_json, log10_or_none, recorded
from experiments.tasks import Task
from rnn_cuda import LeakyRNN
from rnn_cuda.instruments import lag_contribution
from rnn_cuda.trajectory import trajectory_of


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
        with torch.no_grad():
            trajectory = trajectory_of(model.core, x_TBI, None, layer=0, reverse=False)
        flow = recorded(model, task, x_TBI, target, vectors=True)
        a_TBH = flow.adjoint["core.l0"].double()
        c_TBH = flow.cell_adjoint.get("core.l0", a_TBH).double()
        delta, _ = trajectory.linearisation.pull(a_TBH, c_TBH)
        values = lag_contribution(delta, trajectory.output).mean(dim=1)
        ratio = values[1] / values[-1] if len(values) > 1 and values[-1] > 0 else torch.zeros(())
        return {"contribution": as_json(values), "log10_ratio": log10_or_none(float(ratio))}
