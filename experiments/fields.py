"""Typed configuration: a frozen dataclass says which keys there are and what each may hold.

    @dataclass(frozen=True)
    class LatchConfig(Config):
        noise: float = number(0.2, at_least=0)

``LatchConfig.parse({"noise": -1}, "task.")`` fails with "task.noise must be a number of at least 0;
got -1". An unknown key or choice is told the nearest right name.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self


class ConfigError(ValueError):
    """A configuration value that no run can be made with."""


@dataclass(frozen=True)
class Check:
    """What a field may hold.

    Attributes:
        expected: the same in words, to complete "must be ...".
        accepts: whether a value is that.
        convert: makes equal values the same value (1 and 1.0 for a number).
        choices: the names to suggest from, if it is one of a few.
    """

    expected: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value
    choices: tuple[str, ...] = ()


def integer(default: int, *, at_least: int, at_most: int | None = None) -> Any:
    """Declare an integer field."""
    return _field(
        default,
        Check(
            f"an integer {_range_words(at_least, at_most)}",
            lambda value: _is_number(value, int) and _in_range(value, at_least, at_most),
        ),
    )


def seed(default: int) -> Any:
    """Declare a field that seeds a random generator: numpy's take 32 bits."""
    return integer(default, at_least=0, at_most=2**32 - 1)


def number(default: float, *, at_least: float) -> Any:
    """Declare a field for a finite number, held as a float."""
    return _field(
        default,
        Check(
            f"a number of at least {at_least:g}",
            lambda value: _is_number(value, int | float) and _in_range(value, at_least, None),
            convert=float,
        ),
    )


def fraction(default: float) -> Any:
    """Declare a field for a number above 0 and below 1."""
    return _field(
        default,
        Check(
            "a number between 0 and 1",
            lambda value: _is_number(value, int | float) and 0 < value < 1,
            convert=float,
        ),
    )


def choice(default: str | int, options: Iterable[str | int]) -> Any:
    """Declare a field that holds one of ``options``."""
    options = tuple(options)
    return _field(default, one_of(options))


def text_or_null(default: str | None) -> Any:
    """Declare a field for a non-empty string, or nothing."""
    return _field(
        default,
        Check(
            "a non-empty string, or null",
            lambda value: value is None or (isinstance(value, str) and value != ""),
        ),
    )


def one_of(options: Iterable[str | int]) -> Check:
    """Return the check that a value is one of ``options``, of the same type."""
    options = tuple(options)
    return Check(
        f"one of {', '.join(map(str, options))}",
        # Not `value in options`: True equals 1, and a YAML list cannot be hashed.
        lambda value: any(type(value) is type(o) and value == o for o in options),
        choices=tuple(o for o in options if isinstance(o, str)),
    )


def check(key: str, value: Any, allowed: Check) -> None:
    """Raise :class:`ConfigError` unless ``value`` is what ``key`` may hold."""
    if not allowed.accepts(value):
        nearest = _nearest(value, allowed.choices)
        raise ConfigError(f"{key} must be {allowed.expected}; got {value!r}{nearest}")


@dataclass(frozen=True)
class Config:
    """Base of configuration dataclasses; fields are declared by the functions above."""

    def __post_init__(self) -> None:
        for declared in fields(self):
            check(declared.name, getattr(self, declared.name), declared.metadata["check"])

    @classmethod
    def parse(cls, values: Mapping[str, Any], prefix: str = "") -> Self:
        """Make the configuration from plain values; a key that is not given takes its default.

        Args:
            values: from a YAML file or the command line.
            prefix: what stands before a key in errors, such as ``"task."``.

        Raises:
            ConfigError: an unknown key, or a value of the wrong type or out of range.
        """
        declared = {f.name: f.metadata["check"] for f in fields(cls)}
        for key in values:
            if key not in declared:
                raise ConfigError(
                    f"unknown key {prefix}{key}; known here: {', '.join(sorted(declared))}"
                    f"{_nearest(key, tuple(declared), prefix)}"
                )
        for key, value in values.items():
            check(prefix + key, value, declared[key])
        return cls(**{key: declared[key].convert(value) for key, value in values.items()})


def _field(default: Any, allowed: Check) -> Any:
    return field(default=default, metadata={"check": allowed})


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _in_range(value: float, at_least: float, at_most: float | None) -> bool:
    return at_least <= value <= (sys.float_info.max if at_most is None else at_most)


def _range_words(at_least: float, at_most: float | None) -> str:
    return f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"


def _nearest(name: Any, names: tuple[str, ...], prefix: str = "") -> str:
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
