"""Where the configuration lies, and what is wrong with one that Hydra cannot compose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.fields import ConfigError, nearest

CONFIGURATION = Path(__file__).resolve().parents[1] / "hydra_conf"


def composed(overrides: Sequence[str], where: str = "") -> DictConfig:
    """Compose ``config.yaml`` with overrides; Hydra must be initialised.

    Args:
        overrides: as they stand on the command line.
        where: what stands before an error.

    Raises:
        ConfigError: Hydra cannot compose it; one line, with the nearest right name.
    """
    try:
        return compose("config", list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if not is_of_hydra(error):
            raise
        raise ConfigError(f"{where}{explained(error)}") from error


def override_key(override: str) -> str:
    """Return the key, or group, that an override is of."""
    return override.partition("=")[0].lstrip("+~")


def is_of_hydra(error: BaseException) -> bool:
    """Return whether Hydra could not compose; for some reasons it raises a ValueError."""
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
    if words.startswith("Config group override"):
        groups = ", ".join(sorted(path.name for path in CONFIGURATION.iterdir() if path.is_dir()))
        got = words.rpartition("Got ")[2].replace("NoneType", "null")
        return f"each of {groups} must be the name of a choice or a list of names; got {got}"
    for cause in causes:
        if isinstance(cause, OverrideParseException):
            return f"{cause.override} is not an override that Hydra can read: {words}"
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
            if not known:
                return f"there is no key in {prefix.rstrip('.')}; +{cause.full_key}=... adds one"  # type: ignore[attr-defined]
            if key not in known:
                return (
                    f"unknown key {cause.full_key}; known here: {', '.join(sorted(known))}"  # type: ignore[attr-defined]
                    f"{nearest(key, tuple(known), prefix)}"
                )
    return words
