"""What a run is: every value that affects its numbers, checked, and the identity made of them.

A run is described by plain values (`RunConfig.parse` takes them from Hydra or from a record) and
is the same run however they were spelled: defaults given or left out, 1 or 1.0, a model under a
name of its own or put together from its parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch

from experiments.fields import (
    Config,
    ConfigError,
    check_keys,
    choice,
    flag,
    integer,
    integers,
    optional,
    seed,
    text,
)
from experiments.models import Core, SequenceModel, build_core, new_model
from experiments.optimizers import OptimizerConfig, parse_optimizer
from experiments.probes import Probe, build_probes
from experiments.remedies import Order, Problem, Remedy, build_remedies
from experiments.tasks import Task, build_task

DATA_STREAM = 1_000_000
"""Added to a run's seed for its training data, which must not repeat the draws of its weights."""


@dataclass(frozen=True)
class TrainingConfig(Config):
    """How a model is trained.

    Attributes:
        steps: updates of the weights.
        batch_size: sequences of a batch.
        accumulation: batches whose gradients one update takes the mean of.
        stop_when_solved: end early, at an evaluation that finds the task solved.
    """

    steps: int = integer(1500, at_least=1)
    batch_size: int = integer(64, at_least=1)
    accumulation: int = integer(1, at_least=1)
    stop_when_solved: bool = flag(False)


@dataclass(frozen=True)
class EvaluationConfig(Config):
    """What a model is judged on.

    Attributes:
        seed: of the held-out data, which is the same for every model and seed.
        probe_size: sequences of the batch that probes measure on.
        train_size: sequences of training data that the trained model is evaluated on as well, for
            the gap between training and test.
        every: training steps between two evaluations; null: at the end alone.
        horizons: other lengths to test on as well.
    """

    seed: int = seed(20240)
    probe_size: int = integer(64, at_least=1)
    train_size: int = integer(1000, at_least=1)
    every: int | None = optional(integer(1, at_least=1))
    horizons: tuple[int, ...] = integers(at_least=1, is_empty_allowed=True)


@dataclass(frozen=True)
class NumericsConfig(Config):
    """What the arithmetic is done in, and on."""

    horizon: int = integer(50, at_least=1)
    seed: int = seed(0)
    precision: str = choice("float32", ("float32", "float64", "bfloat16"))
    device: str = text("cpu")
    threads: int = integer(1, at_least=1)


_GROUPS = ("model", "task", "remedy", "optimizer", "probe", "training", "evaluation")
_NUMERICS = ("horizon", "seed", "precision", "device", "threads")
RUN_KEYS = (*_GROUPS, *_NUMERICS)
"""What a run is described by."""


