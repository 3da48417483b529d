"""The command that makes runs again, from the configuration in their records.

Only what differs from the YAML files' values is in it. Of the choices of a group (``gru`` and
``gru_chrono`` are the same core) it names the one with the least left to say.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.composition import CONFIGURATION

_PLAIN_TEXT = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_WORDS = {"true", "false", "null", "inf", "nan", "yes", "no", "on", "off"}


def command(config: Mapping[str, Any], horizons: Sequence[int], seeds: Sequence[int]) -> str:
    """Return a line for a POSIX shell.

    Args:
        config: of a record, as `experiments.config.RunConfig.plain` gives it; its own horizon and
            seed do not count.
        horizons: of the runs to make.
        seeds: of the runs to make.
    """
    return shlex.join(
        ["python", "-m", "experiments.run", *overrides(config, list(horizons), list(seeds))]
    )


def overrides(config: Mapping[str, Any], horizons: list[int], seeds: list[int]) -> list[str]:
    """Return Hydra overrides; arguments as for `command`."""
    base = _load(CONFIGURATION / "config.yaml")
    standard = _standard(base)
    words = ["experiment=single"]
    for group, key in (("model", "core"), ("task", "name"), ("optimizer", "name")):
        values = config[group]
        choice, shown = _nearest(
            values,
            {
                name: shown
                for name, shown in choices(group).items()
                if shown.get(key) == values[key] and not shown.get("remedy")
            },
        )
        if group != "optimizer" or choice != standard[group]:
            words.append(f"{group}={choice}")
        words += _changes(group, values, shown)
    for group in ("remedy", "probe"):
        named, changes = [], []
        for name, values in config[group].items():
            choice, shown = _nearest(values, packaged(group)[name])
            named.append(choice)
            changes += _changes(f"{group}.{name}", values, shown)
        if named != standard[group]:
            words.append(f"{group}=[{','.join(named)}]")
        words += changes
    for group in ("training", "evaluation"):
        words += _changes(group, config[group], base[group])
    numerics = {name: config[name] for name in ("precision", "device", "threads")}
    words += _changes("", numerics, base)
    return [*words, f"horizons={as_value(horizons)}", f"seeds={as_value(seeds)}"]


@cache
def choices(group: str) -> dict[str, dict[str, Any]]:
    """Return the YAML files of a group that stand by themselves, by name."""
    files = {path.stem: _load(path) for path in sorted((CONFIGURATION / group).glob("*.yaml"))}
    return {name: values for name, values in files.items() if "defaults" not in values}


@cache
def packaged(group: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the YAML files of a group of which any number can be on, by what they configure."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, values in choices(group).items():
        first = (CONFIGURATION / group / f"{name}.yaml").read_text(encoding="utf-8").split("\n")[0]
        package = first.rpartition(f"@package {group}.")[2].strip()
        found.setdefault(package, {})[name] = values
    return found


def as_value(value: Any) -> str:
    """Return a value in the grammar of Hydra's overrides.

    https://hydra.cc/docs/advanced/override_grammar/basic/
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{as_value(key)}:{as_value(each)}' for key, each in value.items())}}}"
    if not isinstance(value, str):
        return repr(value)
    if _PLAIN_TEXT.fullmatch(value) and value.lower() not in _WORDS:
        return value
    # Within quotes, a quote and `${` are escaped, and the backslashes right before them or the end.
    escaped = re.sub(
        r"(\\*)('|\$\{|$)",
        lambda found: found[1] * 2 + (f"\\{found[2]}" if found[2] else ""),
        value,
    )
    return f"'{escaped}'"


def _standard(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices that hold where the command line says nothing."""
    return {
        group: choice
        for entry in base["defaults"]
        if isinstance(entry, Mapping)
        for group, choice in entry.items()
    }


def _nearest(
    values: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]
) -> tuple[str, Mapping[str, Any]]:
    """Return the choice that the fewest overrides make of ``values``."""
    return min(known.items(), key=lambda item: len(list(_differing(values, item[1]))))


def _changes(prefix: str, values: Mapping[str, Any], shown: Mapping[str, Any]) -> Iterable[str]:
    for name in _differing(values, shown):
        # A key that the file does not show has to be added.
        added = "" if name in shown else "++"
        key = f"{prefix}.{name}" if prefix else name
        yield f"{added}{key}={as_value(values[name])}"


def _differing(values: Mapping[str, Any], shown: Mapping[str, Any]) -> Iterable[str]:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return (n for n, value in values.items() if n not in shown or shown[n] != plain(value))


@cache
def _load(path: Path) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
