"""The study: one model at growing horizons, and contrast arms beside it.

An *arm* is a model at one horizon. Each arm is trained once per seed; before and after training the
adjoint profile is taken on a probe batch that every arm, model and seed of that horizon shares.
Whatever this module returns is JSON-ready, apart from the loss curves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from experiments.gradient_flow import adjoint_profile, first_to_last_ratio, log10_or_none
from experiments.models import SequenceModel, build_model
from experiments.tasks import Batch, Task, build_task, shown_metric
from experiments.training import evaluate, train
from rnn_cuda import backend

SOLVED_BELOW = 0.10
LEARNED_BELOW = 0.25
"""Bounds on test error over know-nothing error; ``solved`` runs count as ``learned`` too."""

DATA_STREAM = 1_000_000
"""Added to a run's seed for its training data, which must not repeat the draws of its weights."""

Verdict = str
"""``solved``, ``learned``, ``failed``, or ``diverged`` (a loss or gradient was not finite)."""


@dataclass(frozen=True)
class Arm:
    """One model at one horizon.

    Attributes:
        label: the model's name on the ladder, the contrast's label beside it.
        horizon: T, as the task understands it.
        model: keys of the ``model`` group, the contrast's changes applied.
        is_contrast: whether it stands beside the ladder.
    """

    label: str
    horizon: int
    model: Mapping[str, Any]
    is_contrast: bool

    @property
    def title(self) -> str:
        """Short name for progress and tables, e.g. ``T=50 orthogonal``."""
        return f"T={self.horizon} {self.label}" if self.is_contrast else f"T={self.horizon}"


def build_arms(config: Mapping[str, Any]) -> list[Arm]:
    """Return the arms of a validated configuration: the ladder, then the contrasts."""
    model = {key: value for key, value in config["model"].items() if key != "contrasts"}
    ladder = [Arm(model["name"], horizon, model, False) for horizon in sorted(config["horizons"])]
    contrasts = [
        Arm(
            changes["label"],
            horizon,
            {**model, **{key: value for key, value in changes.items() if key != "label"}},
            True,
        )
        for horizon in sorted(config["contrast_horizons"])
        for changes in config["model"]["contrasts"]
    ]
    return ladder + contrasts


def run_arm(
    config: Mapping[str, Any], arm: Arm, seed: int, report: Callable[[tuple[int, float]], None]
) -> dict[str, Any]:
    """Train one arm from one seed; return what was measured.

    Args:
        config: the validated configuration.
        arm: what to train.
        seed: seeds the weights and, as a separate stream, the training data.
        report: told ``(steps done, last loss)`` now and then.
    """
    task = build_task(config["task"])
    device = torch.device(config["device"])
    model = build_model(arm.model, task, arm.horizon, seed, device)
    probe, test = held_out(config, task, arm.horizon, device)
    initial = measure_profile(model, task, probe)
    curve = train(
        model,
        task,
        arm.horizon,
        config["training"],
        torch.Generator().manual_seed(DATA_STREAM + seed),
        lambda step, loss: report((step, loss)),
    )
    error = evaluate(model, task, *test) if curve.diverged_at is None else float("nan")
    share = error / task.know_nothing_error(arm.horizon)
    return {
        "seed": seed,
        "test_error": error,
        "test_metric": shown_metric(task, error),
        "error_over_know_nothing": share,
        "verdict": verdict(share, curve.diverged_at),
        "diverged_at_step": curve.diverged_at,
        "initial": initial,
        "trained": measure_profile(model, task, probe),
        "hidden_size": model.core.hidden_size,
        "parameters": model.num_parameters,
        "backend": backend.describe()["decisions"],
        "training_seconds": curve.seconds,
        "loss": curve.loss.tolist(),
        "gradient_norm": curve.gradient_norm.tolist(),
    }


def held_out(
    config: Mapping[str, Any], task: Task, horizon: int, device: torch.device
) -> tuple[Batch, Batch]:
    """Return the probe batch and the test set of a horizon; they depend on nothing else."""
    generator = torch.Generator().manual_seed(config["evaluation"]["seed"])
    test = task.test_set(horizon, generator)
    probe = task.sample(config["evaluation"]["probe_size"], horizon, generator)
    return tuple((x.to(device), y.to(device)) for x, y in (probe, test))


def measure_profile(model: SequenceModel, task: Task, probe: Batch) -> dict[str, Any]:
    """Return the mean adjoint norm by time step, and the ratio of its first to its last entry."""
    profile = adjoint_profile(model, task, *probe)
    state = profile.mean_state()
    ratio = first_to_last_ratio(state)
    return {
        "state_norm": state,
        "hidden_norm": profile.mean_hidden(),
        "ratio_first_to_last": ratio,
        "log10_ratio": log10_or_none(ratio),
    }


def verdict(share: float, diverged_at: int | None) -> Verdict:
    """Judge a run by its test error over the know-nothing error."""
    if diverged_at is not None:
        return "diverged"
    if share < SOLVED_BELOW:
        return "solved"
    return "learned" if share < LEARNED_BELOW else "failed"


def summarise_arm(
    config: Mapping[str, Any], task: Task, arm: Arm, runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what tables, figures and conclusions need of an arm's runs (one per seed)."""
    verdicts = [run["verdict"] for run in runs]
    learned = sum(v in ("solved", "learned") for v in verdicts)
    return {
        "label": arm.label,
        "title": arm.title,
        "horizon": arm.horizon,
        "lags": len(runs[0]["initial"]["state_norm"]) - 1,
        "is_contrast": arm.is_contrast,
        "model": dict(arm.model),
        "hidden_size": runs[0]["hidden_size"],
        "parameters": runs[0]["parameters"],
        "know_nothing_error": task.know_nothing_error(arm.horizon),
        "know_nothing_loss": task.know_nothing_loss(arm.horizon),
        "solved": verdicts.count("solved"),
        "learned": learned,
        "diverged": verdicts.count("diverged"),
        "majority_learned": learned * 2 > len(runs),
        "median_milliseconds_per_step": 1e3
        * median(run["training_seconds"] / len(run["loss"]) for run in runs),
        "runs": [
            {key: value for key, value in run.items() if key not in ("loss", "gradient_norm")}
            for run in runs
        ],
    }
