"""Optimizers by name, and how their learning rate changes over a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from experiments.fields import (
    Config,
    ConfigError,
    choice,
    flag,
    fraction,
    integer,
    number,
    optional,
    parse_one,
    positive,
)
from rnn_cuda.remedies import parameter_groups


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """Options that all optimizers have.

    Attributes:
        learning_rate: at its highest.
        schedule: ``constant``; ``cosine``, to 0 at the last step; ``step``, a tenth of what it was
            from half of the steps and again from three quarters; ``linear``, to 0 at the last step.
        warmup: steps over which the rate rises linearly before that.
        orthogonal_factor: the rate of orthogonally parametrized weights over that of the others.
    """

    learning_rate: float = positive(3e-3)
    schedule: str = choice("constant", ("constant", "cosine", "step", "linear"))
    warmup: int = integer(0, at_least=0)
    orthogonal_factor: float = positive(0.1)


@dataclass(frozen=True)
class SGDConfig(OptimizerConfig):
    """Gradient descent.

    Attributes:
        momentum: of Polyak's heavy ball; 0 for none.
        nesterov: Nesterov's form of it.
        samples: train on this many sequences, all of them in every step (full-batch gradient
            descent); null: a fresh batch in every step.
    """

    momentum: float = number(0.0, at_least=0.0, at_most=1.0)
    nesterov: bool = flag(False)
    samples: int | None = optional(integer(1, at_least=1))

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ConfigError("optimizer.nesterov=true needs an optimizer.momentum above 0; got 0")


@dataclass(frozen=True)
class AdamConfig(OptimizerConfig):
    """Adam (Kingma & Ba 2015)."""

    beta1: float = fraction(0.9)
    beta2: float = fraction(0.999)


@dataclass(frozen=True)
class AdamWConfig(AdamConfig):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    weight_decay: float = number(0.01, at_least=0.0)


@dataclass(frozen=True)
class RMSpropConfig(OptimizerConfig):
    """RMSprop (Tieleman & Hinton 2012); ``smoothing`` is torch's alpha."""

    smoothing: float = fraction(0.99)
    momentum: float = number(0.0, at_least=0.0, at_most=1.0)


CONFIGS: dict[str, type[OptimizerConfig]] = {
    "sgd": SGDConfig,
    "adam": AdamConfig,
    "adamw": AdamWConfig,
    "rmsprop": RMSpropConfig,
}

_Build = Callable[[list[dict[str, Any]], Any], torch.optim.Optimizer]

_BUILD: dict[str, _Build] = {
    "sgd": lambda groups, c: torch.optim.SGD(
        groups, momentum=c.momentum, nesterov=c.nesterov, fused=True
    ),
    "adam": lambda groups, c: torch.optim.Adam(groups, betas=(c.beta1, c.beta2), fused=True),
    "adamw": lambda groups, c: torch.optim.AdamW(
        groups, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay, fused=True
    ),
    "rmsprop": lambda groups, c: torch.optim.RMSprop(
        groups, alpha=c.smoothing, momentum=c.momentum, foreach=True
    ),
}


def parse_optimizer(config: Mapping[str, Any]) -> tuple[str, OptimizerConfig]:
    """Return the name of an optimizer, and its options.

    Raises:
        ConfigError: an unknown optimizer or key, or a value out of range.
    """
    name, options = parse_one(config, CONFIGS, "optimizer")
    assert isinstance(options, OptimizerConfig)
    return name, options


def build_optimizer(name: str, config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer for all parameters of a model.

    Args:
        name: one of `CONFIGS`.
        config: its options.
        model: what is trained.
    """
    groups = parameter_groups(model, config.learning_rate, config.orthogonal_factor)
    for group in groups:
        group["highest_lr"] = group["lr"]
    return _BUILD[name](groups, config)


def set_rate(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, steps: int
) -> None:
    """Set the learning rates of a step, counted from 0, of a run of so many."""
    factor = rate(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = group["highest_lr"] * factor


def rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0, over ``config.learning_rate``."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * min(1.0, progress))) / 2
    if config.schedule == "linear":
        return max(0.0, 1 - progress)
    if config.schedule == "step":
        return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
    return 1.0
