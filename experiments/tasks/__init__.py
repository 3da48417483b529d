"""Sequence tasks whose horizon can be set: input, target, cost of ignorance.

Each module of this package whose name does not begin with an underscore is one task; a new file is
found by listing the folder. ``hydra_conf/task/`` holds the choices of each.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from experiments.fields import ConfigError, check, one_of
from experiments.tasks._task import Batch, Task, shown_metric

__all__ = ["TASKS", "Batch", "Task", "build_task", "shown_metric"]


def _only_task(module: ModuleType) -> type[Task]:
    name = module.__name__.rpartition(".")[-1]
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Task)
        and value.__module__ == module.__name__
    ]
    if [task.name for task in found] != [name]:
        raise TypeError(
            f"{module.__file__} must define one subclass of Task, with name = {name!r}; "
            f"got {', '.join(f'{task.__name__} ({task.name!r})' for task in found) or 'none'}"
        )
    return found[0]


TASKS: dict[str, type[Task]] = {
    module.name: _only_task(importlib.import_module(f"{__name__}.{module.name}"))
    for module in pkgutil.iter_modules(__path__)
    if not module.name.startswith("_")
}


def build_task(config: Mapping[str, Any]) -> Task:
    """Build the task that ``config`` (the ``task`` group) names, with its remaining keys.

    Raises:
        ConfigError: an unknown task or key, a value out of range, or data that cannot be read.
    """
    if not isinstance(config, Mapping) or "name" not in config:
        raise ConfigError("task.name is missing from the configuration")
    options = dict(config)
    name = options.pop("name")
    check("task.name", name, one_of(TASKS))
    task = TASKS[name]
    return task(task.Config.parse(options, "task."))
