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


LARGEST_SEED = 2**32 - 1
"""numpy's generators take 32 bits."""


def seed(default: int) -> Any:
    """Declare a field that seeds a random generator."""
    return integer(default, at_least=0, at_most=LARGEST_SEED)


def number(default: float, *, at_least: float, at_most: float | None = None) -> Any:
    """Declare a field for a finite number, held as a float."""
    return _field(
        default,
        Check(
            f"a number {_range_words(at_least, at_most)}",
            lambda value: _is_number(value, int | float) and _in_range(value, at_least, at_most),
            convert=float,
        ),
    )


def positive(default: float, *, at_most: float = sys.float_info.max) -> Any:
    """Declare a field for a finite number above 0, held as a float."""
    limit = "" if at_most == sys.float_info.max else f" of at most {at_most:g}"
    return _field(
        default,
        Check(
            f"a positive number{limit}",
            lambda value: _is_number(value, int | float) and 0 < value <= at_most,
            convert=float,
        ),
    )


def flag(default: bool) -> Any:
    """Declare a field for true or false."""
    return _field(default, Check("true or false", lambda value: isinstance(value, bool)))


def text(default: str) -> Any:
    """Declare a field for a non-empty string."""
    return _field(
        default,
        Check("a non-empty string", lambda value: isinstance(value, str) and value != ""),
    )


def optional(declared: Any) -> Any:
    """Declare a field that may also hold nothing, ``null``; that is its default."""
    inner = declared.metadata["check"]
    return _field(
        None,
        Check(
            f"{inner.expected}, or null",
            lambda value: value is None or inner.accepts(value),
            convert=lambda value: None if value is None else inner.convert(value),
            choices=inner.choices,
        ),
    )


def number_or_name(default: float | str, names: Iterable[str]) -> Any:
    """Declare a field for a finite number or one of a few names."""
    names = tuple(names)
    return _field(
        default,
        Check(
            f"a number or {', '.join(names)}",
            lambda value: (
                value in names if isinstance(value, str) else _is_number(value, int | float)
            ),
            convert=lambda value: value if isinstance(value, str) else float(value),
            choices=names,
        ),
    )


def integers(
    default: Iterable[int] = (),
    *,
    at_least: int,
    at_most: int | None = None,
    is_empty_allowed: bool = False,
) -> Any:
    """Declare a field for a list of integers without repeats, held as a tuple."""
    return _field(
        tuple(default),
        Check(
            f"a {'' if is_empty_allowed else 'non-empty '}list of integers "
            f"{_range_words(at_least, at_most)}, without repeats",
            lambda value: (
                isinstance(value, list | tuple)
                and all(
                    _is_number(item, int) and _in_range(item, at_least, at_most) for item in value
                )
                and len(set(value)) == len(value)
                and (is_empty_allowed or len(value) > 0)
            ),
            convert=tuple,
        ),
    )


def names(default: Iterable[str] = ()) -> Any:
    """Declare a field for a list of names, held as a tuple."""
    return _field(
        tuple(default),
        Check(
            "a list of names",
            lambda value: (
                isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
            ),
            convert=tuple,
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


def mapping() -> Any:
    """Declare a field for a mapping from names to values; empty by default, and for null.

    Its default in YAML is null: Hydra lets the command line replace that, but not ``{}``.
    """
    is_named = Check(
        "a mapping from names to values",
        lambda value: (
            value is None
            or (isinstance(value, Mapping) and all(isinstance(key, str) for key in value))
        ),
        convert=lambda value: dict(value or {}),
    )
    return field(default_factory=dict, metadata={"check": is_named})


def choice(default: str | int, options: Iterable[str | int]) -> Any:
    """Declare a field that holds one of ``options``."""
    options = tuple(options)
    return _field(default, one_of(options))


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
        hint = nearest(value, allowed.choices)
        raise ConfigError(f"{key} must be {allowed.expected}; got {value!r}{hint}")


def check_keys(values: Mapping[str, Any], known: Iterable[str], prefix: str) -> None:
    """Raise :class:`ConfigError` if there is another key than those that are known."""
    known = tuple(known)
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown key {prefix}{key}; known here: {', '.join(sorted(known))}"
                f"{nearest(key, known, prefix)}"
            )


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
        if not isinstance(values, Mapping):
            raise ConfigError(f"{prefix.rstrip('.')} must be a mapping; got {values!r}")
        check_keys(values, declared, prefix)
        for key, value in values.items():
            check(prefix + key, value, declared[key])
        return cls(**{key: declared[key].convert(value) for key, value in values.items()})


def parse_one(
    values: Any, kinds: Mapping[str, type[Config]], key: str, name_key: str = "name"
) -> tuple[str, Config]:
    """Parse a mapping whose entry ``name_key`` says of which kind it is; return kind and rest.

    Raises:
        ConfigError: no such kind, an unknown key, or a value out of range.
    """
    if not isinstance(values, Mapping) or name_key not in values:
        raise ConfigError(f"{key}.{name_key} is missing from the configuration")
    options = dict(values)
    name = options.pop(name_key)
    check(f"{key}.{name_key}", name, one_of(kinds))
    return name, kinds[name].parse(options, f"{key}.")


def parse_named(values: Any, kinds: Mapping[str, type[Config]], key: str) -> dict[str, Config]:
    """Parse a mapping from names of kinds to their options, any number of them.

    Raises:
        ConfigError: no such kind, an unknown key, or a value out of range.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key} must be a mapping from names to options; got {values!r}")
    for name, options in values.items():
        if name not in kinds:
            raise ConfigError(
                f"unknown {key} {name}; known: {', '.join(sorted(kinds))}"
                f"{nearest(name, tuple(kinds))}"
            )
        if options is not None and not isinstance(options, Mapping):
            raise ConfigError(f"{key}.{name} must be a mapping of its options; got {options!r}")
    return {
        name: kinds[name].parse(options or {}, f"{key}.{name}.") for name, options in values.items()
    }


def _field(default: Any, allowed: Check) -> Any:
    return field(default=default, metadata={"check": allowed})


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _in_range(value: float, at_least: float, at_most: float | None) -> bool:
    return at_least <= value <= (sys.float_info.max if at_most is None else at_most)


def _range_words(at_least: float, at_most: float | None) -> str:
    low = f"{at_least:g}" if isinstance(at_least, float) else at_least
    return f"of at least {low}" if at_most is None else f"from {low} to {at_most}"


def value_at(values: Any, key: str) -> Any:
    """Return what nested mappings hold at a key with dots; ``None`` if nothing."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def nearest(name: Any, names: Iterable[str], prefix: str = "") -> str:
    """Return words that suggest the nearest of ``names``; empty if none is near."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
