"""How a small change of an early state is stretched on its way to the last one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.fields import integer, integers
from experiments.models import RECURRENT, SequenceModel
from experiments.probes._probe import Probe, ProbeConfig, as_json
from experiments.tasks import Task
from rnn_cuda.instruments import jacobian_singular_values


@dataclass(frozen=True)
class JacobianConfig(ProbeConfig):
    """Options of ``probe=[jacobian]``.

    Attributes:
        lags: the k of ``ds_T/ds_{T-k}``. Those below T are taken, and T itself.
        sequences: how many of the batch.
        values: how many of each lag's singular values, evenly from the largest to the smallest.
    """

    lags: tuple[int, ...] = integers((1, 10, 25, 50, 100), at_least=1)
    sequences: int = integer(1, at_least=1)
    values: int = integer(16, at_least=2)


class Jacobian(Probe):
    """Singular values of products of Jacobians of the carried state, ``(h, c)`` for an LSTM."""

    name = "jacobian"
    Config = JacobianConfig
    layers = RECURRENT

    def measure(
        self, model: SequenceModel, task: Task, x_TBI: Tensor, target: Tensor
    ) -> dict[str, Any]:
        """Return ``log10_values``, a list per lag, the mean over sequences; and the ``lags``.

        ``ranks`` says which of the singular values they are, 1 for the largest.
        """
        length = len(x_TBI)
        lags = sorted({lag for lag in self.config.lags if lag < length} | {length})
        values = jacobian_singular_values(model.core, x_TBI[:, : self.config.sequences], lags)
        size = values.shape[-1]
        ranks = torch.linspace(0, size - 1, min(size, self.config.values)).round().long()
        return {
            "lags": lags,
            "ranks": (ranks + 1).tolist(),
            "log10_values": as_json(values.mean(dim=1)[:, ranks.to(values.device)]),
        }
