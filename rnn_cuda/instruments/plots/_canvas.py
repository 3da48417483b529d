"""What every figure shares: palette, style, axes, legends, files. matplotlib is imported late."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito, without the yellow (too faint on white) and the black (kept for reference lines).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,  # a ground would hide the points that it lies on
    "legend.fontsize": 8,
    "savefig.dpi": 160,
    "svg.hashsalt": "rnn_cuda",
}
"""matplotlib settings of every figure; the salt makes an SVG the same file each time."""

Look = dict[str, Any]


def look(index: int) -> Look:
    """Return colour and marker of line number ``index``; they part ways after six."""
    shift = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + shift) % len(MARKERS)],
        "markersize": 4.5,
        "markerfacecolor": "white" if shift % 2 else COLOURS[index % len(COLOURS)],
    }


def as_text(words: object, longest: int | None = None) -> str:
    r"""Return ``words`` in such a way that matplotlib draws them as they are.

    ``$`` would begin a formula and becomes ``\$``. Labels that are empty or begin with ``_`` are
    hidden from legends: they get a space in front. A control character becomes its escape; a line
    break stays one.

    Args:
        words: a label, title, or anything else with a ``str``.
        longest: number of characters after which the rest becomes an ellipsis.
    """
    text = str(words)
    if longest is not None and len(text) > longest:
        text = f"{text[: longest - 1]}…"
    undrawn = ("Cc", "Cn", "Cs")
    text = "".join(
        c.encode("unicode_escape").decode()
        if c != "\n" and unicodedata.category(c) in undrawn
        else c
        for c in text
    ).replace("$", r"\$")
    return f" {text}" if text == "" or text.startswith("_") else text


def legend(axes: Axes, *arguments: Any, **options: Any) -> None:
    """Draw a legend, whose labels are those given where `as_text` had to change them.

    Arguments are those of ``Axes.legend``.
    """
    drawn = axes.legend(*arguments, **options)
    # What is too long for the axes is cut off; making room for it could squeeze them to nothing.
    drawn.set_in_layout(False)
    for entry in drawn.get_texts():
        label = entry.get_text()
        if label.count("$") == label.count(r"\$"):  # no formula
            entry.set_parse_math(False)
            label = label.replace(r"\$", "$")
            entry.set_text(label[1:] if label == " " or label.startswith(" _") else label)


def matplotlib() -> Any:
    """Import matplotlib, or say that it is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ImportError(
            "rnn_cuda.instruments.plots draws with matplotlib, which is not installed: "
            "pip install matplotlib"
        ) from error
    return matplotlib


@contextmanager
def canvas(ax: Axes | None, size: tuple[float, float] = (6.4, 4.2)) -> Iterator[Axes]:
    """Yield ``ax``, or the axes of a new figure, while the style is in force."""
    with canvases(None if ax is None else [ax], 1, size) as (axes,):
        yield axes


@contextmanager
def canvases(
    axes: Sequence[Axes] | None, count: int, size: tuple[float, float], **options: Any
) -> Iterator[list[Axes]]:
    """Yield ``axes``, or ``count`` axes of a new figure, while the style is in force.

    Options are those of ``Figure.subplots``; side by side without any.
    """
    with matplotlib().rc_context(STYLE):
        from matplotlib.figure import Figure

        if axes is None:
            figure = Figure(figsize=size, layout="constrained")
            shape = {"nrows": 1, "ncols": count, **options}
            grid: Any = figure.subplots(squeeze=False, **shape)
            yield list(grid.flat)
            return
        # Also a single one that is not in a list, and an array of them.
        given: list[Any] = list(axes) if isinstance(axes, Iterable) else [axes]
        if len(given) != count:
            raise ValueError(f"ax: expected {count} axes, got {len(given)}")
        yield given


def figure_of(axes: Axes) -> Figure:
    """Return the figure that ``axes`` are in (the outermost, of nested ones)."""
    figure: Any = axes.figure
    return figure.figure


def finish(
    axes: Axes,
    title: str | None,
    *,
    legend_title: str | None = None,
    zeros: str = "exactly 0",
    **properties: Any,
) -> Figure:
    """Set title, labels and legend (where there is something to explain); return the figure.

    Args:
        axes: what is finished.
        title: of the axes, text.
        legend_title: of the legend.
        zeros: what a cross at the foot stands for.
        properties: for ``Axes.set``.
    """
    if title is not None:
        axes.set_title(as_text(title))
    axes.set(**properties)
    handles, labels = axes.get_legend_handles_labels()
    if any(line.get_gid() == ZEROS for line in axes.lines):
        from matplotlib.lines import Line2D

        handles.append(Line2D([], [], color="0.3", marker="x", linestyle="none", markersize=4))
        labels.append(zeros)
    if handles:
        legend(axes, handles, labels, loc="best", title=legend_title)
    return figure_of(axes)


ZEROS = "exact zeros"
"""The ``gid`` of the lines that mark zeros."""


def mark_zeros(axes: Axes, at: Any, colour: Any, *, left: bool = False) -> None:
    """Put a cross at the foot of the axes for each value that has no logarithm.

    Every line of crosses stands a little above the one before. With ``left``, ``at`` are positions
    on the vertical axis, and the crosses stand at the left edge.
    """
    if len(at) == 0:
        return
    style = {"color": colour, "markersize": 4, "gid": ZEROS, "zorder": 4, "clip_on": False}
    if left:
        edge = [0.01] * len(at)
        axes.plot(edge, at, "x", transform=axes.get_yaxis_transform(), **style)
        return
    rows = sum(line.get_gid() == ZEROS for line in axes.lines)
    foot = [0.02 + 0.025 * rows] * len(at)
    axes.plot(at, foot, "x", transform=axes.get_xaxis_transform(), **style)


def save(figure: Figure, stem: str | Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write a figure as ``stem.png`` and ``stem.svg``, or in other formats of matplotlib.

    The same figure gives the same SVG or PDF file each time: they hold no date. A character that
    the font lacks is drawn as a box, without matplotlib's warning.

    Args:
        figure: what one of the functions returned, or any other figure.
        stem: path without a suffix; folders that are missing are made.
        formats: suffixes.

    Returns:
        The files written, in the order of ``formats``.

    Raises:
        ValueError: matplotlib does not know a format.

    """
    known = figure.canvas.get_supported_filetypes()
    unknown = [name for name in formats if name not in known]
    if unknown:
        raise ValueError(
            f"formats: expected some of {', '.join(sorted(known))}; got {unknown[0]!r}"
        )
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    paths = [stem.with_name(f"{stem.name}.{name}") for name in formats]
    with matplotlib().rc_context(STYLE), warnings.catch_warnings():
        lacking = r"Glyph \d+ .*missing from|Matplotlib currently does not support"
        warnings.filterwarnings("ignore", message=lacking)
        for name, path in zip(formats, paths, strict=True):
            figure.savefig(path, format=name, metadata=undated.get(name))
    return paths
