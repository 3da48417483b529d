"""A study is a grid of runs, and what is asked of their records.

The grid: *arms*, each a model or setting with a label, by horizons, by seeds. An arm differs from
the command line in Hydra overrides (``arms`` of the study) or in keys of the model (``contrasts``
of the model, which run at ``contrast_horizons``). Runs that two arms or studies have in common are
made once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import extras
from experiments.composition import composed, override_key
from experiments.config import RUN_KEYS, RunConfig
from experiments.expectations import parse_expected
from experiments.fields import (
    LARGEST_SEED,
    Config,
    ConfigError,
    check,
    check_keys,
    choice,
    flag,
    integer,
    integers,
    mapping,
    names,
    nearest,
    one_of,
    optional,
    positive,
    text,
)
from experiments.record import Record
from experiments.tasks import build_task

RECORDS = "records"
"""The folder, below the output's root, that holds the folders of all runs."""


@dataclass(frozen=True)
class StudyConfig(Config):
    """What a study is beside the settings that its runs share.

    Attributes:
        name: of the study; text.
        about: a sentence on what it asks.
        seeds: each seeds initialisation and training data; every arm runs all of them.
        horizons: every arm runs all of them.
        contrast_horizons: where the model's contrasts are run as well.
        budget: which of the study's ``budgets`` its settings are taken from.
        figures: of `experiments.figures.FIGURES`, those that answer what it asks.
    """

    name: str = text("study")
    about: str = text("-")
    seeds: tuple[int, ...] = integers((0,), at_least=0, at_most=LARGEST_SEED)
    horizons: tuple[int, ...] = integers((50,), at_least=1)
    contrast_horizons: tuple[int, ...] = integers(at_least=1, is_empty_allowed=True)
    budget: str = text("full")
    figures: tuple[str, ...] = names(("ladder", "loss_curves"))


@dataclass(frozen=True)
class ExecutionConfig(Config):
    """How runs are made; changes no number.

    Attributes:
        workers: processes; null: one per core, and one for a GPU.
        launcher: ``processes`` of this machine, jobs of ``slurm``, or ``submitit_local``: the same
            jobs, as processes of this machine.
        retry: make runs again whose record says that they failed.
        checkpoint_seconds: the least time between two checkpoints of a run.
        tensorboard: write what is logged for TensorBoard too, in the folder of each run.
    """

    workers: int | None = optional(integer(1, at_least=1))
    launcher: str = choice("processes", ("processes", "slurm", "submitit_local"))
    retry: bool = flag(False)
    checkpoint_seconds: float = positive(30.0)
    tensorboard: bool = flag(False)


@dataclass(frozen=True)
class SlurmConfig(Config):
    """What each job asks SLURM for; null: the cluster's default.

    Attributes:
        partition: where jobs run.
        timeout_min: after so many minutes a job is saved, and waits for its next turn.
        max_num_timeout: how often it may.
        signal_delay_s: it is told so many seconds before its end.
        mem_gb, cpus_per_task, gpus_per_node: of one job, which is one run.
        array_parallelism: jobs at a time; null: `workers`, else 256 on SLURM, one per core here.
        extra: other options of submitit's executor, such as account and qos; those that it lacks
            go below additional_parameters.
    """

    partition: str | None = optional(text("main"))
    timeout_min: int = integer(60, at_least=1)
    max_num_timeout: int = integer(100, at_least=0)
    signal_delay_s: int = integer(90, at_least=1)
    mem_gb: float | None = optional(positive(4.0))
    cpus_per_task: int | None = optional(integer(1, at_least=1))
    gpus_per_node: int | None = optional(integer(1, at_least=0))
    array_parallelism: int | None = optional(integer(256, at_least=1))
    extra: Mapping[str, Any] = mapping()


@dataclass(frozen=True)
class OutputConfig(Config):
    """Where folders are made: ``runs`` and ``multirun`` below ``root``."""

    root: str = text(".")


