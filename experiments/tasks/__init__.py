"""Sequence tasks whose horizon can be set: input, target, cost of ignorance.

Each module of this package whose name does not begin with an underscore is one task; a new file is
found by listing the folder. ``hydra_conf/task/`` holds the choices of each.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from experiments import registry
from experiments.fields import parse_one
from experiments.tasks._task import Batch, Task, shown_metric

__all__ = ["TASKS", "Batch", "Task", "build_task", "shown_metric"]


TASKS = registry.find(sys.modules[__name__], Task)


def build_task(config: Mapping[str, Any]) -> Task:
    """Build the task that ``config`` (the ``task`` group) names, with its remaining keys.

    Raises:
        ConfigError: an unknown task or key, a value out of range, or data that cannot be read.
    """
    name, options = parse_one(config, {n: kind.Config for n, kind in TASKS.items()}, "task")
    return _built(name, options)


@lru_cache(maxsize=4)  # the runs of a study share a task, and some tasks read files
def _built(name: str, options: Any) -> Task:
    return TASKS[name](options)
