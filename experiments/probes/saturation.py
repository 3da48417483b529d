"""How much of a layer sits where its nonlinearity is flat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.fields import fraction, integer
from experiments.models import RECURRENT, RESIDUAL, SequenceModel
from experiments.probes._probe import Probe, ProbeConfig
from experiments.tasks import Task
from rnn_cuda.instruments import saturation
from rnn_cuda.trajectory import trajectory_of


@dataclass(frozen=True)
class SaturationConfig(ProbeConfig):
    """Options of ``probe=[saturation]``.

    Attributes:
        threshold: ``|h|`` above it is saturated; a gate, as `rnn_cuda.instruments.saturation` says.
        bins: of each histogram.
    """

    threshold: float = fraction(0.95)
    bins: int = integer(40, at_least=1)


class SaturationProbe(Probe):
    """Histograms of states and gates, the share that is saturated, the mean of f'."""

    name = "saturation"
    Config = SaturationConfig
    layers = RECURRENT

    def measure(
        self, model: SequenceModel, task: Task, x_TBI: Tensor, target: Tensor
    ) -> dict[str, Any]:
        """Return a histogram of each of these.

        ``hidden``, h_t; for a leaky or antisymmetric layer ``activation`` too, f(z_t), which its
        h_t is not; for a gated one ``gates``, by name. A histogram has ``low``, ``high`` and
        ``counts``, the ``share`` that is saturated and ``mean_derivative``, the mean of f'. Of
        these two, an h_t has those that mean something: the share where it is bounded, the
        derivative where it is f(z_t).
        """
        with torch.no_grad():
            layer = trajectory_of(model.core, x_TBI, None, layer=0, reverse=False)
        if layer.gates:
            return {
                "hidden": self._histogram(layer.output, "tanh", "share"),
                "gates": {
                    name: self._histogram(
                        gate,
                        "tanh" if name in ("cell", "new") else "sigmoid",
                        "share",
                        "mean_derivative",
                    )
                    for name, gate in layer.gates.items()
                },
            }
        both = ("share", "mean_derivative")
        f = model.core.nonlinearity
        if isinstance(model.core, RESIDUAL):
            return {
                "hidden": self._histogram(layer.output, "identity"),
                "activation": self._histogram(layer.activations[0], f, *both),
            }
        return {"hidden": self._histogram(layer.output, f, *both)}

    def _histogram(self, values: Tensor, nonlinearity: str, *also: str) -> dict[str, Any]:
        result = saturation(
            values, nonlinearity, threshold=self.config.threshold, bins=self.config.bins
        )
        return {
            "low": float(result.edges[0]),
            "high": float(result.edges[-1]),
            "counts": result.counts.tolist(),
            **{name: getattr(result, name) for name in also},
        }
