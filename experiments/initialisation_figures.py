"""Figures of ``experiments.initialisation``, made of ``rnn_cuda.instruments.plots``.

Profiles: by row and quantity, ``(seeds, T)`` norms in the order of time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rnn_cuda.instruments import plots

_NORM = r"norm of the adjoint, where $\|\partial L/\partial h_T\| = 1$"

Profiles = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]


def draw(
    found: Mapping[str, Any], profiles: Profiles, families: Mapping[str, str], folder: Path
) -> None:
    """Draw ``initialisation``, ``additive_path`` and ``lstm_state`` as PNG and SVG.

    Args:
        found: what ``results.json`` holds.
        profiles: see above.
        families: RNN, LSTM or GRU, by row.
        folder: where the files go.
    """
    with mpl.rc_context(plots.STYLE):
        plots.save(_by_family(found, profiles, families), folder / "initialisation")
        plots.save(_additive_path(profiles, families), folder / "additive_path")
        plots.save(_lstm_state(profiles, families), folder / "lstm_state")


def _panels(count: int, width: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False).flat)


def _by_family(found: Mapping[str, Any], profiles: Profiles, families: Mapping[str, str]) -> Figure:
    names = list(dict.fromkeys(families.values()))
    figure, panels = _panels(len(names), 12.5)
    for axes, family in zip(panels, names, strict=True):
        labels = [label for label in profiles if families[label] == family]
        words = "measured before"
        for label, colour in zip(labels, plots.COLOURS, strict=False):
            reference = found["rows"][label]["reference"]
            if reference is not None:
                values = [10**value for value in reference]
                style = {"color": colour, "mec": "black", "ms": 11, "zorder": 5}
                axes.plot(found["settings"]["lags"], values, "*", label=words, **style)
                words = None  # once in the legend
        lines = {label: profiles[label]["state"] for label in labels}
        plots.adjoint_profile(lines, relative=True, title=family, ax=axes)
        if axes is not panels[0]:
            axes.set_ylabel("")
    settings = found["settings"]
    figure.suptitle(
        f"Total adjoint at initialisation, H = {settings['hidden_size']}: median and range of "
        f"{settings['seeds']} seeds; LSTM: of (h, c)"
    )
    return figure


def _additive_path(profiles: Profiles, families: Mapping[str, str]) -> Figure:
    gated = [family for family in dict.fromkeys(families.values()) if family != "RNN"]
    figure, panels = _panels(len(gated), 9.5)
    for axes, family in zip(panels, gated, strict=True):
        labels = [label for label in profiles if families[label] == family]
        whole = {label: profiles[label]["state"] for label in labels}
        alone = {label: profiles[label]["additive"] for label in labels}
        stages = ("all paths", "additive path alone")
        plots.adjoint_profile(whole, alone, stages=stages, title=family, ax=axes)
        axes.set_ylabel(_NORM if axes is panels[0] else "")
    figure.suptitle("What the additive path carries by itself, at initialisation")
    return figure


def _lstm_state(profiles: Profiles, families: Mapping[str, str]) -> Figure:
    labels = [label for label in profiles if families[label] == "LSTM"]
    figure = plots.adjoint_profile(
        {label: profiles[label]["state"] for label in labels},
        {label: profiles[label]["hidden"] for label in labels},
        stages=("adjoint of (h, c)", "of h alone"),
        title="An LSTM's gradient travels in c, at initialisation",
    )
    figure.axes[0].set_ylabel(_NORM)
    return figure
