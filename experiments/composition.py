"""Where the configuration lies, and what Hydra says of one that it cannot compose, in one line."""

from __future__ import annotations

from pathlib import Path

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.fields import nearest

CONFIGURATION = Path(__file__).resolve().parents[1] / "hydra_conf"


def is_of_hydra(error: BaseException) -> bool:
    """Return whether Hydra could not compose a configuration; for some reasons it says ValueError."""
    return isinstance(error, HydraException | OmegaConfBaseException) or (
        str(error).startswith("Config group override")
    )


def explained(error: BaseException) -> str:
    """Return an error of Hydra's in one line, with the nearest right name where there is one."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    # Of the last cause the first line; the others of OmegaConf's are for its developers.
    words = ": ".join(dict.fromkeys(str(cause).splitlines()[0] for cause in (error, causes[-1])))
    for cause in causes:
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            group, _, name = cause.missing_cfg_file.rpartition("/")
            options = sorted(path.stem for path in (CONFIGURATION / group).glob("*.yaml"))
            if group and options:
                known = ", ".join(options)
                return f"{group} must be one of {known}; got {name}{nearest(name, options)}"
        parent = getattr(cause, "parent_node", None)
        key = getattr(cause, "key", None)
        if parent is not None and isinstance(key, str) and isinstance(parent, DictConfig):
            known = [str(name) for name in parent]
            prefix = cause.full_key.removesuffix(key)  # type: ignore[attr-defined]
            if prefix in ("remedy.", "probe.", "arms."):  # any number of names
                return f"there is no {prefix}{key} in this study; +{prefix}{key}=... adds one"
            if key not in known:
                return (
                    f"unknown key {cause.full_key}; known here: {', '.join(sorted(known))}"  # type: ignore[attr-defined]
                    f"{nearest(key, tuple(known), prefix)}"
                )
    return words
