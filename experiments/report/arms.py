"""Sorts runs by task, and tells their arms apart.

Runs of several studies can have one label for different settings, or several for the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.view import Entry


def by_task(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Return the runs whose configuration is known, by the name of their task."""
    names: dict[str, str] = {}
    for entry in entries:
        if entry.record is not None and entry.record.result:
            names[_task_key(entry.record.config)] = entry.record.result.task
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.record is not None:
            config = entry.record.config
            name = names.get(_task_key(config), config["task"]["name"])
            found.setdefault(name, []).append(entry)
    return {name: _told_apart(runs) for name, runs in found.items()}


def _task_key(config: Mapping[str, Any]) -> str:
    return json.dumps(config["task"], sort_keys=True)


def _told_apart(entries: Sequence[Entry]) -> list[Entry]:
    """Label runs so that equal labels mean equal settings, horizon and seed aside.

    Where several arms have one label, what tells them apart is added to it; where one arm has
    several labels, the first is taken.
    """
    settings = [_settings(entry) for entry in entries]
    keys = [json.dumps(each, sort_keys=True) for each in settings]
    arms: dict[str, tuple[str, dict[str, Any]]] = {}
    for entry, key, own in zip(entries, keys, settings, strict=True):
        arms.setdefault(key, (entry.label, own))
    labels = {}
    for key, (label, own) in arms.items():
        names = _distinguishing([other for name, other in arms.values() if name == label])
        words = ", ".join(
            f"{name}={plain(own[name])}" if name in own else f"without {name}" for name in names
        )
        labels[key] = f"{label} ({words})" if words else label
    by_label = {label: key for key, (label, _) in reversed(arms.items())}
    return [
        replace(
            entry,
            label=labels[key],
            contrast_of=labels.get(by_label.get(entry.contrast_of or "", ""), entry.contrast_of),
        )
        for entry, key in zip(entries, keys, strict=True)
    ]


def _distinguishing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a few names whose values, present or not, tell all of these settings apart."""
    groups = ("training", "model", "remedy", "optimizer", "task", "evaluation", "probe")

    def values(names: Sequence[str]) -> set[str]:
        return {json.dumps([each.get(name, "absent") for name in names]) for each in settings}

    names = list(dict.fromkeys(name for each in settings for name in each))
    # Of names that tell as many apart, the one of the group that a reader thinks of first.
    rank = {group: index for index, group in enumerate(groups)}
    names.sort(key=lambda name: rank.get(name.partition(".")[0], len(groups)))
    chosen: list[str] = []
    while len(values(chosen)) < len(settings):
        chosen.append(max(names, key=lambda name: len(values([*chosen, name]))))
    return chosen


def _settings(entry: Entry) -> dict[str, Any]:
    """Return what makes an arm: the flattened configuration without horizon, seed, data folder."""
    assert entry.record is not None
    values = flat(entry.record.config)
    for name in ("horizon", "seed", "task.root", "task.file"):
        values.pop(name, None)
    return values


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, keys joined by dots; an empty one stays, as ``{}``."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def plain(value: Any) -> str:
    """Return a value as text: strings as they are, others as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
