"""Checks a composed configuration once, before anything runs; every error names the key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.fields import ConfigError
from experiments.models import CORES, ELMAN_CORES
from experiments.tasks import build_task
from experiments.training import OPTIMIZERS

Check = tuple[str, Callable[[Any], bool]]
"""What is expected, in words, and whether a value is that."""


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _integer(minimum: int) -> Check:
    return (
        f"an integer of at least {minimum}",
        lambda value: _is_integer(value) and value >= minimum,
    )


# A seed also gets a constant added (ladder.DATA_STREAM) and must then fit into 64 bits.
_SEED: Check = (
    "an integer from 0 to 2**32 - 1",
    lambda value: _is_integer(value) and 0 <= value < 2**32,
)


def _one_of(names: Mapping[str, Any] | tuple[str, ...]) -> Check:
    # Not `value in names`: a YAML list or mapping cannot be hashed.
    return f"one of {', '.join(names)}", lambda value: any(value == name for name in names)


def _list_of(item: Check, *, may_be_empty: bool = False) -> Check:
    words, accepts = item
    return (
        f"a{' ' if may_be_empty else ' non-empty '}list without repeats, each {words}",
        lambda value: (
            isinstance(value, list)
            and (may_be_empty or len(value) > 0)
            and all(accepts(x) for x in value)
            and len(set(value)) == len(value)
        ),
    )


def _or_null(check: Check) -> Check:
    words, accepts = check
    return f"{words}, or null", lambda value: value is None or accepts(value)


POSITIVE: Check = ("a number above 0", lambda value: _is_number(value) and value > 0)
FLAG: Check = ("true or false", lambda value: isinstance(value, bool))
NAME: Check = (
    "a non-empty string without '/'",
    lambda value: isinstance(value, str) and value != "" and "/" not in value,
)
TEXT: Check = ("a non-empty string", lambda value: isinstance(value, str) and value != "")

RUN_CHECKS: dict[str, Check] = {
    "name": NAME,
    "seeds": _list_of(_SEED),
    "horizons": _list_of(_integer(1)),
    "contrast_horizons": _list_of(_integer(1), may_be_empty=True),
    "training.optimizer": _one_of(OPTIMIZERS),
    "training.learning_rate": POSITIVE,
    "training.clip_norm": _or_null(POSITIVE),
    "training.batch_size": _integer(1),
    "training.steps": _integer(1),
    "evaluation.seed": _SEED,
    "evaluation.probe_size": _integer(1),
    "workers": _or_null(_integer(1)),
    "output.root": TEXT,
}

ELMAN_CHECKS: dict[str, Check] = {
    "nonlinearity": _one_of(("tanh", "relu", "sigmoid", "identity")),
    "recurrent_init": _one_of(("default", "orthogonal", "identity")),
    "input_std": _or_null(POSITIVE),
    "zero_bias": FLAG,
}
GATED_CHECKS: dict[str, Check] = {
    "gate_bias": (
        "a number, chrono, or null",
        lambda value: value is None or value == "chrono" or _is_number(value),
    ),
}


def validated(config: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain, resolved Python values.

    The top-level ``hydra`` node, if there is one, is left out.

    Raises:
        ConfigError: names the key, what was expected and what came.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        words = "; ".join(line.strip() for line in str(error).splitlines())
        raise ConfigError(f"the configuration cannot be resolved: {words}") from error
    plain.pop("hydra", None)
    for key, check in RUN_CHECKS.items():
        _check(key, _lookup(plain, key), check)
    _check_no_others(
        plain, "", {key.split(".")[0] for key in RUN_CHECKS} | {"model", "task", "device"}
    )
    for section in ("training", "evaluation", "output"):
        known = {key.split(".")[1] for key in RUN_CHECKS if key.startswith(f"{section}.")}
        _check_no_others(plain[section], f"{section}.", known)
    _check_model(plain)
    _check_task(plain)
    _check_device(plain)
    return plain


def _lookup(plain: Any, key: str) -> Any:
    value = plain
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ConfigError(f"{key} is missing from the configuration")
        value = value[part]
    return value


def _check(key: str, value: Any, check: Check) -> None:
    words, accepts = check
    if not accepts(value):
        raise ConfigError(f"{key} must be {words}; got {value!r}")


def _check_no_others(section: Mapping[str, Any], prefix: str, known: set[str]) -> None:
    unknown = sorted(set(section) - known)
    if unknown:
        names = ", ".join(prefix + key for key in unknown)
        raise ConfigError(f"unknown key(s) {names}; known here: {', '.join(sorted(known))}")


def _check_model(plain: dict[str, Any]) -> None:
    model = _lookup(plain, "model")
    _check("model.name", _lookup(plain, "model.name"), NAME)
    core = _lookup(plain, "model.core")
    _check("model.core", core, _one_of(CORES))
    _check("model.hidden_size", _lookup(plain, "model.hidden_size"), _integer(1))
    _check("model.match_parameters", _lookup(plain, "model.match_parameters"), FLAG)
    scheme = dict(ELMAN_CHECKS if core in ELMAN_CORES else GATED_CHECKS)
    if core == "rnn":
        scheme["nonlinearity"] = _one_of(("tanh", "relu"))
    for key, check in scheme.items():
        _check(f"model.{key}", _lookup(plain, f"model.{key}"), check)
    common = {"name", "core", "hidden_size", "match_parameters", "contrasts"}
    _check_no_others(model, "model.", common | set(scheme))

    contrasts = _lookup(plain, "model.contrasts")
    if not isinstance(contrasts, list):
        raise ConfigError(f"model.contrasts must be a list; got {contrasts!r}")
    for index, contrast in enumerate(contrasts):
        prefix = f"model.contrasts[{index}]"
        if not isinstance(contrast, dict) or "label" not in contrast:
            raise ConfigError(f"{prefix} must be a mapping with a label; got {contrast!r}")
        _check(f"{prefix}.label", contrast["label"], TEXT)
        _check_no_others(contrast, f"{prefix}.", {"label", *scheme})
        for key, check in scheme.items():
            if key in contrast:
                _check(f"{prefix}.{key}", contrast[key], check)
    labels = [contrast["label"] for contrast in contrasts]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"model.contrasts must have labels without repeats; got {labels!r}")


def _check_task(plain: dict[str, Any]) -> None:
    task = build_task(_lookup(plain, "task"))
    # With every default filled in: what is recorded says all that affects numbers.
    plain["task"] = task.settings
    for key in ("horizons", "contrast_horizons"):
        for horizon in sorted(plain[key]):
            task.check_horizon(key, horizon)


def _check_device(plain: dict[str, Any]) -> None:
    value = _lookup(plain, "device")
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device must be cpu, cuda or cuda:N; got {value!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu, cuda or cuda:N; got {value!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {value!r}, but torch sees {torch.cuda.device_count()} CUDA device(s)"
        )
