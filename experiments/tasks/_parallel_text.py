"""Texts and their translations: from a file, from gettext catalogs, or made by a program."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.fields import ConfigError
from experiments.tasks._catalogs import CatalogError, find_catalogs, read_catalog
from experiments.tasks._tsv import TSVError, read_tsv
from experiments.tasks._worded import worded_pairs

LONGEST = 200
"""Characters of a source or target; pairs with longer ones are left out."""
ENOUGH = 2000
"""Pairs that the system's own catalogs must have to be used."""
RARE = 10
"""Characters that fewer pairs of the catalogs have are left out, with these pairs."""

_MARKUP = frozenset("%{}<>\\$&|_~")  # of formats, tags and keyboard shortcuts

Pair = tuple[str, str]
"""A source and its target."""


@dataclass(frozen=True)
class ParallelText:
    """Pairs of a source and its target, each source once.

    Attributes:
        pairs: by length of the source, then in order of the code points.
        origin: what they are, in words.
        is_synthetic: whether a program made them.
    """

    pairs: list[Pair]
    origin: str
    is_synthetic: bool = False

    @cached_property
    def digest(self) -> str:
        """A hash of the pairs."""
        return hashlib.sha256("\n".join(map("\t".join, self.pairs)).encode()).hexdigest()

    def split(self, fraction: float) -> tuple[list[Pair], list[Pair]]:
        """Return training and held-out pairs, told apart by a hash.

        That is of the source's letters and digits, so punctuation and case do not put one text
        into both parts; of what a program made, of the target, so no date is in both parts in two
        wordings.
        """
        parts: tuple[list[Pair], list[Pair]] = ([], [])
        for source, target in self.pairs:
            text = target if self.is_synthetic else source
            letters = "".join(filter(str.isalnum, text.casefold())) or text
            number = int.from_bytes(hashlib.sha256(letters.encode()).digest()[:8], "big")
            parts[number < fraction * 2**64].append((source, target))
        return parts


def normalized(text: str) -> str:
    """Return a text in Unicode's form NFC, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def parallel_text(config: Any) -> ParallelText:
    """Return what the configuration of a task asks for.

    Raises:
        ConfigError: it cannot be had; the message names the key, and the file and its fault.
    """
    kind = config.source
    for key, own in (("file", "file"), ("root", "catalogs")):
        value = getattr(config, key)
        if value is not None and kind not in ("auto", own):
            raise ConfigError(
                f"task.source must be auto or {own} for task.{key}={value}; got {kind}"
            )
    if kind == "file" or (kind == "auto" and config.file):
        if config.file is None:
            raise ConfigError("task.file must be given for task.source=file; got null")
        return from_file(config.file, config.columns)
    if config.root and kind in ("catalogs", "auto"):
        return from_catalogs(config.root, config.language)
    if kind in ("catalogs", "auto"):
        found = from_system(config.language)
        if len(found.pairs) >= ENOUGH:
            return found
        if kind == "catalogs":
            raise ConfigError(
                "task.root must be a folder with gettext catalogs: those of this system have "
                f"{len(found.pairs)} pairs that can be used for task.language={config.language}, "
                f"fewer than {ENOUGH}"
            )
    return from_dates(config.languages, config.dates, config.data_seed)


def from_file(file: str, columns: Sequence[str]) -> ParallelText:
    """Read a table of tab-separated values."""
    if len(columns) not in (0, 2):
        raise ConfigError(f"task.columns must be two names or none; got {list(columns)}")
    try:
        pairs = read_tsv(Path(file).expanduser(), columns)
    except TSVError as error:
        raise ConfigError(
            "task.file must be a table of UTF-8, on each line a source, a tab and its target: "
            f"{error}"
        ) from error
    kept = _by_source(pairs)
    if not kept:
        raise ConfigError(f"task.file: {file} has no pair of at most {LONGEST} characters each")
    return ParallelText(kept, "sentences of a file")


def from_catalogs(root: str, language: str) -> ParallelText:
    """Read the gettext catalogs of a folder."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing"
        raise ConfigError(f"task.root must be a folder with gettext catalogs; {folder}: got {got}")
    found = find_catalogs(folder, language)
    if not found:
        raise ConfigError(
            f"task.root must hold {language}/LC_MESSAGES/*.mo or *.po, or {language}.po, at any "
            f"depth, for task.language={language}; {folder} has none"
        )
    try:
        text = _messages(map(read_catalog, found), language)
    except CatalogError as error:
        raise ConfigError(f"task.root must hold catalogs that can be read: {error}") from error
    if not text.pairs:
        raise ConfigError(f"task.root: the catalogs of {folder} have no message that can be used")
    return text


def from_system(language: str) -> ParallelText:
    """Read the catalogs of this system and of the packages of this Python."""
    found = [path for folder in _system_folders() for path in find_catalogs(folder, language)]

    def readable() -> Iterator[list[Pair]]:
        for path in found:
            try:
                yield read_catalog(path)
            except CatalogError:
                continue  # nobody chose this file, and there are others

    return _messages(readable(), language)


def _system_folders() -> list[Path]:
    shared = {Path(sys.base_prefix, "share/locale"), Path("/usr/share/locale")}
    return sorted({*shared, Path(sysconfig.get_path("purelib"))})


def from_dates(languages: Sequence[str], dates: int, seed: int) -> ParallelText:
    """Make dates and numbers in words."""
    pairs, wording = worded_pairs(languages, dates, seed)
    return ParallelText(_by_source(pairs), f"dates and numbers, wording: {wording}", True)


def _messages(catalogs: Iterable[Iterable[Pair]], language: str) -> ParallelText:
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
    common = {character for character, count in counts.items() if count >= RARE}
    usable = [pair for pair in pairs if common.issuperset(pair[0] + pair[1])]
    return ParallelText(usable, f"messages of gettext catalogs, English to {language!r}")


def _by_source(
    pairs: Iterable[Pair], is_usable: Callable[[str, str], bool] = lambda *_: True
) -> list[Pair]:
    """Return pairs that can be printed, each source once with its most frequent target."""
    targets: dict[str, Counter[str]] = {}
    for pair in pairs:
        source, target = map(normalized, pair)
        is_short = 0 < len(source) <= LONGEST and 0 < len(target) <= LONGEST
        if is_short and (source + target).isprintable() and is_usable(source, target):
            targets.setdefault(source, Counter())[target] += 1
    chosen = {
        source: min(counts, key=lambda target: (-counts[target], target))
        for source, counts in targets.items()
    }
    return sorted(chosen.items(), key=lambda pair: (len(pair[0]), pair))
