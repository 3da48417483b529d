"""Dates and numbers in words, beside ISO 8601 and digits: pairs to translate that a program makes.

Babel words dates in many languages, by the patterns of Unicode's CLDR; without it, English dates
are worded here. Numbers are worded here, in English.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence

import torch

from experiments import extras
from experiments.fields import ConfigError

LANGUAGES = ("en", "de", "fr", "es", "it")
"""Those that are worded unless others are asked for, where Babel is."""

_FIRST = datetime.date(1900, 1, 1)
_DAYS = (datetime.date(2100, 1, 1) - _FIRST).days
_STYLES = ("medium", "long", "full")  # Babel's; "short" has no century
_NUMBERS = 10_000
_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth",
    "nine": "ninth", "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth",
}  # fmt: skip
_MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]  # fmt: skip
_WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

Wording = Callable[[datetime.date], str]


def worded_pairs(
    languages: Sequence[str], dates: int, seed: int
) -> tuple[list[tuple[str, str]], str]:
    """Make pairs of words and what they say.

    Args:
        languages: of dates, as Babel names them; none: `LANGUAGES` where Babel is installed, else
            English.
        dates: how many to draw, in 1900 to 2099, each in one of the wordings.
        seed: of that draw.

    Returns:
        The pairs, ``("3 May 1987", "1987-05-03")`` and ``("four hundred and twelve", "412")``, the
        numbers below 10,000 once each; and who worded them.

    Raises:
        ConfigError: a language that Babel does not know, or there is no Babel.
    """
    if languages:
        extras.require("babel", f"task.languages={list(languages)}")
    if extras.find_spec("babel"):
        wordings, by = _by_babel(languages or LANGUAGES)
    else:
        wordings, by = [*_english(), _spoken], "built-in"
    generator = torch.Generator().manual_seed(seed)
    days = torch.randint(_DAYS, (dates,), generator=generator).tolist()
    chosen = torch.randint(len(wordings), (dates,), generator=generator).tolist()
    pairs = [(number_words(number), str(number)) for number in range(_NUMBERS)]
    for day, wording in zip(days, chosen, strict=True):
        date = _FIRST + datetime.timedelta(day)
        pairs.append((wordings[wording](date), date.isoformat()))
    return pairs, by


def number_words(number: int) -> str:
    """Return a number below 10,000 in British words: ``four hundred and twelve``."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        tens = _TENS[number // 10 - 2]
        return tens if number % 10 == 0 else f"{tens}-{_UNITS[number % 10]}"
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    words = f"{_UNITS[number // size]} {name}"
    rest = number % size
    if rest == 0:
        return words
    return f"{words}{' and' if rest < 100 else ''} {number_words(rest)}"


def ordinal_words(number: int) -> str:
    """Return the ordinal of a number below 100 in words: ``twenty-third``."""
    before, hyphen, last = number_words(number).rpartition("-")
    return f"{before}{hyphen}{_ORDINALS.get(last, last + 'th')}"


def _spoken(date: datetime.date) -> str:
    return f"the {ordinal_words(date.day)} of {_MONTHS[date.month - 1]} {date.year}"


def _english() -> Iterable[Wording]:
    def with_weekday(wording: Wording) -> Wording:
        return lambda date: f"{_WEEKDAYS[date.weekday()]}, {wording(date)}"

    for wording in (
        lambda date: f"{date.day} {_MONTHS[date.month - 1]} {date.year}",
        lambda date: f"{_MONTHS[date.month - 1]} {date.day}, {date.year}",
    ):
        yield wording
        yield with_weekday(wording)


def _by_babel(languages: Sequence[str]) -> tuple[list[Wording], str]:
    import babel
    from babel.dates import format_date

    def in_words(locale: babel.Locale, style: str) -> Wording:
        return lambda date: format_date(date, style, locale)  # type: ignore[arg-type]

    wordings: list[Wording] = []
    for language in languages:
        try:
            locale = babel.Locale.parse(language)
        except (ValueError, babel.UnknownLocaleError) as error:
            raise ConfigError(
                f"task.languages must name languages that Babel knows; got {language!r} ({error})"
            ) from error
        wordings += [in_words(locale, style) for style in _STYLES]
        if locale.language == "en":
            wordings.append(_spoken)
    return wordings, f"babel {babel.__version__}"
