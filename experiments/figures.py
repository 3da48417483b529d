"""Figures of a view, drawn by the library's own plots."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from experiments.train import LEARNED_BELOW, SOLVED_BELOW
from experiments.view import Row, View, curve
from rnn_cuda.instruments import plots

SMOOTHED = 20
"""Training steps that a point of a loss curve is the mean of."""


def draw(view: View, folder: Path) -> list[Path]:
    """Draw ``ladder`` and ``loss_curves`` as PNG and SVG; return the files."""
    files = []
    if any(row.records for row in view.rows):
        with mpl.rc_context(plots.STYLE):
            files += plots.save(ladder(view), folder / "ladder")
            losses = loss_curves(view)
            if losses is not None:
                files += plots.save(losses, folder / "loss_curves")
    return files


def ladder(view: View) -> Figure:
    """Return the cliff, and the adjoint's profiles before and after training."""
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    cliff, flow = figure.subplots(1, 2)
    rows = [row for row in view.rows if row.records]
    horizons = sorted({row.horizon for row in rows})
    plots.horizon_cliff(
        cliff_series(rows, horizons),
        horizons,
        learned_below=LEARNED_BELOW,
        solved_below=SOLVED_BELOW,
        title="Where learning stops (median and every seed)",
        ax=cliff,
    )
    shown = _with_profiles(rows)
    if shown:
        plots.adjoint_profile(
            {name: row.profiles("initial") for name, row in shown.items()},
            {name: row.profiles("trained") for name, row in shown.items()}
            if all(row.profiles("trained") for row in shown.values())
            else None,
            title="Total adjoint by lag",
            ax=flow,
        )
    else:
        flow.set_axis_off()
    figure.suptitle(plots.as_text(f"{view.name}: {', '.join(view.tasks)}", longest=90))
    return figure


def cliff_series(rows: list[Row], horizons: list[int]) -> dict[str, list[list[float]]]:
    """Return, by arm, error over know-nothing error: seeds by horizons; nan where there is none."""
    series: dict[str, list[list[float]]] = {}
    for label in dict.fromkeys(_name(row) for row in rows):
        own = {row.horizon: row for row in rows if _name(row) == label}
        shares = {T: _shares(own[T]) if T in own else [] for T in horizons}
        seeds = max(len(values) for values in shares.values())
        series[label] = [
            [shares[T][seed] if seed < len(shares[T]) else math.nan for T in horizons]
            for seed in range(seeds)
        ]
    return series


def _shares(row: Row) -> list[float]:
    """Return each seed's error over that of knowing nothing; inf where it diverged."""
    return [
        record.result.get("error_over_know_nothing", math.inf)
        if record.status == "finished"
        else math.inf
        for record in row.records
    ]


def _name(row: Row) -> str:
    return f"contrast: {row.label}" if row.is_contrast else row.label


def _with_profiles(rows: list[Row]) -> dict[str, Row]:
    """Return the rows whose profiles tell arms or horizons apart: all, or those of one horizon."""
    rows = [row for row in rows if row.profiles("initial")]
    if len({row.label for row in rows if not row.is_contrast}) > 1:
        # Several arms: at the longest horizon that all of them have.
        common = set.intersection(
            *({r.horizon for r in rows if r.label == label} for label in {r.label for r in rows})
        )
        rows = [row for row in rows if row.horizon == max(common or {row.horizon})]
        return {_name(row): row for row in rows}
    return {
        f"T = {row.horizon}" + (f", {row.label}" if row.is_contrast else ""): row for row in rows
    }


def loss_curves(view: View) -> Figure | None:
    """Return the training loss against the step, a panel per row; ``None`` if none is logged."""
    rows = {(_name(row), row.horizon): row for row in view.rows if row.records}
    curves: dict[tuple[str, int], list[list[float]]] = {}
    for entry in view.entries:
        key = (f"contrast: {entry.label}" if entry.contrast_of else entry.label, entry.horizon)
        _, losses = curve(entry, "loss")
        if key in rows and losses:
            curves.setdefault(key, []).append(_smoothed(losses))
    if not curves:
        return None
    columns = min(4, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(2.9 * columns, 2.5 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    for panel, (key, losses) in zip(panels, curves.items(), strict=False):
        label, horizon = key
        points = max(map(len, losses))
        plots.loss_curves(
            {"": [each + [math.nan] * (points - len(each)) for each in losses]},
            [SMOOTHED * (index + 1) for index in range(points)],
            know_nothing=rows[key].records[0].result["know_nothing_loss"],
            title=plots.as_text(f"T = {horizon}, {label}", longest=30),
            ax=panel,
        )
        legend = panel.get_legend()
        if legend is not None:
            legend.remove()
    figure.suptitle(
        f"Training loss, mean of {SMOOTHED} steps; range over seeds; dashed: knowing nothing"
    )
    return figure


def _smoothed(losses: list[float]) -> list[float]:
    blocks = [losses[start : start + SMOOTHED] for start in range(0, len(losses), SMOOTHED)]
    return [sum(block) / len(block) for block in blocks]
