"""Puts the fused kernel beside torch's layer on a study's own problem: same numbers, how fast.

It runs before the study, in the parent process: that also builds the kernels once, before any
worker asks for them, and times both modules while nothing else of the study runs, on one thread as
the workers do.

Shape legend: T time steps, B batch, I inputs.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from experiments.batches import on_device
from experiments.config import DATA_STREAM, RunConfig
from experiments.evaluation import HeldOut
from experiments.fields import ConfigError
from experiments.models import TORCHS, SequenceModel, build_core
from experiments.numerics import use_threads
from experiments.probes.adjoint import Adjoint
from experiments.study import Study
from experiments.tasks import Task

_WARM_UP, _ROUNDS = 3, 15


def compared_with_torch(study: Study) -> list[dict[str, Any]]:
    """Compare each kind of fused core in a study with torch's layer, in its first arm with it.

    Mid-ladder, or where contrasts stand; what is not comparable is left out.
    """
    contrasts = [member for member in study.members if member.contrast_of]
    ladder = [member for member in study.members if not member.contrast_of]
    horizons = sorted({member.run.horizon for member in contrasts or ladder})
    there = [m.run for m in ladder if m.run.horizon == horizons[len(horizons) // 2]]
    checks: dict[str, dict[str, Any]] = {}
    for run in there or [ladder[0].run]:
        if run.core.name not in checks and (check := compare_with_torch(run)) is not None:
            checks[run.core.name] = check
    return list(checks.values())


def compare_with_torch(run: RunConfig) -> dict[str, Any] | None:
    """Compare a run's model, before training, with the same on torch's layer.

    Returns:
        The name of torch's layer (``torch``); relative differences (largest absolute difference
        over largest absolute value) of predictions, parameter gradients and the adjoint profile;
        the median milliseconds of one forward and backward pass of each. ``None`` if the model is
        not on the fused kernel (or a remedy put another layer in its place) or torch lacks its
        nonlinearity.
    """
    options = run.plain()["model"]
    if options["core"] not in TORCHS:
        return None
    try:
        core = build_core({**options, "core": TORCHS[options["core"]]})
    except ConfigError:  # a nonlinearity that torch lacks
        return None
    with use_threads(1):
        fused, plain = run.build_model(), replace(run, core=core).build_model()
        if not isinstance(plain.core, nn.RNNBase):
            return None
        x_TBI, target = HeldOut(run).probe
        probe = Adjoint(Adjoint.Config())
        profiles = [
            torch.tensor(probe.measure(m, run.task, x_TBI, target)["state_norm"])
            for m in (fused, plain)
        ]
        gradients = [_gradients(m, run.task, x_TBI, target) for m in (fused, plain)]
        difference = {
            "prediction": _difference(fused(x_TBI), plain(x_TBI)),
            "gradients": max(map(_difference, *gradients)),
            "adjoint_profile": _difference(*profiles),
        }
        fused_seconds, plain_seconds = _time(fused, plain, run)
    return {
        "torch": plain.core_name,
        "horizon": run.horizon,
        "relative_difference": difference,
        "fused_milliseconds": 1e3 * fused_seconds,
        "torch_milliseconds": 1e3 * plain_seconds,
    }


def _gradients(model: SequenceModel, task: Task, x_TBI: Tensor, target: Tensor) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(task.loss(model(x_TBI), target), parameters))


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def _time(fused: SequenceModel, plain: SequenceModel, run: RunConfig) -> tuple[float, float]:
    """Return the median seconds of a forward and backward pass of each, taken in turns."""
    generator = torch.Generator().manual_seed(DATA_STREAM + run.seed)
    batch = run.task.sample(run.training.batch_size, run.horizon, generator)
    x_TBI, target = on_device(run, batch)
    device = torch.device(run.device)
    seconds: dict[SequenceModel, list[float]] = {fused: [], plain: []}
    for _ in range(_WARM_UP + _ROUNDS):
        for model, taken in seconds.items():
            start = time.perf_counter()
            _gradients(model, run.task, x_TBI, target)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
    return median(seconds[fused][_WARM_UP:]), median(seconds[plain][_WARM_UP:])
