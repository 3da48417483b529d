"""Reads gettext catalogs, ``.po`` and ``.mo``: messages and their translations.

Formats: GNU gettext's manual, "The Format of PO Files" and "The Format of GNU MO Files".
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path

Pair = tuple[str, str]
"""A message and its translation."""

_MAGIC = 0x950412DE
_HEADER = 20  # bytes: magic, revision, count, offsets of two tables
_CONTEXT = "\4"  # in a .mo, between a message's context and the message
_CHARSET = re.compile(rb"charset=([\w.:-]+)")
_LINE = re.compile(r'(msgctxt|msgid|msgid_plural|msgstr|msgstr\[(\d+)\])?\s*"((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(x[0-9A-Fa-f]{1,2}|[0-7]{1,3}|.)")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


class CatalogError(ValueError):
    """A file that is not what it should be; the message names file and fault."""


def find_catalogs(folder: Path, language: str) -> list[Path]:
    """Return a language's catalogs below a folder, in order of their paths.

    Those are ``LANGUAGE/LC_MESSAGES/*.mo`` and ``*.po`` at any depth, as installed, and
    ``LANGUAGE.po``, as in the source of a package.
    """
    found = []
    for parent, _, names in os.walk(folder):
        is_installed = Path(parent).parts[-2:] == (language, "LC_MESSAGES")
        for name in names:
            if name == f"{language}.po" or (is_installed and name.endswith((".mo", ".po"))):
                found.append(Path(parent, name))
    return sorted(found)


def read_catalog(path: Path) -> list[Pair]:
    """Read a catalog, ``.mo`` or ``.po`` by its name.

    Of a plural, the singular is read. The header, and what is not translated, marked fuzzy or
    obsolete, is left out.

    Raises:
        CatalogError: the file cannot be read, or is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CatalogError(f"{path}: cannot be read ({error.strerror})") from error
    entries = _read_mo(path, content) if path.suffix == ".mo" else _read_po(path, content)
    return [(message, translation) for message, translation in entries if message and translation]


def _read_mo(path: Path, content: bytes) -> Iterable[Pair]:
    order = {_MAGIC.to_bytes(4, "little"): "<", _MAGIC.to_bytes(4, "big"): ">"}.get(content[:4])
    if order is None:
        raise CatalogError(
            f"{path}: wrong magic number; expected {_MAGIC:08x} in either byte order, got "
            f"{content[:4].hex() or 'an empty file'}"
        )
    if len(content) < _HEADER:
        raise CatalogError(
            f"{path}: truncated; expected a header of {_HEADER} bytes, got {len(content)}"
        )
    revision, count, *tables = struct.unpack_from(f"{order}4I", content, 4)
    if revision >> 16 > 1:
        raise CatalogError(f"{path}: expected format 0 or 1, got {revision >> 16}")
    messages, translations = (_mo_strings(path, content, order, count, table) for table in tables)
    charset = "utf-8"
    if b"" in messages:
        header = translations[messages.index(b"")]
        charset = _charset(path, header)

    def text(raw: bytes) -> str:
        return _decoded(path, raw.partition(b"\0")[0], charset).rpartition(_CONTEXT)[2]

    return list(zip(map(text, messages), map(text, translations), strict=True))


def _mo_strings(path: Path, content: bytes, order: str, count: int, table: int) -> list[bytes]:
    """Return what a table of lengths and offsets points to; each is followed by a NUL."""
    if table + 8 * count > len(content):
        raise CatalogError(
            f"{path}: truncated; a table of {count} strings at byte {table} does not fit into "
            f"{len(content)} bytes"
        )
    numbers = struct.unpack_from(f"{order}{2 * count}I", content, table)
    strings = []
    for index, (length, at) in enumerate(zip(numbers[::2], numbers[1::2], strict=True)):
        if at + length >= len(content):
            raise CatalogError(
                f"{path}: truncated; string {index} of {length} bytes at byte {at} does not fit "
                f"into {len(content)} bytes"
            )
        if content[at + length] != 0:
            raise CatalogError(f"{path}: string {index} at byte {at} does not end with a NUL")
        strings.append(content[at : at + length])
    return strings


def _read_po(path: Path, content: bytes) -> Iterable[Pair]:
    found = []
    entry: dict[str, str] = {}
    is_fuzzy, part, number = False, "", 0

    def fault(words: str) -> CatalogError:
        return CatalogError(f"{path}, line {number}: {words}")

    def close() -> None:
        """Keep the entry that ends here."""
        nonlocal entry, is_fuzzy, part
        if entry:
            if "msgid" not in entry or "msgstr" not in entry:
                missing = "msgid" if "msgid" not in entry else "msgstr"
                raise fault(f"the entry that ends before this line has no {missing}")
            if not is_fuzzy:
                found.append((entry["msgid"], entry["msgstr"]))
        entry, is_fuzzy, part = {}, False, ""

    lines = _decoded(path, content.removeprefix(b"\xef\xbb\xbf"), _charset(path, content))
    for number, line in enumerate(map(str.strip, lines.split("\n")), start=1):  # noqa: B007
        if not line:
            continue
        if line.startswith("#"):
            if "msgstr" in entry:
                close()
            if line.startswith("#,"):
                is_fuzzy = is_fuzzy or "fuzzy" in line
            elif line.startswith("#~"):  # the flags before it were those of an obsolete entry
                is_fuzzy = False
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise fault(f'expected a keyword and a "string", got {line[:40]!r}')
        keyword, index, string = match.groups()
        if keyword is None:
            if not part:
                raise fault("a string without a keyword before it")
        elif index is not None:
            part = "msgstr" if int(index) == 0 else f"msgstr[{index}]"
        else:
            part = keyword
        if keyword in ("msgid", "msgctxt") and "msgstr" in entry:
            close()
            part = keyword
        if keyword is not None:
            if part in entry:
                raise fault(f"a second {keyword} in one entry")
            entry[part] = ""
        entry[part] += _ESCAPE.sub(_unescaped, string)
    number += 1
    close()
    return found


def _unescaped(match: re.Match[str]) -> str:
    code = match.group(1)
    if code[0] == "x" and len(code) > 1:
        return chr(int(code[1:], 16))
    if code[0] in "01234567":
        return chr(int(code, 8))
    return _ESCAPED.get(code, code)


def _charset(path: Path, header: bytes) -> str:
    """Return the encoding that a catalog's header names; UTF-8 if it names none."""
    match = _CHARSET.search(header)
    name = match.group(1).decode() if match else "utf-8"
    if name == "CHARSET":  # as templates have it
        return "utf-8"
    try:
        bytes(4).decode(name)
    except (LookupError, UnicodeError):
        raise CatalogError(f"{path}: its header names an unknown encoding, {name!r}") from None
    return name


def _decoded(path: Path, raw: bytes, charset: str) -> str:
    try:
        return raw.decode(charset)
    except UnicodeError as error:
        raise CatalogError(f"{path}: not {charset} as its header says ({error})") from error