@dataclass(frozen=True)
class RunConfig:
    """One run: a model on a task at one horizon, from one seed, with one budget.

    Attributes:
        label: what the model is called where it is shown; no part of the identity.
        core: the kind of recurrent layer and its options.
        task: what is learned.
        horizon: T, as the task understands it.
        remedies: in the order they apply; those of the model first.
        optimizer, optimizer_config: its name and options.
        probes: what is measured on the way.
        training, evaluation: see there.
        seed: of the weights and, as a separate stream, of the training data.
        precision: of weights and arithmetic; ``bfloat16`` is autocast over float32 weights.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: that torch may use.
    """

    label: str
    core: Core
    task: Task
    horizon: int
    remedies: tuple[Remedy, ...]
    optimizer: str
    optimizer_config: OptimizerConfig
    probes: tuple[Probe, ...]
    training: TrainingConfig
    evaluation: EvaluationConfig
    seed: int
    precision: str
    device: str
    threads: int

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Make a run from plain values, as Hydra composes them or `plain` returns them.

        Raises:
            ConfigError: names the key, what was expected and what came.
        """
        check_keys(values, RUN_KEYS, "")
        model = values.get("model")
        if not isinstance(model, Mapping):
            raise ConfigError(f"model must be a mapping with a core; got {model!r}")
        model = dict(model)
        label = model.pop("name", model.get("core"))
        own = build_remedies(model.pop("remedy", None), "model.remedy")
        core = build_core(model)
        numerics = NumericsConfig.parse({k: values[k] for k in _NUMERICS if k in values})
        optimizer, optimizer_config = parse_optimizer(values.get("optimizer", {"name": "adam"}))
        run = cls(
            label=str(label),
            core=core,
            task=build_task(values.get("task")),
            remedies=_joined(own, build_remedies(values.get("remedy"))),
            optimizer=optimizer,
            optimizer_config=optimizer_config,
            probes=tuple(build_probes(values.get("probe"))),
            training=TrainingConfig.parse(values.get("training", {}), "training."),
            evaluation=EvaluationConfig.parse(values.get("evaluation", {}), "evaluation."),
            **asdict(numerics),
        )
        run._check()
        return run

    def _check(self) -> None:
        self.task.check_horizon("horizon", self.horizon)
        for horizon in self.evaluation.horizons:
            self.task.check_horizon("evaluation.horizons", horizon)
        if self.training.stop_when_solved and self.evaluation.every is None:
            raise ConfigError(
                "training.stop_when_solved needs evaluation.every, the steps between two looks at "
                "the held-out data; got null"
            )
        if self.evaluation.seed == DATA_STREAM + self.seed:
            raise ConfigError(
                f"evaluation.seed must not be that of the training data, {DATA_STREAM} + seed; got "
                f"{self.evaluation.seed}"
            )
        if self.task.is_shown_later and self.core.config.bidirectional:
            raise ConfigError(
                f"model.bidirectional must be false for task {self.task.name}, whose answers later "
                "inputs show; got true"
            )
        _check_device(self.device)
        try:
            model = self._build()  # refuses remedies that do not apply
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            raise ConfigError(f"model cannot be built: {str(error).splitlines()[0]}") from error
        for probe in self.probes:
            probe.check(model, self.task)

    def plain(self) -> dict[str, Any]:
        """Return JSON-ready values from which `parse` makes the same run."""
        return {
            "model": {"core": self.core.name, **asdict(self.core.config)},
            "task": self.task.settings,
            "remedy": {remedy.name: asdict(remedy.config) for remedy in self.remedies},
            "optimizer": {"name": self.optimizer, **asdict(self.optimizer_config)},
            "probe": {probe.name: asdict(probe.config) for probe in self.probes},
            "training": asdict(self.training),
            "evaluation": asdict(self.evaluation),
            **{name: getattr(self, name) for name in _NUMERICS},
        }

    @cached_property
    def identity(self) -> str:
        """16 hexadecimal digits: equal for equal runs, whatever their label.

        Where data lies and which of several GPUs computes do not count; what the data is does.
        """
        values = {
            **self.plain(),
            "task": self.task.identity,
            "device": torch.device(self.device).type,
        }
        text = json.dumps(values, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def folder_name(self) -> str:
        """The name of the run's folder: legible first, the identity at its end."""
        return f"{self.task.name}-T{self.horizon}-{self.core.name}-s{self.seed}-{self.identity}"

    def at(self, *, horizon: int | None = None, seed: int | None = None) -> RunConfig:
        """Return the same run at another horizon or from another seed."""
        run = replace(
            self,
            horizon=self.horizon if horizon is None else horizon,
            seed=self.seed if seed is None else seed,
        )
        run._check()
        return run

    def build_model(self) -> SequenceModel:
        """Build the model, initialised from the seed; torch's global generator is left as it was.

        Weights are drawn on the CPU, so they do not depend on the device.

        Raises:
            ConfigError: a remedy does not apply to it.
        """
        return self._build().to(self.device)

    def _build(self) -> SequenceModel:
        dtype = torch.float64 if self.precision == "float64" else torch.float32
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            model = new_model(self.core, self.task)
            # After every default draw: models that differ in one remedy share the other weights.
            for remedy in self.remedies:
                if remedy.order >= Order.LAYERS:  # before that, the same draws in any precision
                    model.to(dtype)
                remedy.check(model)
                remedy.change(model, Problem(self.task, self.horizon))
        return model.to(dtype)


def _joined(own: list[Remedy], others: list[Remedy]) -> tuple[Remedy, ...]:
    """Join a model's remedies and those of the run, which replace the model's of the same name."""
    by_name = {remedy.name: remedy for remedy in (*own, *others)}
    return tuple(sorted(by_name.values(), key=lambda remedy: (remedy.order, remedy.name)))


def _check_device(value: str) -> None:
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise ConfigError(f"device must be cpu, cuda or cuda:N; got {value!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu, cuda or cuda:N; got {value!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {value!r}, but torch sees {torch.cuda.device_count()} CUDA device(s)"
        )
