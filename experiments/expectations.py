"""What is known of a study beforehand: signatures it should show, published numbers beside it.

In a study's YAML:

    expected:
      source: where the signatures were measured, and with what
      settings: {task.name: adding, training.steps: 1500}    # they hold for runs with these values
      signatures:
        - {arm: [fused_rnn, rnn], horizon: 10, log10_ratio: [-2.5, -2.1], learned: [1, 1]}
      published:
        - {arm: lstm, test_metric: 0.872, source: "Bai et al. 2018", settings: equal parameters}

Quantities: ``log10_ratio`` (of the adjoint at initialisation, the mean over seeds), ``test_metric``
(the median over seeds) and ``learned`` (the share of seeds). A signature is an interval; it is met
if the measured number lies in it. A published number is shown, and nothing is concluded from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from experiments.fields import ConfigError, check_keys, value_at

if TYPE_CHECKING:
    from experiments.view import Row, View

QUANTITIES = {
    "log10_ratio": "log10 of the initial gradient ratio",
    "test_metric": "test metric",
    "learned": "share of seeds that learned",
}
_KEYS = ("arm", "horizon", "source", "settings", *QUANTITIES)


@dataclass(frozen=True)
class Expectation:
    """What is known of an arm at a horizon.

    Attributes:
        labels: of the arms it holds for.
        horizon: T; ``None`` for any.
        values: by quantity, an interval ``[low, high]`` of a signature, or a published number.
        is_signature: whether it is to be met.
        source, settings: of a published number.
    """

    labels: tuple[str, ...]
    horizon: int | None
    values: Mapping[str, Any]
    is_signature: bool
    source: str = ""
    settings: str = ""

    @property
    def origin(self) -> str:
        """What to call it in a table."""
        return "expected" if self.is_signature else f"published: {self.source}"

    def is_of(self, row: Row) -> bool:
        """Whether it is about a row."""
        return row.label in self.labels and self.horizon in (None, row.horizon)

    def cell(self, quantity: str) -> str:
        """Return a quantity as text; empty if nothing is known of it."""
        value = self.values.get(quantity)
        if value is None:
            return ""
        if not self.is_signature:
            return f"{value:g}"
        low, high = value
        return f"{low:g}" if low == high else f"{low:g}..{high:g}"

    def is_met(self, row: Row) -> dict[str, bool | None]:
        """Return, by quantity, whether a row meets it; ``None`` where it was not measured."""
        return {
            quantity: None if measured is None else bool(low <= measured <= high)
            for quantity, (low, high) in self.values.items()
            for measured in [measure(row, quantity)]
        }


def statement(known: Sequence[Expectation], rows: Sequence[Row]) -> str | None:
    """Say how many signatures are met, and what was measured where one is not.

    ``None`` if there are no signatures of these rows.
    """
    met, others = 0, []
    for each in known:
        for row in rows:
            if not each.is_signature or not each.is_of(row):
                continue
            for quantity, is_met in each.is_met(row).items():
                if is_met:
                    met += 1
                    continue
                measured = measure(row, quantity)
                shown = "not measured" if measured is None else f"measured {measured:.4g}"
                others.append(
                    f"{row.label}, T = {row.horizon}, {QUANTITIES[quantity]} "
                    f"{each.cell(quantity)}: {shown}"
                )
    if not met and not others:
        return None
    text = f"Signatures expected of this study: {met} of {met + len(others)} met"
    return f"{text}; not met: {'; '.join(others)}." if others else f"{text}."


def measure(row: Row, quantity: str) -> float | None:
    """Return a quantity of a row; ``None`` if it was not measured."""
    if quantity == "log10_ratio":
        return row.mean_log10_ratio()
    if quantity == "test_metric":
        values = row.values("test_metric")
        return median(values) if values else None
    return row.count("solved", "learned") / len(row.records) if row.records else None


def expectations(view: View) -> list[Expectation]:
    """Return what is known of the runs of a view; signatures only if their settings are the runs'.

    Raises:
        ConfigError: the study's ``expected`` is not as described above.
    """
    known = parse_expected(view.expected)
    if all(_has_settings(record.config, view.expected) for record in view.records):
        return known
    return [each for each in known if not each.is_signature]


def parse_expected(expected: Mapping[str, Any]) -> list[Expectation]:
    """Return what ``expected`` of a study's YAML holds.

    Raises:
        ConfigError: names the key, what was expected and what came.
    """
    if not isinstance(expected, Mapping):
        raise ConfigError(f"expected must be a mapping; got {expected!r}")
    check_keys(expected, ("source", "settings", "signatures", "published"), "expected.")
    settings = expected.get("settings") or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"expected.settings must be a mapping; got {settings!r}")
    found = []
    for kind in ("signatures", "published"):
        entries = expected.get(kind) or []
        if not isinstance(entries, list):
            raise ConfigError(f"expected.{kind} must be a list; got {entries!r}")
        for index, entry in enumerate(entries):
            key = f"expected.{kind}[{index}]"
            if not isinstance(entry, Mapping) or "arm" not in entry:
                raise ConfigError(f"{key} must be a mapping with an arm; got {entry!r}")
            check_keys(entry, _KEYS, f"{key}.")
            values = {name: entry[name] for name in QUANTITIES if name in entry}
            for name, value in values.items():
                _check_value(f"{key}.{name}", value, kind == "signatures")
            arm = entry["arm"]
            found.append(
                Expectation(
                    labels=tuple(arm) if isinstance(arm, list) else (str(arm),),
                    horizon=entry.get("horizon"),
                    values=values,
                    is_signature=kind == "signatures",
                    source=str(entry.get("source", "")),
                    settings=str(entry.get("settings", "")),
                )
            )
    return found


def _check_value(key: str, value: Any, is_interval: bool) -> None:
    def is_number(x: Any) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool)

    if is_interval:
        ok = (
            isinstance(value, list)
            and len(value) == 2
            and all(map(is_number, value))
            and value[0] <= value[1]
        )
        expected = "an interval [low, high]"
    else:
        ok, expected = is_number(value), "a number"
    if not ok:
        raise ConfigError(f"{key} must be {expected}; got {value!r}")


def _has_settings(config: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    settings = expected.get("settings") or {}
    return all(value_at(config, key) == value for key, value in settings.items())
