"""What U by itself says about the gradient, beside what becomes of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from experiments.models import PLAIN, RECURRENT, SequenceModel
from experiments.probes._probe import Probe, as_json, recorded
from experiments.tasks import Task
from rnn_cuda.cells import recurrent_matrix
from rnn_cuda.instruments import recurrent_spectrum

LARGEST_DERIVATIVE = {"tanh": 1.0, "relu": 1.0, "sigmoid": 0.25, "identity": 1.0, "softplus": 1.0}


class Spectrum(Probe):
    """Eigenvalues and singular values of the matrix that h_{t-1} is multiplied by.

    That is U, but ``M - M^T - gamma I`` in an antisymmetric layer.
    """

    name = "spectrum"
    layers = RECURRENT

    def measure(
        self, model: SequenceModel, task: Task, x_TBI: Tensor, target: Tensor
    ) -> dict[str, Any]:
        """Return what `rnn_cuda.instruments.recurrent_spectrum` does, and two numbers more.

        ``matrices`` has, by layer and direction (``l0``, ``l0_reverse``), lists with a value per
        gate. ``first_adjoint`` is the norm of the adjoint (of ``(h, c)``) at the first step, of
        each sample's own loss, the mean over the batch. ``margin`` is ``1 - sigma_max max f'`` of
        the lowest layer: above zero its gradient is sure to vanish (Pascanu et al. 2013). Only
        plain Elman layers have one, others ``None``.
        """
        core = model.core
        suffixes = ("", "_reverse")[: model.directions]
        names = [f"l{layer}{suffix}" for layer in range(core.num_layers) for suffix in suffixes]
        matrices = {}
        for name in names:
            weight = getattr(core, f"weight_hh_{name}").detach()
            spectrum = recurrent_spectrum(recurrent_matrix(core, weight))
            matrices[name] = {key: as_json(value) for key, value in spectrum._asdict().items()}
        flow = recorded(model, task, x_TBI, target)
        margin = None
        if isinstance(core, PLAIN):
            bound = matrices["l0"]["largest_singular_value"][0]
            margin = 1 - bound * LARGEST_DERIVATIVE[core.nonlinearity]
        return {
            "matrices": matrices,
            "first_adjoint": as_json(flow.joint_adjoint_norm["core.l0"][0].mean()),
            "margin": margin,
        }
