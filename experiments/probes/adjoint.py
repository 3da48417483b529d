"""How much gradient arrives at each time step: the total adjoint ``a_t = dL/dh_t``."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from experiments.models import RECURRENT, SequenceModel
from experiments.probes._probe import Probe, log10_or_none, recorded
from experiments.tasks import Task


class Adjoint(Probe):
    """Norm of the total adjoint by time step, the mean over the probe batch, in float64.

    Measured in the lowest layer, forward direction, by `rnn_cuda.instruments.GradientFlow`. Each
    sample's norm is that of the derivative of its own loss, not of the batch mean. ``state_norm``
    is that of all that is carried on: ``(h_t, c_t)`` for an LSTM, else the same as ``hidden_norm``.
    A norm that is exactly zero stays zero.
    """

    name = "adjoint"
    layers = RECURRENT

    def measure(
        self, model: SequenceModel, task: Task, x_TBI: Tensor, target: Tensor
    ) -> dict[str, Any]:
        """Return ``state_norm`` and ``hidden_norm`` ``[T]``, and the ratio first to last."""
        flow = recorded(model, task, x_TBI, target)
        state, hidden = (
            norms["core.l0"].mean(dim=1).tolist()
            for norms in (flow.joint_adjoint_norm, flow.adjoint_norm)
        )
        ratio = state[0] / state[-1] if state[-1] != 0 else math.nan
        return {"state_norm": state, "hidden_norm": hidden, "log10_ratio": log10_or_none(ratio)}
