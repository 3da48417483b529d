"""Translation: its readers, its data, how it is judged, and what it does."""

from __future__ import annotations

import argparse
import datetime
import gettext
import io
import itertools
import math
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch

from experiments import extras
from experiments import use as commanded
from experiments.fields import ConfigError
from experiments.tasks import _parallel_text, build_task
from experiments.tasks._catalogs import CatalogError, read_catalog
from experiments.tasks._edit_distance import edit_distances, error_marks, error_rate
from experiments.tasks._parallel_text import ParallelText
from experiments.tasks._worded import number_words, ordinal_words
from experiments.tasks.translation import TranslationConfig, TranslationTask
from experiments.train import load_run
from tests.experiments.scenario_checks import (
    UNSCORED,
    check_scenario,
    distance,
    generator,
    run_of,
    trained,
    use,
)
from tests.experiments.small_studies import study_of

needs_babel = pytest.mark.skipif(
    extras.find_spec("babel") is None, reason='needs pip install -e ".[scenarios]"'
)

PARTS = (
    {"the cat": "die Katze", "a dog": "ein Hund", "the old man": "der alte Mann", "she": "sie"},
    {"sees": "sieht", "likes": "mag", "hears": "hört", "finds": "findet", "has": "hat"},
    {"a house": "ein Haus", "milk": "Milch", "the ball": "den Ball", "it": "es"},
)
SENTENCES = {
    " ".join(source): " ".join(target)
    for source, target in (
        zip(*pairs, strict=True) for pairs in itertools.product(*(part.items() for part in PARTS))
    )
}


def written(path: Path, pairs, header: str = "") -> str:
    path.write_text(header + "".join(f"{a}\t{b}\n" for a, b in pairs), encoding="utf-8")
    return str(path)


@pytest.fixture
def sentences(tmp_path) -> dict:
    return {"name": "translation", "file": written(tmp_path / "pairs.tsv", SENTENCES.items())}


def mo_bytes(entries: dict[bytes, bytes], order: str = "<", revision: int = 0) -> bytes:
    """Return a .mo as msgfmt writes it: header, two tables, strings that end with a NUL."""
    entries = dict(sorted(entries.items()))
    at = 28 + 16 * len(entries)
    tables, strings = [], b""
    for side in (list(entries), list(entries.values())):
        for string in side:
            tables.append((len(string), at + len(strings)))
            strings += string + b"\0"
    count = len(entries)
    header = struct.pack(f"{order}7I", 0x950412DE, revision, count, 28, 28 + 8 * count, 0, 0)
    return header + b"".join(struct.pack(f"{order}2I", *entry) for entry in tables) + strings


HEADER = "Content-Type: text/plain; charset={}\nPlural-Forms: nplurals=2; plural=(n != 1);\n"
MESSAGES = {
    "": HEADER.format("UTF-8"),
    "Open file": "Datei öffnen",
    "menu\4Open": "Öffnen",
    "%d file\0%d files": "%d Datei\0%d Dateien",
    "untranslated": "",
}
READ = [("Open file", "Datei öffnen"), ("Open", "Öffnen"), ("%d file", "%d Datei")]


def encoded(messages: dict[str, str], charset: str = "utf-8") -> dict[bytes, bytes]:
    return {key.encode(charset): value.encode(charset) for key, value in messages.items()}


def as_po(messages: dict[str, str], charset: str = "UTF-8") -> str:
    entries = {"": HEADER.format(charset).replace("\n", "\\n"), **messages}
    return "\n".join(f'msgid "{key}"\nmsgstr "{value}"\n' for key, value in entries.items())


# Files


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_mo_is_read_in_both_byte_orders_as_gettext_reads_it(order, tmp_path):
    path = tmp_path / "a.mo"
    content = mo_bytes(encoded(MESSAGES), order)
    path.write_bytes(content)
    assert sorted(read_catalog(path)) == sorted(READ)
    python = gettext.GNUTranslations(io.BytesIO(content))
    assert python.gettext("Open file") == "Datei öffnen"
    assert python.pgettext("menu", "Open") == "Öffnen"
    assert python.ngettext("%d file", "%d files", 1) == "%d Datei"


