"""Puts the fused kernel beside ``torch.nn.RNN`` on a study's own problem: same numbers, how fast.

It runs before the study, in the parent process: that also builds the kernels once, before any
worker asks for them, and times both modules while nothing else of the study runs, on one thread as
the workers do.

Shape legend: T time steps, B batch, I inputs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from experiments.gradient_flow import adjoint_profile
from experiments.ladder import held_out
from experiments.models import SequenceModel, build_model
from experiments.tasks import Task, build_task
from experiments.workers import one_thread

_WARM_UP, _ROUNDS = 3, 15


def compare_with_torch(config: Mapping[str, Any], horizon: int) -> dict[str, Any] | None:
    """Compare the configured model with the same on ``torch.nn.RNN``, at one horizon.

    Returns:
        Relative differences (largest absolute difference over largest absolute value) of
        predictions, parameter gradients and the adjoint profile, and the median milliseconds of one
        forward and backward pass of each; ``None`` if the model is not on the fused kernel or
        ``torch.nn.RNN`` lacks its nonlinearity.
    """
    model = config["model"]
    if model["core"] != "fused_rnn" or model["nonlinearity"] not in ("tanh", "relu"):
        return None
    task, device, seed = (
        build_task(config["task"]),
        torch.device(config["device"]),
        config["seeds"][0],
    )
    fused = build_model(model, task, horizon, seed, device)
    plain = build_model({**model, "core": "rnn"}, task, horizon, seed, device)
    (x_TBI, target), _ = held_out(config, task, horizon, device)
    profiles = [adjoint_profile(m, task, x_TBI, target).state for m in (fused, plain)]
    gradients = [_gradients(m, task, x_TBI, target) for m in (fused, plain)]
    with one_thread():
        fused_seconds, plain_seconds = _time(fused, plain, config, task, horizon, device)
    return {
        "horizon": horizon,
        "relative_difference": {
            "prediction": _difference(fused(x_TBI), plain(x_TBI)),
            "gradients": max(map(_difference, *gradients)),
            "adjoint_profile": _difference(*profiles),
        },
        "fused_milliseconds": 1e3 * fused_seconds,
        "torch_milliseconds": 1e3 * plain_seconds,
    }


def _gradients(model: SequenceModel, task: Task, x_TBI: Tensor, target: Tensor) -> list[Tensor]:
    loss = task.loss(model(x_TBI), target)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def _time(
    fused: SequenceModel,
    plain: SequenceModel,
    config: Mapping[str, Any],
    task: Task,
    horizon: int,
    device: torch.device,
) -> tuple[float, float]:
    """Return the median seconds of a forward and backward pass of each, taken in turns."""
    generator = torch.Generator().manual_seed(config["seeds"][0])
    x_TBI, target = task.sample(config["training"]["batch_size"], horizon, generator)
    x_TBI, target = x_TBI.to(device), target.to(device)
    seconds: dict[SequenceModel, list[float]] = {fused: [], plain: []}
    for _ in range(_WARM_UP + _ROUNDS):
        for model, taken in seconds.items():
            start = time.perf_counter()
            _gradients(model, task, x_TBI, target)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
    return median(seconds[fused][_WARM_UP:]), median(seconds[plain][_WARM_UP:])
