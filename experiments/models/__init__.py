"""Models: a recurrent core of some kind under a linear readout.

Each module of this package whose name does not begin with an underscore is one kind of core; a new
file is found by listing the folder. ``hydra_conf/model/`` holds the choices: a core, and for some
the remedies that it goes by a name of its own with (``irnn``, ``lstm_chrono``).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from experiments import registry
from experiments.fields import parse_one
from experiments.models._model import (
    GATED,
    PLAIN,
    RECURRENT,
    RESIDUAL,
    TORCHS,
    Core,
    CoreConfig,
    SequenceModel,
)
from experiments.tasks import Task

__all__ = [
    "CORES",
    "GATED",
    "PLAIN",
    "RECURRENT",
    "RESIDUAL",
    "TORCHS",
    "Core",
    "CoreConfig",
    "SequenceModel",
    "build_core",
    "new_model",
]

CORES = registry.find(sys.modules[__name__], Core)


def build_core(config: Mapping[str, Any]) -> Core:
    """Return the kind of core that ``config`` names as ``core``, with its remaining keys.

    Raises:
        ConfigError: an unknown core or key, or a value out of range.
    """
    name, options = parse_one(
        config, {n: kind.Config for n, kind in CORES.items()}, "model", "core"
    )
    return CORES[name](options)


def new_model(core: Core, task: Task) -> SequenceModel:
    """Build a model for a task, with weights from torch's global generator."""
    hidden_size = core.hidden_size(task.input_size, task.output_size)
    return SequenceModel(core.build(task.input_size, hidden_size), task.output_size, task.reads)