def test_a_catalog_is_decoded_as_its_header_says(tmp_path):
    latin = {"": HEADER.format("ISO-8859-1"), "Open": "Öffnen"}
    (tmp_path / "a.mo").write_bytes(mo_bytes(encoded(latin, "latin-1")))
    (tmp_path / "a.po").write_bytes(as_po({"Open": "Öffnen"}, "ISO-8859-1").encode("latin-1"))
    for name in ("a.mo", "a.po"):
        assert read_catalog(tmp_path / name) == [("Open", "Öffnen")]


PO = r'''# A comment.
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\n"

#: main.c:12
msgctxt "menu"
msgid "Open"
msgstr "Öffnen"

#, fuzzy
#| msgid "Close it"
msgid "Close"
msgstr "Falsch"
#, c-format
msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei"
msgstr[1] "%d Dateien"
msgid "a \"quoted\" "
"line\twith\\ \x41\101"
msgstr ""
"eine "
"Zeile"

msgid "untranslated"
msgstr ""

#, fuzzy
#~ msgid "old"
#~ msgstr "alt"

msgid "last"
msgstr "letzte"'''


def test_a_po_is_read_with_all_that_its_format_has(tmp_path):
    (tmp_path / "a.po").write_text(PO, encoding="utf-8")
    assert read_catalog(tmp_path / "a.po") == [
        ("Open", "Öffnen"),
        ("%d file", "%d Datei"),
        ('a "quoted" line\twith\\ AA', "eine Zeile"),
        ("last", "letzte"),
    ]


def patched(content: bytes, at: int, *numbers: int) -> bytes:
    new = struct.pack(f"<{len(numbers)}I", *numbers)
    return content[:at] + new + content[at + len(new) :]


MO = mo_bytes(encoded(MESSAGES))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "wrong magic number; expected 950412de .* got an empty file"),
        (b"msgid", "wrong magic number; .* got 6d736769"),
        (MO[:19], "truncated; expected a header of 20 bytes, got 19"),
        (patched(MO, 4, 2 << 16), "expected format 0 or 1, got 2"),
        (patched(MO, 8, 2**31), "truncated; a table of 2147483648 strings at byte 28 does not fit"),
        (patched(MO, 12, 2**32 - 1), "truncated; a table of 5 strings at byte 4294967295 does"),
        (patched(MO, 28, 2**32 - 1), "truncated; string 0 of 4294967295 bytes at byte 108 does"),
        (patched(MO, 36, 3), "string 1 at byte .* does not end with a NUL"),
        (MO[:-1], "truncated; string 4 of .* does not fit into"),
        (mo_bytes(encoded(MESSAGES, "latin-1")), "not UTF-8 as its header says .*0xf6"),
        (MO.replace(b"UTF-8", b"UTF-9"), "its header names an unknown encoding, 'UTF-9'"),
        (MO.replace(b"UTF-8", b"hex\n\n"), "its header names an unknown encoding, 'hex'"),
    ],
)
def test_a_damaged_mo_is_refused_by_its_name_and_its_fault(content, fault, tmp_path):
    path = tmp_path / "locale/de/LC_MESSAGES/x.mo"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(CatalogError, match=rf"^{path}: {fault}"):
        read_catalog(path)
    with pytest.raises(ConfigError, match=rf"^task\.root must hold .* be read: {path}: {fault}"):
        build_task({"name": "translation", "root": str(tmp_path)})


def test_every_cut_of_a_mo_is_refused(tmp_path):
    path = tmp_path / "x.mo"
    for length in range(len(MO)):
        path.write_bytes(MO[:length])
        with pytest.raises(CatalogError, match=r"truncated|magic"):
            read_catalog(path)