@dataclass(frozen=True)
class Member:
    """One run of a study.

    Attributes:
        label: of its arm.
        run: what is run.
        contrast_of: the label of the arm beside which this one stands at a few horizons, if it is
            a contrast.
        folder: of the run.
    """

    label: str
    run: RunConfig
    contrast_of: str | None
    folder: Path

    @property
    def title(self) -> str:
        """Arm and horizon in a few words."""
        return f"T={self.run.horizon} {self.label}"

    def record(self) -> Record | None:
        """Return the run's record, or ``None`` if it has not ended.

        Raises:
            experiments.record.RecordError: it cannot be read.
        """
        with suppress(FileNotFoundError):
            return Record.load(self.folder)
        return None


@dataclass(frozen=True)
class Study:
    """A study, checked.

    Attributes:
        config: name and axes.
        execution: how its runs are made.
        members: its runs, arm by arm; ladder first, contrasts last.
        root: where folders of runs are.
        expected: what is known of it beforehand, as the study's YAML has it.
        slurm: what jobs ask for, where the launcher makes jobs.
    """

    config: StudyConfig
    execution: ExecutionConfig
    members: tuple[Member, ...]
    root: Path
    expected: Mapping[str, Any] = field(default_factory=dict)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    @property
    def runs(self) -> list[Member]:
        """One member for each run; arms can have runs in common."""
        first: dict[str, Member] = {}
        for member in self.members:
            first.setdefault(member.run.identity, member)
        return list(first.values())

    @property
    def reference(self) -> Member:
        """The member that stands for the study where one is enough."""
        return self.members[0]


_STUDY = tuple(StudyConfig.__dataclass_fields__)
_EXECUTION = tuple(ExecutionConfig.__dataclass_fields__)
_SHARED = tuple(key for key in RUN_KEYS if key not in ("horizon", "seed"))
_OTHERS = ("arms", "budgets", "expected", "slurm", "output")
_KEYS = (*_STUDY, *_SHARED, *_EXECUTION, *_OTHERS)

_MAPPINGS = ("remedy", "probe", "training", "evaluation", *_OTHERS)


def _typed(key: str) -> tuple[str, Any, Any]:
    """Return a field of the schema: a key of ``config.yaml``.

    Values are checked by the classes that they become, which say more than OmegaConf can: the
    range, the choices, the nearest right name.
    """
    if key in _MAPPINGS:
        return key, dict[str, Any], field(default_factory=dict)
    if key in ("name", "about"):
        return key, str, getattr(StudyConfig, key)
    return key, Any, None


ConfigStore.instance().store(name="schema", node=make_dataclass("Schema", map(_typed, _KEYS)))


def parse_study(config: DictConfig, overrides: Sequence[str] = ()) -> Study:
    """Make a study from a configuration that Hydra composed.

    Args:
        config: composed from ``hydra_conf/config.yaml``.
        overrides: those that it was composed with; arms are composed with them too.

    Raises:
        ConfigError: names the key, what was expected and what came.
    """
    _check_budget(config)
    values = resolved(config)
    check_keys(values, (*_KEYS, "hydra"), "")
    study = StudyConfig.parse({key: values[key] for key in _STUDY if key in values})
    _check_figures(study.figures)
    execution = ExecutionConfig.parse({key: values[key] for key in _EXECUTION if key in values})
    slurm = SlurmConfig.parse(values.get("slurm") or {}, "slurm.")
    if execution.launcher != "processes":
        extras.require("submitit", f"launcher={execution.launcher}")
    if execution.tensorboard:
        extras.require("tensorboard", "tensorboard=true")
    root = Path(OutputConfig.parse(values.get("output", {}), "output.").root)
    expected = values.get("expected") or {}
    parse_expected(expected)
    arms = values.get("arms") or {}
    if not isinstance(arms, Mapping):
        raise ConfigError(f"arms must be a mapping from labels to overrides; got {arms!r}")
    settings = [
        (str(label), _composed(label, changes, overrides), None) for label, changes in arms.items()
    ] or [(_name(values), values, None)]
    settings += [
        (label, changed, _name(values))
        for label, changed in _contrasts(values)
        if study.contrast_horizons
    ]
    members = []
    for label, own, contrast_of in settings:
        key = "horizons" if contrast_of is None else "contrast_horizons"
        horizons = sorted(getattr(study, key))
        for horizon in horizons:
            build_task(own.get("task")).check_horizon(key, horizon)
        first = {"horizon": horizons[0], "seed": study.seeds[0]}
        run = RunConfig.parse({**_run_values(own), **first})
        for horizon in horizons:
            run = run.at(horizon=horizon)
            for seed in study.seeds:
                its = run.at(seed=seed)
                folder = root / "runs" / RECORDS / its.folder_name
                members.append(Member(label, its, contrast_of, folder))
    return Study(study, execution, tuple(members), root, expected, slurm)


