"""Finds runs and studies in folders, whatever state they are in; every run once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments import view
from experiments.expectations import parse_expected
from experiments.fields import ConfigError
from experiments.record import CONFIG, RECORD
from experiments.run_folder import FAILURE, STUDY
from experiments.view import Entry, View, ViewError


class ReportError(ValueError):
    """Folders that no report can be made from; the message says why."""


@dataclass
class Collection:
    """What was found in the folders.

    Attributes:
        studies: as they see their own runs.
        entries: every run once.
        problems: what could not be read, and why, by name.
    """

    studies: list[View] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)


def gather(folders: Sequence[Path]) -> Collection:
    """Return what is in folders: studies, runs, and what cannot be read.

    Raises:
        ReportError: a folder is missing, or none holds a run.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ReportError(f"{folder} is {'not a folder' if folder.exists() else 'missing'}")
    found = Collection()
    entries: list[Entry] = []
    for path in _files(folders, STUDY):
        try:
            study = view.load(path.parent)
            _ = study.rows, parse_expected(study.expected)
        except (ViewError, ConfigError, TypeError, AttributeError) as error:
            found.problems[str(path)] = str(error)
            continue
        found.studies.append(study)
        entries += study.entries
    found.studies = _last_views(found.studies)
    seen = {entry.folder.resolve() for entry in entries}
    for path in _files(folders, FAILURE):
        found.problems[str(path.parent)] = view.reason_of_failure(path)
    runs = {path.parent for name in (RECORD, CONFIG) for path in _files(folders, name)}
    for folder in sorted(runs - seen):
        try:
            entries.append(view.entry_of(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            found.problems[str(folder)] = f"no run that can be read: {error}"
    found.entries = _once(entries)
    if not found.entries and not found.problems:
        raise ReportError(f"no records in {', '.join(map(str, folders))}")
    for entry in found.entries:
        try:
            view.curve(entry, "loss")
        except ViewError as error:
            found.problems[f"log of {title(entry)}"] = f"{error}; its curves are left out"
    return found


def _last_views(studies: Iterable[View]) -> list[View]:
    """Return every study once: the same command, given again, leaves another folder."""
    last = {
        (study.name, tuple(entry.folder.resolve() for entry in study.entries)): study
        for study in studies
    }
    return list(last.values())


def _files(folders: Iterable[Path], name: str) -> list[Path]:
    paths = [path.resolve() for folder in folders for path in sorted(folder.rglob(name))]
    return list(dict.fromkeys(paths))


def _once(entries: Iterable[Entry]) -> list[Entry]:
    """Return every run once, however many folders hold it or studies name it."""
    by_identity: dict[str, Entry] = {}
    for entry in entries:
        record = entry.record
        identity = entry.identity if record is None else record.identity
        before = by_identity.get(identity)
        if before is None:
            by_identity[identity] = entry
        elif before.record is None and record is not None:
            by_identity[identity] = replace(entry, label=before.label)
        elif entry.contrast_of is None and before.contrast_of is not None:
            by_identity[identity] = replace(before, contrast_of=None)
    return list(by_identity.values())


def title(entry: Entry) -> str:
    """Return what to call a run where it stands by itself."""
    return f"{entry.label}, T={entry.horizon}, seed {entry.seed} ({entry.folder.name})"
