"""The figure: the ratio of everyone on every shape of the main table.

Colours are those of Okabe & Ito; each contestant has its own marker too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.cases import BASELINE, OURS
from benchmarks.tables import ratio_of, timings_of
from rnn_cuda.instruments import plots

Results = Mapping[str, Any]

# Grey for the gated cells, which are other models.
LOOKS: dict[str, tuple[str, str]] = {
    OURS: ("#0072B2", "o"),
    BASELINE: ("#D55E00", "s"),
    "jax": ("#009E73", "^"),
    "onnxruntime": ("#CC79A7", "D"),
    "keras": ("#E69F00", "v"),
    "compiled_loop": ("#56B4E9", "P"),
    "rnn_cell_loop": ("#000000", "X"),
    "torch_lstm": ("#999999", "<"),
    "torch_gru": ("#999999", ">"),
}
MODES = {"forward": "forward", "train": "training step"}


def draw(results: Results, folder: Path) -> list[str]:
    """Draw it if there are results for it, without a display; return the names of the bitmaps."""
    with mpl.rc_context({**plots.STYLE, "legend.fontsize": 8.5}):
        figure = ratio_by_shape(results)
        if figure is None:
            return []
        figure.savefig(folder / "ratio_by_shape.png")
    return ["ratio_by_shape.png"]


def ratio_by_shape(results: Results) -> Figure | None:
    """Return the main table: a row for each shape, a panel for each mode; None without results."""
    timings = timings_of(results, "table")
    if not timings:
        return None
    contestants = results["contestants"]
    shapes = list(dict.fromkeys(case.shape_text for case, _ in timings))
    counts = sorted({timing["threads"] for _, timing in timings})
    figure = Figure(figsize=(8.6, 1.9 + 0.42 * len(shapes)), layout="constrained")
    panels = figure.subplots(1, len(MODES), sharey=True)
    shown: dict[str, None] = {}
    for axes, (mode, title) in zip(panels, MODES.items(), strict=True):
        for case, timing in [pair for pair in timings if pair[0].mode == mode]:
            # Several numbers of threads: the fewest above the row's line and hollow.
            few = timing["threads"] != counts[-1]
            shift = 0.14 * (1 - 2 * few) * (len(counts) > 1)
            for name, (colour, marker) in LOOKS.items():
                ratio = ratio_of(timing, name)
                if ratio is None or name == BASELINE:
                    continue
                shown[name] = None
                look = {"color": colour, "mfc": "white" if few else colour}
                ours = name == OURS
                look |= {"ms": 8 if ours else 4.5, "zorder": 4 if ours else 3}
                axes.plot([ratio], [shapes.index(case.shape_text) + shift], marker, **look)
        axes.axvline(1, color="black", lw=1)
        axes.set(xscale="log", title=title, xlabel="times as fast as torch.nn.RNN")
        low, high = axes.get_xlim()
        ticks = [t for t in (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= t <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    panels[0].set_yticks(range(len(shapes)), shapes)
    panels[0].set_ylabel("T, B, I, H")
    panels[0].invert_yaxis()
    handles = [
        Line2D(
            [], [], color=colour, marker=marker, ms=5, ls="none", label=contestants[name]["title"]
        )
        for name, (colour, marker) in LOOKS.items()
        if name in shown
    ]
    for count in counts if len(counts) > 1 else []:
        look = {"color": "0.4", "marker": "o", "ls": "none"}
        fill = "0.4" if count == counts[-1] else "white"
        handles.append(Line2D([], [], **look, mfc=fill, label=f"{count} thread{'s'[: count - 1]}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    figure.suptitle("Ratio by shape, float32, same number of threads for both")
    return figure
