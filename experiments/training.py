"""The training loop: fresh batches, gradient clipping, and a record of what happened.

Nothing in the loop waits for the device: losses and gradient norms are written into tensors and
read every ``CHECK_EVERY`` steps, when progress is reported and divergence is noticed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from experiments.tasks import Task

CHECK_EVERY = 50

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, fused=True),
    "rmsprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr, foreach=True),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, fused=True),
}

Progress = Callable[[int, float], None]
"""Called with the number of steps done and the last loss."""


@dataclass(frozen=True)
class TrainingCurve:
    """What training left behind, by step.

    Attributes:
        loss: training loss of each batch, before the update made with it.
        gradient_norm: global norm of the gradient, before clipping.
        diverged_at: first step whose loss or gradient was not finite (training stopped soon
            after), or ``None``.
        seconds: wall-clock time of the loop, data included.
    """

    loss: Tensor
    gradient_norm: Tensor
    diverged_at: int | None
    seconds: float


def train(
    model: nn.Module,
    task: Task,
    horizon: int,
    settings: Mapping[str, Any],
    generator: torch.Generator,
    on_progress: Progress | None = None,
) -> TrainingCurve:
    """Train ``model`` in place on fresh batches of ``task``.

    Args:
        model: maps ``[T, B, I]`` to a prediction; its parameters' device is where training runs.
        task: where batches and the loss come from.
        horizon: passed on to the task.
        settings: the ``training`` section of the configuration.
        generator: a CPU generator, the only source of randomness.
        on_progress: called every ``CHECK_EVERY`` steps and at the end.
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    optimizer = OPTIMIZERS[settings["optimizer"]](parameters, lr=settings["learning_rate"])
    clip_norm, steps = settings["clip_norm"], settings["steps"]
    losses = torch.zeros(steps, device=device)
    norms = torch.zeros(steps, device=device)
    checked = 0
    diverged_at = None
    start = time.perf_counter()
    for step in range(steps):
        x_TBI, target = task.sample(settings["batch_size"], horizon, generator)
        loss = task.loss(model(x_TBI.to(device)), target.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = get_total_norm([p.grad for p in parameters], foreach=True)
        if clip_norm is not None:
            clip_grads_with_norm_(parameters, clip_norm, norm, foreach=True)
        optimizer.step()
        losses[step] = loss.detach()
        norms[step] = norm

        done = step + 1
        if done % CHECK_EVERY == 0 or done == steps:
            finite = (losses[checked:done].isfinite() & norms[checked:done].isfinite()).tolist()
            if on_progress is not None:
                on_progress(done, losses[step].item())
            if not all(finite):
                diverged_at = checked + finite.index(False)
                losses, norms = losses[:done], norms[:done]
                break
            checked = done
    seconds = time.perf_counter() - start
    return TrainingCurve(losses.cpu(), norms.cpu(), diverged_at, seconds)


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, x_TBI: Tensor, target: Tensor) -> float:
    """Return ``task.error`` of the model on held-out data."""
    return task.error(model(x_TBI), target).item()
