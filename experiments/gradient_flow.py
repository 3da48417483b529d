"""How much gradient arrives at each time step: the total adjoint ``a_t = dL/dh_t``.

The gradient of a recurrent module's output tensor is only the *direct* part of the adjoint, what
reaches ``h_t`` without passing through ``h_{t+1}``. The total one needs every state as a node of
the graph, so the module is run one time step at a time. That is exact for every module with torch's
recurrent interface, and slow; it is done on one probe batch, before and after training.

Shape legend: T time steps, B batch, I inputs, H hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.models import SequenceModel, State
from experiments.tasks import Task


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

    Norms are accumulated in float64: squares of small float32 numbers vanish at half the true
    range. A norm that is exactly zero stays zero.
    """
    states: list[State] = []
    state = None
    for x_BI in x_TBI:
        state = model.step(x_BI, state)
        states.append(state)
    loss = task.loss(model.predict([state[0] for state in states]), target)
    batch_size = x_TBI.shape[1]
    parts = [part for state in states for part in state]
    # The cell state of the last step reaches no loss: its adjoint is zero, not undefined.
    adjoints = torch.autograd.grad(loss * batch_size, parts, materialize_grads=True)
    parts_per_state = len(states[0])
    squares = torch.stack([a.double().square().sum(dim=(0, 2)) for a in adjoints])
    squares = squares.unflatten(0, (len(states), parts_per_state))
    return AdjointProfile(hidden=squares[:, 0].sqrt().cpu(), state=squares.sum(dim=1).sqrt().cpu())


def first_to_last_ratio(profile: list[float]) -> float:
    """Return the norm at the first step over that at the last; nan if the last one is zero."""
    return profile[0] / profile[-1] if profile[-1] != 0 else math.nan


def log10_or_none(value: float) -> float | None:
    """Return log10, or ``None`` for an exact zero and for what is not finite."""
    return math.log10(value) if value > 0 and math.isfinite(value) else None