@pytest.mark.parametrize(
    ("text", "line", "fault"),
    [
        ("hello", 1, "expected a keyword and a \"string\", got 'hello'"),
        ('\nmsgid "open\nmsgstr "x"', 2, "expected a keyword"),
        ('"string"', 1, "a string without a keyword before it"),
        ('msgid "a"\n\nmsgid "b"', 3, "a second msgid in one entry"),
        ('msgid "a"\n', 3, "the entry that ends before this line has no msgstr"),
        ('msgstr "a"\n# x', 2, "the entry that ends before this line has no msgid"),
        ('msgid "a" "b"', 1, "expected a keyword"),
    ],
)
def test_a_damaged_po_is_refused_by_its_line_and_its_fault(text, line, fault, tmp_path):
    path = tmp_path / "de.po"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CatalogError, match=rf"^{path}, line {line}: {fault}"):
        read_catalog(path)


def test_a_po_in_another_encoding_or_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "de.po"
    with pytest.raises(CatalogError, match=rf"^{path}: cannot be read \(No such file"):
        read_catalog(path)
    path.write_bytes(as_po({"Open": "Öffnen"}).encode("latin-1"))
    with pytest.raises(CatalogError, match=rf"^{path}: not UTF-8 as its header says"):
        read_catalog(path)


def test_a_table_is_read_as_editors_write_it(tmp_path):
    path = tmp_path / "pairs.tsv"
    text = "\ufeffone\teins\tby x\r\n\r\n two  words \t zwei\u00a0Wörter\r\none\tein\none\tein\n"
    path.write_bytes((text + "cafe\u0301\tKaffee\n" + "x" * 201 + "\ty\n").encode())
    assert _parallel_text.from_file(str(path), ()).pairs == [
        ("one", "ein"),  # the most frequent of its targets
        ("café", "Kaffee"),
        ("two words", "zwei Wörter"),
    ]
    path.write_text("id\tde\ten\n1\teins\tone\n", encoding="utf-8")
    assert _parallel_text.from_file(str(path), ("en", "de")).pairs == [("one", "eins")]


