"""Packages that only some studies need: extras of ``pyproject.toml``."""

from __future__ import annotations

from importlib.util import find_spec

from experiments.fields import ConfigError

_EXTRAS = {
    "submitit": "cluster",
    "optuna": "search",
    "tensorboard": "tensorboard",
    "babel": "scenarios",
}


def require(module: str, wanted_by: str) -> None:
    """Raise `ConfigError` unless a package is installed, with the command that installs it.

    Args:
        module: the package.
        wanted_by: what needs it, as it stands on the command line.
    """
    if find_spec(module) is None:
        raise ConfigError(
            f"{wanted_by} needs {module}, which is not installed: "
            f'pip install -e ".[{_EXTRAS[module]}]"'
        )
