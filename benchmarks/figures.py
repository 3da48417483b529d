"""Two figures: time per step against H, and the ratio of every shape. PNG and SVG, no display.

Colours are those of Okabe & Ito; each contestant has its own marker too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.cases import BASELINE, Case
from benchmarks.reading import ratio_of, seconds_of, threads_text, timings_of, title_of
from rnn_cuda.instruments import plots

Results = Mapping[str, Any]

# Colour and marker of each; grey and thin for the gated cells, which are other models.
LOOKS: dict[str, tuple[str, str]] = {
    "fused_rnn": ("#0072B2", "o"),
    "torch_rnn": ("#D55E00", "s"),
    "jax": ("#009E73", "^"),
    "onnxruntime": ("#CC79A7", "D"),
    "keras": ("#E69F00", "v"),
    "compiled_loop": ("#56B4E9", "P"),
    "rnn_cell_loop": ("#000000", "X"),
    "torch_lstm": ("#999999", "<"),
    "torch_gru": ("#999999", ">"),
}

STYLE = {**plots.STYLE, "legend.fontsize": 8.5}

MODE_TITLES = {"forward": "forward", "train": "training step"}


def draw(found: Results, folder: Path) -> list[str]:
    """Draw what there are results for; return the names of the bitmaps."""
    drawn = []
    with mpl.rc_context(STYLE):
        for name, figure in (
            ("ratio_by_shape", ratio_by_shape(found)),
            ("time_per_step", time_per_step(found)),
        ):
            if figure is not None:
                figure.savefig(folder / f"{name}.png")
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                drawn.append(f"{name}.png")
    return drawn


# ---- time per step against H ---------------------------------------------------------------------


def time_per_step(found: Results) -> Figure | None:
    """Return the scaling suite: a panel for each mode and batch size; None without results."""
    threads = max(found["threads"])
    timings = [pair for pair in timings_of(found, "scaling") if pair[1]["threads"] == threads]
    if not timings:
        return None
    modes = list(dict.fromkeys(case.mode for case, _ in timings))
    batches = sorted({case.B for case, _ in timings})
    size = (1.6 + 3.4 * len(batches), 0.9 + 2.8 * len(modes))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(modes), len(batches), sharex=True, squeeze=False)
    shown: list[str] = []
    for row, mode in zip(panels, modes, strict=True):
        for axes, batch in zip(row, batches, strict=True):
            here = [pair for pair in timings if (pair[0].mode, pair[0].B) == (mode, batch)]
            shown += _draw_lines(axes, here)
            axes.set_title(f"{MODE_TITLES[mode]}, B = {batch}")
            axes.set(xscale="log", yscale="log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            widths = sorted({case.H for case, _ in timings})
            axes.xaxis.set_major_locator(FixedLocator(widths))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    for axes in panels[-1]:
        axes.set_xlabel("hidden size H")
    for row in panels:
        row[0].set_ylabel("microseconds per time step")
    handles = [_handle(name, title_of(found, name)) for name in LOOKS if name in shown]
    handles.append(Line2D([], [], color="0.4", ls="--", lw=1.2, label="floor"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    lengths = " or ".join(str(T) for T in sorted({case.T for case, _ in timings}))
    figure.suptitle(
        f"Time per step against H: T = {lengths}, I = {timings[0][0].I}, float32, "
        f"{threads_text(threads)}"
    )
    return figure


def _draw_lines(axes: Axes, timings: Sequence[tuple[Case, Mapping[str, Any]]]) -> list[str]:
    """Draw everyone's line, and the floor; return who was drawn."""
    drawn = []
    for name, (colour, marker) in LOOKS.items():
        points = [
            (case.H, 1e6 * seconds / case.T)
            for case, timing in timings
            if (seconds := seconds_of(timing, name)) is not None
        ]
        if points:
            bold = name in ("fused_rnn", BASELINE)
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                ms=5 if bold else 4,
                lw=2.2 if bold else 1,
                zorder=4 if name == "fused_rnn" else 3,
            )
            drawn.append(name)
    floor = [(c.H, 1e6 * t["floor"]["seconds"] / c.T) for c, t in timings if "floor" in t]
    if floor:
        axes.plot(*zip(*floor, strict=True), color="0.4", ls="--", lw=1.2)
    return drawn


def _handle(name: str, title: str) -> Line2D:
    colour, marker = LOOKS[name]
    return Line2D([], [], color=colour, marker=marker, ms=5, label=title)


# ---- ratio by shape ------------------------------------------------------------------------------


def ratio_by_shape(found: Results) -> Figure | None:
    """Return the main table: a row for each shape, a panel for each mode; None without results."""
    timings = timings_of(found, "table")
    if not timings:
        return None
    shapes = list(dict.fromkeys(case.shape for case, _ in timings))
    modes = list(dict.fromkeys(case.mode for case, _ in timings))
    most = max(found["threads"])
    figure = Figure(figsize=(8.6, 1.9 + 0.42 * len(shapes)), layout="constrained")
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    shown: list[str] = []
    for axes, mode in zip(panels, modes, strict=True):
        for case, timing in timings:
            if case.mode != mode:
                continue
            at = shapes.index(case.shape)
            for name, (colour, marker) in LOOKS.items():
                ratio = ratio_of(timing, name)
                if ratio is None or name == BASELINE:
                    continue
                shown.append(name)
                many = timing["threads"] == most
                ours = name == "fused_rnn"
                # One thread above the row's line, hollow; most threads below it, filled.
                axes.plot(
                    [ratio],
                    [at + (0.14 if many else -0.14) * (len(found["threads"]) > 1)],
                    marker,
                    color=colour,
                    mfc=colour if many else "white",
                    ms=8 if ours else 4.5,
                    zorder=4 if ours else 3,
                )
        axes.axvline(1, color="black", lw=1)
        axes.set_xscale("log")
        axes.set_title(MODE_TITLES[mode])
        axes.set_xlabel("times as fast as torch.nn.RNN")
        low, high = axes.get_xlim()
        ticks = [t for t in (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= t <= high]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[0].set_yticks(range(len(shapes)), [", ".join(map(str, shape)) for shape in shapes])
    panels[0].set_ylabel("T, B, I, H")
    panels[0].invert_yaxis()
    handles = [_handle(name, title_of(found, name)) for name in LOOKS if name in shown]
    for handle in handles:
        handle.set_linestyle("none")
    if len(found["threads"]) > 1:
        for number in (min(found["threads"]), most):
            fill = "0.4" if number == most else "white"
            look = {"color": "0.4", "marker": "o", "mfc": fill, "ls": "none"}
            handles.append(Line2D([], [], **look, label=threads_text(number)))
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    figure.suptitle("Ratio by shape, float32, same number of threads for both")
    return figure
