"""How much gradient arrives at each time step: the total adjoint ``a_t = dL/dh_t``.

Measured by `rnn_cuda.instruments.GradientFlow` on one probe batch, before and after training.

Shape legend: T time steps, B batch, I inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.models import SequenceModel
from experiments.tasks import Task
from rnn_cuda.instruments import GradientFlow


@dataclass(frozen=True)
class AdjointProfile:
    """Norms of the total adjoint per time step and sample, ``[T, B]`` in float64.

    Entry ``[t, b]`` is the norm of the derivative of sample b's own loss, not of the batch mean.

    Attributes:
        hidden: norm of ``dL/dh_t``.
        state: norm of the derivative with respect to all that is carried on: ``(h_t, c_t)`` for an
            LSTM (each component with the other held fixed), else the same as ``hidden``.
    """

    hidden: Tensor
    state: Tensor

    def mean_state(self) -> list[float]:
        """Return the mean over samples of the norm over the whole state, by time step."""
        return self.state.mean(dim=1).tolist()

    def mean_hidden(self) -> list[float]:
        """Return the mean over samples of the norm over h alone, by time step."""
        return self.hidden.mean(dim=1).tolist()


def adjoint_profile(
    model: SequenceModel, task: Task, x_TBI: Tensor, target: Tensor
) -> AdjointProfile:
    """Return the total adjoint's norms under ``task.loss`` for one batch.

    A norm that is exactly zero stays zero. Gradients of the parameters are left as they were.
    """
    with GradientFlow(model) as flow:
        loss = task.loss(model(x_TBI), target) * x_TBI.shape[1]
        torch.autograd.grad(loss, list(model.parameters()))
    return AdjointProfile(
        hidden=flow.adjoint_norm["core.l0"].cpu(), state=flow.joint_adjoint_norm["core.l0"].cpu()
    )


def first_to_last_ratio(profile: list[float]) -> float:
    """Return the norm at the first step over that at the last; nan if the last one is zero."""
    return profile[0] / profile[-1] if profile[-1] != 0 else math.nan


def log10_or_none(value: float) -> float | None:
    """Return log10, or ``None`` for an exact zero and for what is not finite."""
    return math.log10(value) if value > 0 and math.isfinite(value) else None
