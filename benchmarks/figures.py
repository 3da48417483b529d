"""The figure: the ratio of everyone on every shape of the main table.

Colours are those of Okabe & Ito; each contestant has its own marker too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.tables import ratio_of, timings_of
from rnn_cuda.instruments import plots

LOOKS: dict[str, tuple[str, str]] = {
    "fused_rnn": ("#0072B2", "o"),
    "jax": ("#009E73", "^"),
    "onnxruntime": ("#CC79A7", "D"),
    "keras": ("#E69F00", "v"),
    "compiled_loop": ("#56B4E9", "P"),
    "rnn_cell_loop": ("#000000", "X"),
    # Grey: the gated cells, which are other models.
    "torch_lstm": ("#999999", "<"),
    "torch_gru": ("#999999", ">"),
}


def draw(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw it if there are results for it, without a display; return the names of the bitmaps."""
    if not timings_of(results, "table"):
        return []
    with mpl.rc_context({**plots.STYLE, "legend.fontsize": 8.5}):
        ratio_by_shape(results).savefig(folder / "ratio_by_shape.png")
    return ["ratio_by_shape.png"]


def ratio_by_shape(results: Mapping[str, Any]) -> Figure:
    """Return the main table, at the greatest number of threads: a panel for each mode."""
    timings = timings_of(results, "table")
    threads = max(timing["threads"] for _, timing in timings)
    shapes = list(dict.fromkeys(case.shape for case, _ in timings))
    figure = Figure(figsize=(8.6, 1.9 + 0.42 * len(shapes)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, mode in zip(panels, ("forward", "train"), strict=True):
        chosen = [(c, t) for c, t in timings if (c.mode, t["threads"]) == (mode, threads)]
        for name, (colour, marker) in LOOKS.items():
            points = [(ratio_of(t, name), shapes.index(c.shape)) for c, t in chosen]
            known = [(ratio, row) for ratio, row in points if ratio]
            look = {"ms": 8, "zorder": 4} if name == "fused_rnn" else {"ms": 4.5}
            title = results["contestants"][name]["title"]
            if known:
                axes.plot(*zip(*known, strict=True), marker, color=colour, label=title, **look)
        axes.axvline(1, color="black", lw=1)
        axes.set(xscale="log", title={"forward": mode, "train": "training step"}[mode])
        axes.set_xlabel("times as fast as torch.nn.RNN")
        low, high = axes.get_xlim()
        ticks = [t for t in (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= t <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    panels[0].set_yticks(range(len(shapes)), [", ".join(map(str, shape)) for shape in shapes])
    panels[0].set_ylabel("T, B, I, H")
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(f"Ratio by shape, float32, threads of each: {threads}")
    return figure
