"""Training data, drawn on the way, from where a checkpoint left off.

Shape legend: T time steps, B batch, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch

from experiments.config import DATA_STREAM, RunConfig
from experiments.tasks import Batch

MOST_AT_ONCE, STEPS_AT_ONCE = 16, 2**16
"""Bounds on the batches that are drawn in one call, and on their time steps over all samples.

Small tensors cost by the call, not by the number: sixteen batches take little longer than one.
"""


class Batches:
    """The training batches of a run, in order.

    Args:
        run: whose task, sizes and seed they follow from.

    Attributes:
        generator: where they are drawn from.
        same: the one batch of full-batch gradient descent, else ``None``.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self.generator = torch.Generator().manual_seed(DATA_STREAM + run.seed)
        size, samples = run.training.batch_size, getattr(run.optimizer_config, "samples", None)
        self._at_once = max(1, min(MOST_AT_ONCE, STEPS_AT_ONCE // (size * run.horizon)))
        self._drawn: list[Batch] = []
        self._before = self.generator.get_state()
        self.same: Batch | None = None
        if samples is not None:
            own = torch.Generator().manual_seed(DATA_STREAM + run.seed)
            self.same = on_device(run, run.task.sample(samples, run.horizon, own))

    def next(self) -> Batch:
        """Return a batch: input ``[T, B, I]``, target; on the run's device, in its precision."""
        if self.same is not None:
            return self.same
        if not self._drawn:
            self._draw()
        return self._drawn.pop()

    def _draw(self) -> None:
        run, size = self._run, self._run.training.batch_size
        self._before = self.generator.get_state()
        x_TBI, target = on_device(
            run, run.task.sample(self._at_once * size, run.horizon, self.generator)
        )
        targets = target.split(size, run.task.sample_dim)
        self._drawn = list(zip(x_TBI.split(size, 1), targets, strict=True))[::-1]

    def state(self) -> dict[str, Any]:
        """Return from where to go on."""
        if not self._drawn:
            return {"generator": self.generator.get_state(), "used": 0}
        return {"generator": self._before, "used": self._at_once - len(self._drawn)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.generator.set_state(state["generator"])
        self._drawn = []
        if state["used"]:
            self._draw()
            del self._drawn[-state["used"] :]


def on_device(run: RunConfig, batch: Batch) -> Batch:
    """Return a batch on the run's device, floats in its precision."""
    dtype = torch.float64 if run.precision == "float64" else torch.float32
    x_TBI, target = (
        tensor.to(run.device, dtype if tensor.is_floating_point() else tensor.dtype)
        for tensor in batch
    )
    return x_TBI, target
