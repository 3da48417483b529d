"""Finds what a package offers by listing its folder: one file, one class, one name.

A module whose name begins with an underscore is not a choice. A new file needs no entry anywhere.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any, TypeVar

_Kind = TypeVar("_Kind")


def find(package: ModuleType | Any, kind: type[_Kind]) -> dict[str, type[_Kind]]:
    """Return the subclasses of ``kind`` in the modules of a package, by the names of their files.

    Args:
        package: the ``__name__`` and ``__path__`` of a package, as its module has them.
        kind: the base class; a subclass has its file's name as ``name``.

    Raises:
        TypeError: a file that defines no such class, several, or one of another name.
    """
    return {
        module.name: _only(importlib.import_module(f"{package.__name__}.{module.name}"), kind)
        for module in pkgutil.iter_modules(package.__path__)
        if not module.name.startswith("_")
    }


def _only(module: ModuleType, kind: type[_Kind]) -> type[_Kind]:
    name = module.__name__.rpartition(".")[-1]
    found: list[Any] = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, kind)
        and value.__module__ == module.__name__
    ]
    if [each.name for each in found] != [name]:
        raise TypeError(
            f"{module.__file__} must define one subclass of {kind.__name__}, with name = {name!r}; "
            f"got {', '.join(f'{each.__name__} ({each.name!r})' for each in found) or 'none'}"
        )
    return found[0]