@pytest.mark.parametrize(
    ("content", "options", "fault"),
    [
        (b"one\teins\ntwo\n", {}, "line 2: expected 2 columns or more .*, got 1"),
        (b"one\teins\ntwo\t \n", {}, "line 2: the target is empty"),
        (b"\teins\n", {}, "line 1: the source is empty"),
        ("one\teins\ntwo\tzwö\n".encode("latin-1"), {}, r"line 2: not UTF-8 \(invalid"),
        (b"", {}, ": holds nothing"),
        (b"en\tde\n", {"columns": ["en", "de"]}, ": holds nothing"),
        (b"en\tde\na\tb\n", {"columns": ["en", "fr"]}, "no column 'fr'; its columns are en, de"),
        (b"en\tx\tde\na\tb\n", {"columns": ["en", "de"]}, "line 2: expected 3 columns or more"),
        (None, {}, r"cannot be read \(No such file"),
        (b"a\tb\n", {"columns": ["en"]}, "columns must be two names or none; got"),
        (b"a\tb\nb\tc\n", {}, "test_fraction must leave pairs .*; 0.1 leaves 2 and 0"),
        (b"a" * 201 + b"\tb\n", {}, "has no pair of at most 200 characters each"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_its_line(content, options, fault, tmp_path):
    path = tmp_path / "pairs.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^task\..*{fault}"):
        TranslationTask(TranslationConfig(file=str(path), **options))


# Where the data comes from


WORDS = (
    "open close save print find copy move sort read send load drop",
    "file page word line text menu list name type mode date size",
)
TRANSLATED = {
    f"{verb} the {noun}": f"{noun}-{verb} bitte"
    for verb, noun in itertools.product(*map(str.split, WORDS))
}


def write_catalogs(folder: Path) -> None:
    """Write some as a package installs them and some as its source has them."""
    left_out = {
        "same thing here": "same thing here",
        "the %d here": "das %d hier",
        "save the ßtate": "ohne seltene Zeichen",
        "see": "eine Übersetzung viel zu lang",
    }
    items = list({**TRANSLATED, **left_out}.items())
    for name, part in (("app/locale/de/LC_MESSAGES/a.mo", items[:70]), ("po/de.po", items[70:])):
        path = folder / name
        path.parent.mkdir(parents=True)
        if path.suffix == ".mo":
            path.write_bytes(mo_bytes(encoded({"": HEADER.format("UTF-8"), **dict(part)})))
        else:
            path.write_text(as_po(dict(part)), encoding="utf-8")
    for other in ("app/locale/fr/LC_MESSAGES/a.po", "po/fr.po", "de/a.po"):
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_text("not read", encoding="utf-8")


def test_a_folder_of_catalogs_gives_the_messages_that_can_be_translated(tmp_path):
    write_catalogs(tmp_path)
    text = _parallel_text.from_catalogs(str(tmp_path), "de")
    assert dict(text.pairs) == TRANSLATED
    assert not text.is_synthetic
    check_scenario({"name": "translation", "root": str(tmp_path)}, 14, tmp_path)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"root": "nowhere"}, "task.root must be a folder with .*nowhere: got nothing"),
        ({"root": "pairs.tsv"}, "pairs.tsv: got a file"),
        ({"root": "x"}, r"root must hold de/LC_MESSAGES/\*.mo .* for task.language=de; .* none"),
        ({"root": "empty"}, "the catalogs of empty have no message that can be used"),
        ({"source": "file"}, "task.file must be given for task.source=file; got null"),
        ({"source": "dates", "languages": ["xx"]}, "babel|Babel"),
        ({"source": "dates", "file": "a"}, "must be auto or file for task.file=a; got dates"),
        ({"source": "file", "root": "."}, r"auto or catalogs for task.root=\.; got file"),
        ({"source": "words"}, "source must be one of auto, file, catalogs, dates"),
    ],
)
def test_data_that_cannot_be_had_is_refused_by_its_key(options, fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.tsv").touch()
    for name in ("x", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty/de.po").write_text(as_po({"same": "same"}), encoding="utf-8")
    with pytest.raises(ConfigError, match=fault):
        TranslationTask(TranslationConfig(**options))


def test_the_systems_catalogs_are_used_if_they_have_enough_else_dates(tmp_path, monkeypatch):
    write_catalogs(tmp_path)
    (tmp_path / "po/x").mkdir()
    (tmp_path / "po/x/de.po").write_text("a damaged one that nobody chose", encoding="utf-8")
    monkeypatch.setattr(_parallel_text, "_system_folders", lambda: [tmp_path])
    config = TranslationConfig(dates=200)
    task = TranslationTask(config)
    assert task.name == "synthetic_translation"
    with pytest.raises(ConfigError, match=r"^task\.root must be .* 144 pairs .* fewer than 2000$"):
        TranslationTask(TranslationConfig(source="catalogs"))
    monkeypatch.setattr(_parallel_text, "ENOUGH", 144)
    for source in ("auto", "catalogs"):
        task = TranslationTask(TranslationConfig(source=source))
        assert task.name == "translation"
        assert sum(part.count(99) for part in (task._train, task._test)) == 144
    # What is given comes first.
    file = written(tmp_path / "pairs.tsv", SENTENCES.items())
    task = TranslationTask(TranslationConfig(file=file, root=str(tmp_path)))
    assert task._train.pairs[0] in SENTENCES.items()


def test_the_identity_is_that_of_the_data_wherever_it_lies(tmp_path, monkeypatch):
    def identity(**options):
        return TranslationTask(TranslationConfig(**options)).identity

    one, two = (written(tmp_path / name, SENTENCES.items()) for name in "ab")
    other = written(tmp_path / "c", list(SENTENCES.items())[1:])
    assert identity(file=one) == identity(file=two, source="file") != identity(file=other)
    assert identity(file=one) != identity(file=one, test_fraction=0.2)
    dates = identity(source="dates", dates=50)
    assert dates == identity(source="dates", dates=50, language="fr")
    assert dates != identity(source="dates", dates=50, data_seed=1)
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    built_in = identity(source="dates", dates=50)
    assert built_in["origin"].endswith("wording: built-in")
    assert (built_in == dates) == dates["origin"].endswith("built-in")


# Dates and numbers


def read_number(words: str) -> int:
    """Return the number that words name: an oracle that adds what each word is worth."""
    units = (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen"
    )
    tens = "twenty thirty forty fifty sixty seventy eighty ninety"
    worth = {word: n for n, word in enumerate(units.split())}
    worth |= {word: 10 * n for n, word in enumerate(tens.split(), start=2)}
    total = current = 0
    for word in words.replace("-", " ").replace(" and ", " ").split():
        if word in worth:
            current += worth[word]
        elif word == "hundred":
            current *= 100
        else:
            assert word == "thousand"
            total, current = 1000 * current, 0
    return total + current


def test_numbers_are_worded_as_one_says_them():
    words = [number_words(number) for number in range(10_000)]
    assert [read_number(each) for each in words] == list(range(10_000))
    assert words[412] == "four hundred and twelve"
    assert words[3007] == "three thousand and seven"
    assert words[9960] == "nine thousand nine hundred and sixty"
    ordinals = {1: "first", 2: "second", 3: "third", 4: "fourth", 5: "fifth", 8: "eighth"}
    ordinals |= {9: "ninth", 12: "twelfth", 20: "twentieth", 21: "twenty-first", 30: "thirtieth"}
    assert {number: ordinal_words(number) for number in ordinals} == ordinals


def test_dates_are_worded_in_english_where_there_is_no_babel(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    text = _parallel_text.from_dates((), 2000, 0)
    forms = Counter()
    for source, target in text.pairs:
        if "-" not in target:
            assert read_number(source) == int(target)
            continue
        date = datetime.date.fromisoformat(target)
        day, month, year = date.day, date.strftime("%B"), date.year
        worded = {
            "day first": f"{day} {month} {year}",
            "month first": f"{month} {day}, {year}",
            "weekday, day first": f"{date:%A}, {day} {month} {year}",
            "weekday, month first": f"{date:%A}, {month} {day}, {year}",
            "words": f"the {ordinal_words(day)} of {month} {year}",
        }
        (form,) = (form for form, words in worded.items() if words == source)
        forms[form] += 1
    assert len(forms) == 5
    assert min(forms.values()) > 300
    with pytest.raises(ConfigError, match=r"^task\.languages=\['de'\] needs babel.*scenarios"):
        _parallel_text.from_dates(("de",), 1, 0)


@needs_babel
def test_babel_words_dates_in_several_languages():
    pairs = dict(_parallel_text.from_dates((), 20_000, 0).pairs)
    for month, number in (("Mai", 5), ("mai", 5), ("mayo", 5), ("maggio", 5), ("May", 5)):
        named = [target for source, target in pairs.items() if month in source.split()]
        assert named
        assert {int(target[5:7]) for target in named} == {number}
    months = ["Januar", "Februar", "März", "April", "Mai", "Juni"]
    months += ["Juli", "August", "September", "Oktober", "November", "Dezember"]
    days = ["Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"]
    used = set()
    for source, target in _parallel_text.from_dates(("de",), 500, 0).pairs:
        if "-" in target:
            date = datetime.date.fromisoformat(target)
            long = f"{date.day}. {months[date.month - 1]} {date.year}"
            forms = (f"{date:%d.%m.%Y}", long, f"{days[date.weekday()]}, {long}")
            used.add(forms.index(source))
    assert used == {0, 1, 2}
    with pytest.raises(ConfigError, match=r"^task\.languages must name .* Babel knows; got 'xx'"):
        _parallel_text.from_dates(("de", "xx"), 1, 0)


# What a sequence is


def shown(task, x_TBI, target, horizon):
    """Return source, fed-back characters and scored target of each sample, and check the frame."""
    alphabet = [*task._source_alphabet, "GO", *task._target_alphabet]
    found = []
    for sample in range(x_TBI.shape[1]):
        steps = [alphabet[step.argmax()] if step.sum() == 1 else "" for step in x_TBI[:, sample]]
        source = "".join(steps[:horizon])
        assert steps[: horizon - len(source)] == [""] * (horizon - len(source))
        assert steps[horizon] == "GO"
        symbols = target[:, sample].tolist()
        assert symbols[:horizon] == [UNSCORED] * horizon
        end = symbols.index(0)
        assert symbols[end + 1 :] == [UNSCORED] * (len(symbols) - end - 1)
        expected = "".join(task._target_alphabet[s - 1] for s in symbols[horizon:end])
        assert "".join(steps[horizon + 1 :]) == expected
        assert steps[horizon + 1 :][: len(expected)] == list(expected)
        found.append((source, expected))
    return found


def test_a_sequence_is_source_go_and_target_and_its_pair_is_of_the_file(sentences):
    task = build_task(sentences)
    assert (task.name, task.metric) == ("translation", "character error rate")
    short, longest = task.minimum_horizon, task.maximum_horizon
    assert longest == max(map(len, SENTENCES))
    for horizon in (short, 20, longest):
        fitting = {s: t for s, t in SENTENCES.items() if len(s) <= horizon}
        steps = horizon + 1 + max(map(len, fitting.values()))
        x_TBI, target = task.sample(400, horizon, generator())
        test_x, test_target = task.test_set(horizon, generator())
        assert len(x_TBI) == len(target) == len(test_x) == len(test_target) == steps
        assert task.dependency(horizon) == steps - 1
        seen = set(shown(task, x_TBI, target, horizon))
        held_out = shown(task, test_x, test_target, horizon)
        assert len(held_out) == len(set(held_out))
        assert not seen & set(held_out)
        assert seen | set(held_out) == set(fitting.items())
    few = TranslationTask(TranslationConfig(file=sentences["file"], test_size=2))
    assert few.test_set(longest, generator())[0].shape[1] == 2


@pytest.mark.parametrize("is_synthetic", [True, False])
def test_it_is_a_scenario(is_synthetic, sentences, tmp_path):
    dates = {"name": "translation", "source": "dates", "dates": 300}
    check_scenario(dates if is_synthetic else sentences, 22 if is_synthetic else 20, tmp_path)


def test_no_text_is_in_both_parts_however_it_is_written():
    pairs = [(f"{word}{mark}", "x") for word in map(str, range(500)) for mark in ("", "!", " ...")]
    train, test = ParallelText(pairs, "").split(0.2)
    assert len(train) + len(test) == len(pairs)
    assert 0.15 < len(test) / len(pairs) < 0.25
    letters = [
        {"".join(filter(str.isalnum, source)) for source, _ in part} for part in (train, test)
    ]
    assert not letters[0] & letters[1]
    dates = [(f"{wording} {n}", f"date {n}") for n in range(500) for wording in "abc"]
    parts = ParallelText(dates, "", is_synthetic=True).split(0.2)
    assert not set.intersection(*({target for _, target in part} for part in parts))
    assert all(parts)


# How it is judged


def random_texts(count: int, seed: int) -> list[str]:
    numbers = torch.randint(0, 4, (count, 9), generator=generator(seed)).tolist()
    return ["".join("abcü"[n] for n in row[: sum(row[:3])]) for row in numbers]


def test_edit_distances_are_the_fewest_edits():
    one, two = random_texts(400, 0), random_texts(400, 1)
    expected = [distance(a, b) for a, b in zip(one, two, strict=True)]
    assert edit_distances(one, two).tolist() == expected
    assert "" in one
    assert len(set(expected)) > 6
    assert error_rate(one, two) == pytest.approx(sum(expected) / sum(map(len, two)))
    assert error_rate(["kitten"], ["sitting"]) == pytest.approx(3 / 7)
    assert edit_distances(["", "ab"], ["", ""]).tolist() == [0, 2]


def test_marks_stand_under_what_is_wrong():
    for text, expected, marks in (
        ("1987-05-13", "1987-05-03", "        ^"),
        ("abc", "abc", ""),
        ("abxc", "abc", "  ^"),
        ("ac", "abc", " ^"),
        ("ab", "abc", "  ^"),
        ("", "abc", "^"),
    ):
        assert error_marks(text, expected) == marks
    for text, expected in zip(random_texts(100, 0), random_texts(100, 1), strict=True):
        marks = error_marks(text, expected)
        assert marks.count("^") <= distance(text, expected)
        assert (marks == "") == (text == expected)


@pytest.mark.parametrize("core", ["fused_rnn", "lstm"])
def test_what_is_written_step_by_step_is_what_the_whole_sequence_says(sentences, core):
    """Each character is the most probable one after all before it, run again from the start."""
    run = run_of(sentences, 20, model={"core": core, "hidden_size": 30}, training={"steps": 1})
    task, model = run.task, run.build_model()
    x_TBI, _ = task.test_set(20, generator())
    torch.nn.init.normal_(model.readout.weight, std=2.0, generator=generator())
    answers = task._answers(model, x_TBI)
    assert len(set(answers)) > 1
    most = len(x_TBI) - 20
    for sample, answer in enumerate(answers):
        read, symbols = x_TBI[:21, sample : sample + 1], []
        while len(symbols) < most:
            with torch.no_grad():
                symbol = int(model(read)[-1, 0].argmax())
            if symbol == 0:
                break
            symbols.append(symbol)
            step = torch.zeros(1, 1, task.input_size)
            step[0, 0, len(task._source_alphabet) + symbol] = 1
            read = torch.cat((read, step))
        assert answer == "".join(task._target_alphabet[symbol - 1] for symbol in symbols)


class Dictionary(torch.nn.Module):
    """Writes what it is told to, whatever it read before."""

    def __init__(self, task, answers: list[str]) -> None:
        super().__init__()
        self.symbols = [[1 + task._target_alphabet.index(c) for c in a] + [0] for a in answers]
        self.output_size, self.go = task.output_size, task._go
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x_TBI):
        is_go = x_TBI[:, 0, self.go].bool()
        at = int(is_go.int().argmax())
        logits = torch.zeros(*x_TBI.shape[:2], self.output_size)
        for sample, symbols in enumerate(self.symbols):
            for step, symbol in enumerate(symbols[: len(x_TBI) - at]):
                logits[at + step, sample, symbol] = 1
        return logits

    def stream(self, x_TBI, state=None):
        step = 0 if state is None else state
        logits = torch.zeros(1, x_TBI.shape[1], self.output_size)
        for sample, symbols in enumerate(self.symbols):
            logits[0, sample, symbols[min(step, len(symbols) - 1)]] = 1
        return logits, step + 1


def test_a_model_is_judged_by_the_edits_of_what_it_writes(sentences):
    task = build_task(sentences)
    horizon = task.maximum_horizon
    x_TBI, target = task.test_set(horizon, generator())
    sources, expected = zip(*shown(task, x_TBI, target, horizon), strict=True)
    answers = ["M" + text[1:] if i % 2 else text for i, text in enumerate(expected)]
    model = Dictionary(task, answers)
    edits = sum(map(distance, answers, expected))
    assert edits > 0
    error = task.judge(model, x_TBI, target).item()
    assert error == pytest.approx(edits / sum(map(len, expected)))
    measures = task.measures(model, x_TBI, target, horizon)
    is_exact = [a == b for a, b in zip(answers, expected, strict=True)]
    assert measures["exact match"] == pytest.approx(sum(is_exact) / len(is_exact))
    symbols = sum(map(len, expected)) + len(expected)
    assert measures["error rate of the next symbol"] == pytest.approx(edits / symbols)
    third = -(-horizon // 3)
    within = [e for e, s in zip(is_exact, sources, strict=True) if third < len(s) <= 2 * third]
    name = f"exact match, sources of {third + 1} to {-(-2 * horizon // 3)} characters"
    assert 0 < measures[name] < 1
    assert measures[name] == pytest.approx(sum(within) / len(within))


def test_knowing_nothing_is_one_answer_for_all(tmp_path):
    # Of 0 to 99, most say "yes sir"; what is nearest to all of them is that.
    pairs = [(str(n), "no" if n % 5 == 0 else "yes sir") for n in range(400)]
    task = build_task({"name": "translation", "file": written(tmp_path / "a.tsv", pairs)})
    held_out = [target for _, target in task._test.pairs]
    no = held_out.count("no")
    assert no
    assert task.know_nothing_error(3) == pytest.approx(7 * no / sum(map(len, held_out)), rel=1e-12)
    counts = Counter(target for _, target in task._train.pairs)
    # Five of its symbols follow from those before them, in either answer.
    n, total = counts["no"], len(task._train.pairs)
    first = -sum(c * math.log(c / total) for c in counts.values())
    symbols = 3 * n + 8 * (total - n)
    assert task.know_nothing_loss(3) == pytest.approx(3 * first / symbols, rel=1e-9)


def test_baselines_are_the_nearest_source_and_a_copy(tmp_path):
    pairs = [(f"{word} {n}", f"{word.upper()} {n}") for word in ("red", "green") for n in range(50)]
    task = build_task({"name": "translation", "file": written(tmp_path / "a.tsv", pairs)})
    x_TBI, target = task.test_set(8, generator())
    sources, expected = zip(*shown(task, x_TBI, target, 8), strict=True)
    found = task.baselines(x_TBI, target, 8)
    assert set(found) == {"nearest neighbour", "copying the source"}
    copying = sum(len(source.split()[0]) for source in sources) / sum(map(len, expected))
    assert found["copying the source"] == pytest.approx(copying)
    # The nearest has the same word and another number, of which there are two digits at most.
    assert 0 < found["nearest neighbour"] <= 2 * len(expected) / sum(map(len, expected))
    dates = build_task({"name": "translation", "source": "dates", "dates": 300})
    assert set(dates.baselines(*dates.test_set(22, generator()), 22)) == {"nearest neighbour"}


# What it shows and does


def test_the_look_has_held_out_examples_with_their_errors(sentences):
    task = build_task(sentences)
    horizon = task.maximum_horizon
    x_TBI, target = task.test_set(horizon, generator(3))
    pairs = shown(task, x_TBI, target, horizon)[:8]
    answers = [
        "x" * (i == 2) + target.replace("t", "", i == 3) for i, (_, target) in enumerate(pairs)
    ]
    answers[2] = "M" + pairs[2][1][1:]
    (look,) = task.looks(Dictionary(task, answers), horizon, generator(3))
    blocks = look.text.split("\n\n")
    assert blocks[0] == "real: sentences of a file; held out"
    assert len(blocks) == 1 + len(pairs)
    for (source, expected), answer, block in zip(pairs, answers, blocks[1:], strict=True):
        lines = [f"source    {source}", f"expected  {expected}", f"got       {answer}"]
        if answer != expected:
            lines.append(" " * 10 + error_marks(answer, expected))
        assert block.split("\n") == lines
    assert look.text.count("^") >= 1


def test_a_trained_model_translates_as_it_was_judged(sentences, tmp_path, capsys):
    folder = trained(run_of(sentences, 20), tmp_path)
    run, model = load_run(folder)
    torch.nn.init.normal_(model.readout.weight, std=2.0, generator=generator())
    x_TBI, target = run.task.test_set(20, generator())
    for (source, _), answer in zip(
        shown(run.task, x_TBI, target, 20), run.task._answers(model, x_TBI), strict=True
    ):
        run.task.use(model, argparse.Namespace(text=f" {source}  "), 20)
        assert capsys.readouterr().out == f"{answer}\n"
    assert commanded.main([str(folder), "--text", "the old man has the ball and milk"]) == 0
    printed = capsys.readouterr()
    assert "33 characters; the model was trained on texts of up to 20" in printed.err
    assert set(printed.out) <= {*"".join(SENTENCES.values()), "\n"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the Cat sees ü", r"--text must be of characters .*; got C, ü, but they are"),
        ("  ", r"--text must have characters; got '  '"),
    ],
)
def test_what_it_cannot_translate_is_said(sentences, text, message):
    with pytest.raises(ConfigError, match=message):
        use(run_of(sentences, 20), "--text", text)


def test_an_answer_without_an_end_is_cut_off(sentences, capsys):
    task = build_task(sentences)
    model = Dictionary(task, ["e" * 500])
    task.use(model, argparse.Namespace(text="she has it"), 20)
    most = 1 + max(len(t) for s, t in SENTENCES.items() if len(s) <= 20)
    printed = capsys.readouterr()
    assert printed.out == "e" * most + "\n"
    assert printed.err == f"cut off after {most} characters\n"


def test_its_short_studies_are_the_same_on_every_machine():
    for budget in ("smoke", "fast"):
        study = study_of("experiment=translation", f"budget={budget}")
        assert study.reference.run.task.name == "synthetic_translation"
