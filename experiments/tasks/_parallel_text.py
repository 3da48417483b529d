"""Pairs of a text and its translation: from a file, from gettext catalogs, or made by a program."""

from __future__ import annotations

import sys
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.fields import ConfigError
from experiments.tasks._catalogs import CatalogError, find_catalogs, read_catalog
from experiments.tasks._tsv import TSVError, read_tsv
from experiments.tasks._worded import worded_pairs

LONGEST = 200
"""Characters of the longest text that is used."""
ENOUGH = 2000
"""Pairs that this system's catalogs must have to be used where nobody asked for them."""

_MARKUP = frozenset("%{}<>\\$&|_~")  # of formats, tags and keyboard shortcuts
_RARE = 10  # catalogs' characters in fewer pairs are left out, with their pairs


@dataclass(frozen=True)
class ParallelText:
    """Pairs, each source once, and what to say of them.

    Attributes:
        pairs: by length of source, then in the order of the alphabet.
        origin: what they are, in words.
        is_synthetic: whether a program made them.
    """

    pairs: list[tuple[str, str]]
    origin: str
    is_synthetic: bool = False


def normalized(text: str) -> str:
    """Return a text in Unicode's form NFC, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def from_file(file: str, columns: Sequence[str]) -> ParallelText:
    """Read a table of tab-separated values."""
    try:
        pairs = read_tsv(Path(file).expanduser(), columns)
    except TSVError as error:
        raise ConfigError(
            "task.file must be a table of UTF-8, a source and its target a line, with a tab "
            f"between them: {error}"
        ) from error
    kept = _by_source(pairs)
    if not kept:
        raise ConfigError(f"task.file: {file} has no pair of at most {LONGEST} characters each")
    return ParallelText(kept, "sentences of a file")


def from_catalogs(root: str, language: str) -> ParallelText:
    """Read a folder's gettext catalogs."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing"
        raise ConfigError(f"task.root must be a folder; {folder} is {got}")
    found = find_catalogs(folder, language)
    if not found:
        raise ConfigError(
            f"task.root must hold {language}/LC_MESSAGES/*.mo or *.po, or {language}.po, at any "
            f"depth (task.language={language}); {folder} has none"
        )
    try:
        return _messages(map(read_catalog, found), language)
    except CatalogError as error:
        raise ConfigError(f"task.root must hold catalogs that can be read: {error}") from error


def from_system(language: str) -> ParallelText:
    """Read the catalogs of this system and of the packages of this Python."""
    folders = (Path(sys.base_prefix, "share/locale"), Path("/usr/share/locale"))
    found = []
    for folder in {*folders, Path(sysconfig.get_path("purelib"))}:
        found += find_catalogs(folder, language)

    def readable() -> Iterable[list[tuple[str, str]]]:
        for path in found:
            try:
                yield read_catalog(path)
            except CatalogError:  # Nobody gave it to us, and there are others.
                continue

    return _messages(readable(), language)


def from_dates(languages: Sequence[str], dates: int, seed: int) -> ParallelText:
    """Make dates and numbers in words."""
    pairs, wording = worded_pairs(languages, dates, seed)
    return ParallelText(_by_source(pairs), f"dates and numbers, wording {wording}", True)


def _messages(catalogs: Iterable[Iterable[tuple[str, str]]], language: str) -> ParallelText:
    """Return what can be translated character by character.

    Left out are messages with markup or a rare character, and those whose translation is the
    message itself or longer than half as much again and ten characters.
    """
    pairs = _by_source(
        (pair for catalog in catalogs for pair in catalog),
        lambda source, target: (
            source != target
            and len(target) <= 1.5 * len(source) + 10
            and _MARKUP.isdisjoint(source + target)
        ),
    )
    counts = Counter(character for source, target in pairs for character in {*source, *target})
    common = {character for character, count in counts.items() if count >= _RARE}
    usable = [pair for pair in pairs if common.issuperset(pair[0] + pair[1])]
    return ParallelText(usable, f"messages of gettext catalogs, English to {language!r}")


def _by_source(
    pairs: Iterable[Sequence[str]], is_usable: Callable[[str, str], bool] = lambda *_: True
) -> list[tuple[str, str]]:
    """Return pairs that can be printed, each source once with its most frequent target."""
    targets: dict[str, Counter[str]] = {}
    for pair in pairs:
        source, target = map(normalized, pair)
        if not (0 < len(source) <= LONGEST and 0 < len(target) <= LONGEST):
            continue
        if (source + target).isprintable() and is_usable(source, target):
            targets.setdefault(source, Counter())[target] += 1
    chosen = {
        source: min(counts, key=lambda target: (-counts[target], target))
        for source, counts in targets.items()
    }
    return sorted(chosen.items(), key=lambda pair: (len(pair[0]), pair))
