"""Judges a model on data that it was not trained on.

Shape legend: T time steps, B batch, I inputs.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from experiments.batches import on_device
from experiments.config import RunConfig
from experiments.looks import Look
from experiments.models import SequenceModel
from experiments.numerics import autocast, cuda_devices
from experiments.probes import Probe
from experiments.record import Result, Verdict
from experiments.tasks import Batch, shown_metric

SOLVED_BELOW = 0.10
LEARNED_BELOW = 0.25
LEARNED_BESIDE_BASELINES = 0.90
"""Bounds on test error over know-nothing error; ``solved`` runs count as ``learned`` too.

Where there are baselines, these are what has to be beaten. But chance is not learning: guesses at
1000 yes-or-no questions err in less than 90 % of the half of them once in a thousand times.
"""

EVALUATION_NUMBERS = 2**24
"""Input numbers of a piece of test data that is evaluated at once."""


class HeldOut:
    """The data that a model is judged and measured on; the same for every model and seed.

    Attributes:
        test: the test set.
        probe: the batch for probes.
        model: the model that probes measure; its weights are those of the last measurement.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        generator = torch.Generator().manual_seed(run.evaluation.seed)
        test = run.task.test_set(run.horizon, generator)
        self.test = on_device(run, test)
        self.probe = on_device(
            run, run.task.sample(run.evaluation.probe_size, run.horizon, generator)
        )
        self.model = run.build_model()

    def error(self, model: SequenceModel) -> float:
        """Return the test error of a model."""
        return evaluate(model, self._run, self.test)

    def measure(self, model: SequenceModel, probe: Probe) -> dict[str, Any]:
        """Return what a probe measures of a model.

        It measures another model with the same weights, so that nothing it does changes the run.
        """
        run = self._run
        self._copy(model)
        with torch.random.fork_rng(devices=cuda_devices(run)):
            torch.manual_seed(run.evaluation.seed)
            values = probe.measure(self.model, run.task, *self.probe)
        # Plain numbers, whatever numpy made of them: a checkpoint holds no others.
        return json.loads(json.dumps(values))

    def looks(self, model: SequenceModel) -> list[Look]:
        """Return what the task would show of a model; the run does not change."""
        run = self._run
        self._copy(model)
        generator = torch.Generator().manual_seed(run.evaluation.seed + 2)
        return run.task.looks(self.model, run.horizon, generator)

    def _copy(self, model: SequenceModel) -> None:
        self.model.load_state_dict(model.state_dict())
        self.model.eval()
        self.model.core.training = True  # cuDNN's layers have no gradients otherwise

    def result(
        self,
        model: SequenceModel,
        error: float | None,
        *,
        steps: int,
        solved_at: int | None,
        seen: Batch | None = None,
    ) -> Result:
        """Return what is measured of a trained model.

        Args:
            model: it.
            error: its test error; ``None`` if its training diverged.
            steps: of training that were done.
            solved_at: the first of them at which the task was found solved.
            seen: data that it was trained on; by default more of the same kind is drawn.
        """
        run, task, horizon = self._run, self._run.task, self._run.horizon
        nothing = task.know_nothing_error(horizon)
        common: dict[str, Any] = {
            "hidden_size": model.core.hidden_size,
            "parameters": model.num_parameters,
            "steps": steps,
            "solved_at": solved_at,
            "task": task.name,
            "metric": task.metric,
            "know_nothing_loss": task.know_nothing_loss(horizon),
            "know_nothing_error": nothing,
            "dependency": task.dependency(horizon),
        }
        if error is None:
            return Result(**common, verdict="diverged")
        # Not the seed of the test set: a task that draws its data would show the same once more.
        generator = torch.Generator().manual_seed(run.evaluation.seed + 1)
        if seen is None:
            seen = on_device(run, task.sample(run.evaluation.train_size, horizon, generator))
        self._copy(model)
        x_TBI, target = self.test
        baselines = task.baselines(x_TBI, target, horizon)
        with torch.no_grad(), autocast(run):
            measures = task.measures(self.model, x_TBI, target, horizon)
        return Result(
            **common,
            verdict=verdict(error / nothing, *(each / nothing for each in baselines.values())),
            test_error=error,
            test_metric=shown_metric(task, error),
            error_over_know_nothing=error / nothing,
            train_error=evaluate(model, run, seen),
            test_error_at={
                str(other): evaluate(model, run, on_device(run, task.test_set(other, generator)))
                for other in run.evaluation.horizons
            },
            baselines=baselines,
            measures=measures,
        )


def verdict(share: float, *baselines: float) -> Verdict:
    """Judge a run by its test error over that of knowing nothing.

    Args:
        share: it.
        baselines: the same of simple methods; where there are any, what is learned beats them all,
            and chance.
    """
    bound = min(LEARNED_BESIDE_BASELINES, *baselines) if baselines else LEARNED_BELOW
    if share >= bound:
        return "failed"
    return "solved" if share < SOLVED_BELOW else "learned"


@torch.no_grad()
def evaluate(model: SequenceModel, run: RunConfig, batch: Batch) -> float:
    """Return the task's error on a batch, evaluated a piece at a time."""
    x_TBI, target = batch
    task = run.task
    numbers = len(x_TBI) * max(model.core.hidden_size, x_TBI.shape[2])
    size = max(1, EVALUATION_NUMBERS // numbers)
    total, scored = 0.0, 0
    model.eval()
    for x, y in zip(x_TBI.split(size, 1), target.split(size, task.sample_dim), strict=True):
        with autocast(run):
            error = task.judge(model, x, y)
        count = task.scored(y)
        if count:
            total, scored = total + error.item() * count, scored + count
    model.train()
    return total / scored