def _check_figures(named: Sequence[str]) -> None:
    from experiments.figures import FIGURES  # matplotlib, which processes that make runs do without

    for name in named:
        check("figures", name, one_of(FIGURES))


def _check_budget(config: DictConfig) -> None:
    """Refuse a budget that the study does not have; its settings could not be resolved."""
    budget = config.get("budget")
    known = [str(name) for name in config.get("budgets") or ("full", "fast", "smoke")]
    if budget not in known:
        raise ConfigError(
            f"budget must be one of {', '.join(known)}; got {budget!r}{nearest(budget, known)}"
        )


def resolved(config: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain, resolved Python values.

    Raises:
        ConfigError: a value cannot be resolved, or is missing.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        words = "; ".join(line.strip() for line in str(error).splitlines())
        raise ConfigError(f"the configuration cannot be resolved: {words}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _run_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a study's configuration that describes a run."""
    run = {key: values[key] for key in _SHARED if key in values}
    model = dict(_model(values))
    model.pop("contrasts", None)
    return {**run, "model": model}


def _model(values: Mapping[str, Any]) -> Mapping[str, Any]:
    model = values.get("model")
    if not isinstance(model, Mapping):
        raise ConfigError(f"model must be a mapping with a core; got {model!r}")
    return model


def _name(values: Mapping[str, Any]) -> str:
    model = _model(values)
    name = model.get("name", model.get("core"))
    if not isinstance(name, str) or not name:
        raise ConfigError(f"model.name must be a non-empty string; got {name!r}")
    return name


def _contrasts(values: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return label and configuration of each contrast of the model."""
    model = dict(_model(values))
    contrasts = model.pop("contrasts", None) or []
    if not isinstance(contrasts, list):
        raise ConfigError(f"model.contrasts must be a list; got {contrasts!r}")
    found = []
    for index, contrast in enumerate(contrasts):
        key = f"model.contrasts[{index}]"
        if not isinstance(contrast, Mapping) or not isinstance(contrast.get("label"), str):
            raise ConfigError(f"{key} must be a mapping with a label; got {contrast!r}")
        changes = {name: value for name, value in contrast.items() if name != "label"}
        if changes.get("name") is not None or changes.get("core") is not None:
            raise ConfigError(f"{key} must keep the model's name and core; got {contrast!r}")
        found.append((contrast["label"], {**values, "model": {**model, **changes}}))
    labels = [label for label, _ in found]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"model.contrasts must have labels without repeats; got {labels!r}")
    return found


def _composed(label: Any, changes: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """Compose the configuration of an arm: that of the command line, changed."""
    key = f"arms[{label!r}]"
    if not isinstance(changes, list) or not all(isinstance(change, str) for change in changes):
        raise ConfigError(f"{key} must be a list of overrides, such as model=lstm; got {changes!r}")
    set_here = {override_key(change) for change in changes}
    for name in set_here:
        check(f"{key}: what an override changes", name.split(".")[0], one_of(_SHARED))
    for override in overrides:
        name = override_key(override)
        if name in set_here:
            raise ConfigError(f"{name} is what the arms of this study differ in; got {override}")
    return resolved(composed([*overrides, *changes], where=f"{key}: "))
