"""Figures of a view, drawn by the library's own plots; those that its records allow.

`FIGURES` has them by name, as a study's ``figures`` names them: a new figure is one function in it.
Each yields what it can draw of a view, and nothing where the records do not hold what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from experiments.evaluation import LEARNED_BELOW, SOLVED_BELOW
from experiments.view import (
    Entry,
    Row,
    View,
    ViewError,
    baselines,
    curve,
    know_nothing_metric,
    measurements,
    probed,
)
from rnn_cuda.instruments import Saturation, plots

SIZE = (4.8, 3.6)
"""Inches; small, so that what is written in a figure can be read on a phone."""
SMOOTHED = 20
"""Training steps that a point of a loss curve is the mean of, at least."""
POINTS = 200
"""Points of a loss curve, at most."""
LINES = 6
"""Lines, or panels, of one figure; what is more goes into further figures."""
STAGES = ("initial", "trained")


@dataclass(frozen=True)
class Drawn:
    """A figure that was drawn.

    Attributes:
        name: of its file, without a suffix.
        figure: itself.
        caption: what it shows, and of which runs.
        is_large: whether it has so many points that it is better kept as pixels alone.
    """

    name: str
    figure: Figure
    caption: str
    is_large: bool = False


@dataclass(frozen=True)
class Group:
    """An arm at one horizon, with the runs of its seeds.

    Attributes:
        row: of the table.
        entries: that have numbers.
    """

    row: Row
    entries: list[Entry]

    @property
    def name(self) -> str:
        """What to call the arm."""
        return _name(self.row)

    @property
    def title(self) -> str:
        """Arm and horizon."""
        return f"{self.name}, T = {self.row.horizon}"

    def probed(self, probe: str, stage: str, quantity: str) -> list[Any]:
        """Return what a probe measured first or last, for each seed that has it."""
        values = (probed(record, probe, stage).get(quantity) for record in self.row.records)
        return [value for value in values if value is not None]


def draw(view: View, folder: Path) -> list[Path]:
    """Draw the figures that a view names into a folder, as PNG and SVG; return the files."""
    return [
        path
        for each in drawn(view, view.figures)
        for path in plots.save(each.figure, folder / each.name)
    ]


def drawn(
    view: View,
    names: Iterable[str],
    on_problem: Callable[[str, Exception], None] | None = None,
) -> Iterator[Drawn]:
    """Yield figures of a view, as far as its records allow.

    Args:
        view: of one task.
        names: of `FIGURES`.
        on_problem: called with the name of a figure that could not be drawn, and why; without it
            the exception is raised.
    """
    with mpl.rc_context(plots.STYLE):
        for name in names:
            try:
                yield from FIGURES[name](view)
            except Exception as error:
                if on_problem is None:
                    raise
                on_problem(name, error)


def ladder(view: View) -> Iterator[Drawn]:
    """The cliff and the adjoint's profiles, side by side."""
    if not view.records:
        return
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
    shown = _told_apart([group for group in _groups(view) if group.row.profiles("initial")])
    if shown:
        _draw_profiles(shown, flow, "Total adjoint by lag")
    else:
        flow.set_axis_off()
    figure.suptitle(plots.as_text(f"{view.name}: {', '.join(view.tasks)}", longest=90))
    yield Drawn(
        "ladder",
        figure,
        "Left: test error over that of knowing nothing against T; a dot per seed, a line through "
        "the medians; seeds that diverged are not drawn. Right: norm of the total adjoint dL/dh_t "
        "(of (h, c) for an LSTM) against the lag, at initialisation and trained. "
        f"{_runs(_groups(view))}",
    )


def adjoint_profiles(view: View) -> Iterator[Drawn]:
    """1: the gradient by lag, by model, at initialisation and trained."""
    groups = [group for group in _groups(view) if group.row.profiles("initial")]
    for name, shown in _parts("adjoint_profile", _told_apart(groups)):
        figure, axes = _canvas()
        _draw_profiles(shown, axes)
        yield Drawn(
            name,
            figure,
            "Norm of the total adjoint dL/dh_t (of (h, c) for an LSTM) against the lag, the mean "
            "over the probe batch, at initialisation and trained; line: median over seeds, band: "
            f"their range. {_runs(shown.values())}",
        )


def adjoint_heatmaps(view: View) -> Iterator[Drawn]:
    """2: the same through training."""
    groups = [g for g in _groups(view) if len(_through_training(g, "adjoint")[0]) > 2]
    for index, group in enumerate(_longest(groups)):
        steps, by_seed = _through_training(group, "adjoint")
        figure, axes = _canvas()
        norms = [[row["state_norm"] for row in rows] for rows in by_seed]
        plots.adjoint_heatmap(_numbers(norms), steps, title=_short(group.title), ax=axes)
        yield Drawn(
            f"adjoint_heatmap_{index + 1}",
            figure,
            "Norm of dL/dh_t by time step (up) and training step (across); the median over seeds. "
            f"{_runs([group])}",
            is_large=True,
        )


def lag_contributions(view: View) -> Iterator[Drawn]:
    """What every step adds to the gradient of U, by lag: the probe's own figure."""
    probe = ("lag_contribution", "initial", "contribution")
    groups = [group for group in _groups(view) if group.probed(*probe)]
    for name, shown in _parts("lag_contribution", _told_apart(groups)):
        figure, axes = _canvas()
        initial, trained = (
            {
                title: _numbers(values)
                for title, group in shown.items()
                if (values := group.probed("lag_contribution", stage, "contribution"))
            }
            for stage in STAGES
        )
        plots.adjoint_profile(initial, trained or None, ax=axes)
        axes.set_ylabel("norm of the step's term in dL/dU")
        yield Drawn(
            name,
            figure,
            "Frobenius norm of what each step adds to dL/dU, against the lag, the mean over the "
            "probe batch; median and range over seeds. The first step adds exactly zero. "
            f"{_runs(shown.values())}",
        )


def loss_curves(view: View) -> Iterator[Drawn]:
    """3: the training loss against the step, with the line of knowing nothing."""
    curves = {}
    for group in _groups(view):
        losses = [values for entry in group.entries if (values := _logged(entry, "loss"))]
        if losses:
            curves[group.title] = (group, losses)
    for name, shown in _parts("loss_curves", curves):
        block = max(SMOOTHED, *(len(v) // POINTS for _, losses in shown.values() for v in losses))
        columns = min(2, len(shown))
        lines = math.ceil(len(shown) / columns)
        figure = Figure(figsize=(SIZE[0], 0.5 + (2.0 if lines > 1 else 2.6) * lines))
        figure.set_layout_engine("constrained")
        panels = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
        for panel in panels[len(shown) :]:
            panel.set_axis_off()
        for panel, (title, (group, losses)) in zip(panels, shown.items(), strict=False):
            smooth = [_smoothed(values, block) for values in losses]
            points = max(map(len, smooth))
            plots.loss_curves(
                {"": [each + [math.nan] * (points - len(each)) for each in smooth]},
                [block * (index + 1) for index in range(points)],
                know_nothing=group.row.records[0].result.know_nothing_loss,
                title=_short(title, 34 if columns == 2 else 60),
                ax=panel,
            )
            panel.title.set_fontsize(8)
            legend = panel.get_legend()
            if legend is not None:
                legend.remove()
        yield Drawn(
            name,
            figure,
            f"Training loss, a point for the mean of {block} steps; line: median over seeds, "
            "band: their range; dashed: the loss of knowing nothing. "
            f"{_runs([group for group, _ in shown.values()])}",
        )


def cliffs(view: View) -> Iterator[Drawn]:
    """4: error and share solved against T."""
    groups = _groups(view)
    horizons = sorted({group.row.horizon for group in groups})
    if len(horizons) < 2:
        return
    series = cliff_series([group.row for group in groups], horizons)
    for share_solved, stem in ((False, "cliff"), (True, "share_solved")):
        for name, shown in _parts(stem, series):
            figure, axes = _canvas()
            plots.horizon_cliff(
                shown,
                horizons,
                share_solved=share_solved,
                learned_below=LEARNED_BELOW,
                solved_below=SOLVED_BELOW,
                ax=axes,
            )
            words = (
                f"Share of seeds that solved the task (test error below {SOLVED_BELOW:.0%} of that "
                "of knowing nothing) against T; a diverged seed did not. "
                if share_solved
                else "Test error over that of knowing nothing against T; a dot per seed, a line "
                "through the medians; seeds that diverged are not drawn. "
            )
            yield Drawn(name, figure, words + _runs(g for g in groups if g.name in shown))


def quality(view: View) -> Iterator[Drawn]:
    """4: the test metric in its own unit against T, beside simple methods."""
    groups = [group for group in _groups(view) if group.row.values("test_metric")]
    if not groups:
        return
    horizons = sorted({group.row.horizon for group in groups})
    records = {
        T: [r for g in groups if g.row.horizon == T for r in g.row.records] for T in horizons
    }
    references = {
        name: [_mean(baselines(records[T]).get(name, [])) for T in horizons]
        for name in baselines(view.records)
    }
    references["knowing nothing"] = [_mean(map(know_nothing_metric, records[T])) for T in horizons]
    metric = view.metric
    for name, shown in _parts("quality", _by_arm([g.row for g in groups], horizons, _metrics)):
        figure, axes = _canvas()
        plots.quality_by_horizon(
            shown, horizons, score_label=f"test {metric}", references=references, ax=axes
        )
        yield Drawn(
            name,
            figure,
            f"Test {metric} against T; a dot per seed, a line through the medians; seeds that "
            "diverged are not drawn. Dashed: simple methods on the same data. "
            f"{_runs(g for g in groups if g.name in shown)}",
        )


def solved_by_ratio(view: View) -> Iterator[Drawn]:
    """4: share solved against the initial ratio."""
    ratios: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    groups = [group for group in _groups(view) if group.row.profiles("initial")]
    for group in groups:
        pairs = zip(group.row.log10_ratios("initial"), _shares(group.row), strict=True)
        for (ratio, error), record in zip(pairs, group.row.records, strict=True):
            profile = probed(record, "adjoint", "initial").get("state_norm")
            if ratio is None and not (profile and profile[0] == 0 and profile[-1]):
                continue
            ratios.setdefault(group.name, []).append(-math.inf if ratio is None else ratio)
            errors.setdefault(group.name, []).append(error)
    if sum(map(len, ratios.values())) < 2:
        return
    for name, shown in _parts("solved_by_ratio", ratios):
        figure, axes = _canvas()
        plots.solved_by_ratio(
            shown, {label: errors[label] for label in shown}, solved_below=SOLVED_BELOW, ax=axes
        )
        yield Drawn(
            name,
            figure,
            "Share of runs that solved the task against the ratio |dL/dh_1| / |dL/dh_T| at "
            "initialisation, runs of all horizons taken together by decade. "
            f"{_runs(g for g in groups if g.name in shown)}",
        )


def recurrent_weights(view: View) -> Iterator[Drawn]:
    """5: dL/dh_0, spectral radius and margin over training."""
    groups = [g for g in _groups(view) if len(_through_training(g, "spectrum")[0]) > 1]
    by_steps: dict[tuple[int, ...], dict[str, Group]] = {}
    for title, group in _told_apart(groups).items():
        by_steps.setdefault(tuple(_through_training(group, "spectrum")[0]), {})[title] = group
    parts = [
        (steps, part)
        for steps, same in by_steps.items()
        for _, part in _parts("recurrent_weights", same)
    ]
    for index, (steps, shown) in enumerate(parts):
        figure = Figure(figsize=(SIZE[0], 2.4 * SIZE[1]), layout="constrained")
        series: list[dict[str, Any]] = [{}, {}, {}]
        for title, group in shown.items():
            _, by_seed = _through_training(group, "spectrum")
            for values, quantity in zip(
                series,
                (lambda r: r["first_adjoint"], _spectral_radius, lambda r: r["margin"]),
                strict=True,
            ):
                values[title] = _numbers([[quantity(row) for row in rows] for rows in by_seed])
        plots.recurrent_weights(*series, steps, ax=figure.subplots(3, 1, sharex=True))
        yield Drawn(
            f"recurrent_weights{f'_{index + 1}' if len(parts) > 1 else ''}",
            figure,
            "Over training: norm of the adjoint at the first step; spectral radius of U of the "
            "lowest layer (the largest over gates); margin 1 - sigma_max(U) max f' of plain Elman "
            "layers, above zero of which the gradient is sure to vanish. Median and range over "
            f"seeds. {_runs(shown.values())}",
        )


def lyapunov_spectra(view: View) -> Iterator[Drawn]:
    """6: Lyapunov exponents before and after training."""
    groups = [g for g in _groups(view) if g.probed("lyapunov", "initial", "exponents")]
    series = {
        f"{title}, {stage}": values
        for title, group in _told_apart(groups).items()
        for stage in STAGES
        if (values := group.probed("lyapunov", stage, "exponents"))
    }
    shown_groups = _told_apart(groups).values()
    for name, shown in _parts("lyapunov_spectrum", series):
        figure, axes = _canvas()
        exponents = {label: _numbers(v, none=-math.inf) for label, v in shown.items()}
        plots.lyapunov_spectrum(exponents, ax=axes)
        yield Drawn(
            name,
            figure,
            "The largest Lyapunov exponents (natural logarithm per time step) before the first "
            "step of training (after what a remedy does before it) and trained; median and range "
            f"over seeds. {_runs(shown_groups)}",
        )


def jacobians(view: View) -> Iterator[Drawn]:
    """7: singular values of dh_T/dh_t at several lags."""
    groups = [g for g in _groups(view) if g.probed("jacobian", "initial", "log10_values")]
    for index, group in enumerate(_longest(groups)):
        stages = [stage for stage in STAGES if group.probed("jacobian", stage, "log10_values")]
        figure = Figure(figsize=(SIZE[0], 0.9 * SIZE[1] * len(stages)), layout="constrained")
        for axes, stage in zip(
            figure.subplots(len(stages), 1, squeeze=False).flat, stages, strict=True
        ):
            values = _numbers(group.probed("jacobian", stage, "log10_values"), none=-math.inf)
            plots.jacobian_singular_values(
                np.swapaxes(values, 0, 1),
                group.probed("jacobian", stage, "lags")[0],
                indices=group.probed("jacobian", stage, "ranks")[0],
                title=_short(f"{group.title}, {stage}"),
                ax=axes,
            )
        yield Drawn(
            f"jacobian_{index + 1}",
            figure,
            "log10 of singular values of dh_T/dh_{T-k} (of (h, c) for an LSTM) by lag k, at "
            f"initialisation and trained; median and range over seeds. {_runs([group])}",
        )


def saturations(view: View) -> Iterator[Drawn]:
    """8: histograms of states and gates."""
    groups = [g for g in _groups(view) if g.probed("saturation", "initial", "hidden")]
    for index, group in enumerate(_longest(groups)):
        record = next(r for r in group.row.records if r.probes.get("saturation"))
        states, gates = _histograms(record.probes["saturation"])
        panels = 2 if gates else 1
        figure = Figure(figsize=(SIZE[0], 0.9 * SIZE[1] * panels), layout="constrained")
        axes = list(figure.subplots(panels, 1, squeeze=False).flat)
        plots.saturation_histograms(states, gates or None, ax=axes)
        axes[0].set_title(_short(group.title))
        yield Drawn(
            f"saturation_{index + 1}",
            figure,
            "Histograms of hidden states (and of candidate states) and of gates, at initialisation "
            "and trained, with the share that is saturated: |h| > "
            f"{record.config['probe']['saturation']['threshold']:g}, for a gate |2 g - 1|. "
            f"T = {group.row.horizon}, seed {record.config['seed']}.",
        )


def gradient_norms(view: View) -> Iterator[Drawn]:
    """9: the gradient's norm before clipping, the threshold, the share that was clipped."""
    by_threshold: dict[float, list[Group]] = {}
    for group in _groups(view):
        clipping = group.row.records[0].config["remedy"].get("clipping") or {}
        if clipping.get("norm") is not None and any(
            curve(e, "gradient_norm")[1] for e in group.entries
        ):
            by_threshold.setdefault(clipping["norm"], []).append(group)
    for index, (threshold, groups) in enumerate(by_threshold.items()):
        for name, shown in _parts(f"gradient_norms_{index + 1}", _told_apart(groups)):
            figure, axes = _canvas()
            norms = {}
            for title, group in shown.items():
                logged = [_logged(entry, "gradient_norm") for entry in group.entries]
                longest = max(map(len, logged))
                norms[title] = [each for each in logged if len(each) == longest]
            plots.gradient_norms(norms, threshold, ax=axes)
            yield Drawn(
                name,
                figure,
                f"Global norm of the gradient before clipping, every step; dashed: the threshold "
                f"{threshold:g}; in the legend the share of steps above it. Median and range over "
                f"the seeds that were trained longest. {_runs(shown.values())}",
                is_large=True,
            )


def remedy_bars(view: View) -> Iterator[Drawn]:
    """10: what arms reach at one horizon."""
    groups = _most_compared(view)
    if len(groups) < 2:
        return
    horizon, result = groups[0].row.horizon, groups[0].row.records[0].result
    scores = {group.name: group.row.values("test_metric") for group in groups}
    figure = Figure(figsize=(SIZE[0], 1.2 + 0.32 * len(scores)), layout="constrained")
    plots.remedy_bars(
        scores,
        score_label=f"test {result.metric}",
        know_nothing=know_nothing_metric(groups[0].row.records[0]),
        log=result.metric != "accuracy" and min(min(v) for v in scores.values()) >= 0,
        title=f"T = {horizon}",
        ax=figure.subplots(),
    )
    yield Drawn(
        "remedy_bars",
        figure,
        f"Test {result.metric} of every arm at T = {horizon}: the median over seeds, a dot per "
        f"seed; dashed: knowing nothing. {_runs(groups)}",
    )


def speed_against_accuracy(view: View) -> Iterator[Drawn]:
    """10: what arms reach at one horizon, and what they cost."""
    groups = _most_compared(view)
    if len(groups) < 2:
        return
    horizon, metric = groups[0].row.horizon, groups[0].row.records[0].result.metric
    timed = {
        group.name: [
            record.seconds_per_step or 0.0
            for record in group.row.records
            if record.result.test_metric is not None
        ]
        for group in groups
    }
    timed = {name: seconds for name, seconds in timed.items() if min(seconds) > 0}
    scores = {group.name: group.row.values("test_metric") for group in groups}
    for name, shown in _parts("speed_against_accuracy", timed):
        figure, axes = _canvas()
        plots.speed_against_accuracy(
            shown,
            {each: scores[each] for each in shown},
            score_label=f"test {metric}",
            seconds_label="seconds per training step, everything included",
            title=f"T = {horizon}",
            ax=axes,
        )
        yield Drawn(
            name,
            figure,
            "Wall-clock time of a training step (evaluation, probes and checkpoints included) "
            f"against the test {metric}; a large mark for the median over seeds. "
            f"{_runs(g for g in groups if g.name in shown)}",
        )


def _most_compared(view: View) -> list[Group]:
    """Return the arms at the horizon that most of them have, the longest of several."""
    by_horizon: dict[int, list[Group]] = {}
    for group in _groups(view):
        if group.row.values("test_metric"):
            by_horizon.setdefault(group.row.horizon, []).append(group)
    most = max(by_horizon, key=lambda horizon: (len(by_horizon[horizon]), horizon), default=0)
    return by_horizon.get(most, [])


FIGURES: dict[str, Callable[[View], Iterator[Drawn]]] = {
    figure.__name__: figure
    for figure in (
        ladder,
        adjoint_profiles,
        adjoint_heatmaps,
        lag_contributions,
        loss_curves,
        cliffs,
        quality,
        solved_by_ratio,
        recurrent_weights,
        lyapunov_spectra,
        jacobians,
        saturations,
        gradient_norms,
        remedy_bars,
        speed_against_accuracy,
    )
}
EVERY = tuple(name for name in FIGURES if name != "ladder")
"""What a page of everything shows; `ladder` puts two of them side by side."""


def cliff_series(rows: Sequence[Row], horizons: Sequence[int]) -> dict[str, list[list[float]]]:
    """Return, by arm, error over know-nothing error: seeds by horizons; nan where there is none."""
    return _by_arm(rows, horizons, _shares)


def _by_arm(
    rows: Sequence[Row], horizons: Sequence[int], numbers: Callable[[Row], list[float]]
) -> dict[str, list[list[float]]]:
    """Return a number of each seed by arm, seeds by horizons; nan where there is none."""
    series: dict[str, list[list[float]]] = {}
    for label in dict.fromkeys(_name(row) for row in rows):
        own = {row.horizon: row for row in rows if _name(row) == label}
        values = {T: numbers(own[T]) if T in own else [] for T in horizons}
        seeds = max(map(len, values.values()))
        series[label] = [
            [values[T][seed] if seed < len(values[T]) else math.nan for T in horizons]
            for seed in range(seeds)
        ]
    return series


def _metrics(row: Row) -> list[float]:
    return row.values("test_metric")


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else math.nan


def _shares(row: Row) -> list[float]:
    """Return each seed's error over that of knowing nothing; inf where it diverged."""
    return [
        _number(record.result.error_over_know_nothing, math.inf)
        if record.status == "finished"
        else math.inf
        for record in row.records
    ]


def _name(row: Row) -> str:
    return f"contrast: {row.label}" if row.is_contrast else row.label


def _groups(view: View) -> list[Group]:
    """Return the rows that have numbers, each with its runs."""
    entries: dict[tuple[str, int, bool], list[Entry]] = {}
    for entry in view.entries:
        if entry.record is not None and entry.failure is None:
            key = (entry.label, entry.horizon, entry.contrast_of is not None)
            entries.setdefault(key, []).append(entry)
    return [
        Group(row, entries[row.label, row.horizon, row.is_contrast])
        for row in view.rows
        if row.records
    ]


def _told_apart(groups: Sequence[Group]) -> dict[str, Group]:
    """Return groups by what tells them apart: all horizons of one arm, or one horizon of several.

    Of several arms, that is the longest horizon that all of them have.
    """
    if len({group.row.label for group in groups if not group.row.is_contrast}) > 1:
        common = set.intersection(
            *(
                {g.row.horizon for g in groups if g.name == name}
                for name in {group.name for group in groups}
            )
        )
        if common:
            return {g.name: g for g in groups if g.row.horizon == max(common)}
        return {group.title: group for group in groups}
    return {
        f"T = {group.row.horizon}"
        + (f", {group.row.label}" if group.row.is_contrast else ""): group
        for group in groups
    }


def _longest(groups: Sequence[Group]) -> list[Group]:
    """Return each arm at the longest horizon it was run at."""
    by_name = {}
    for group in sorted(groups, key=lambda group: group.row.horizon):
        by_name[group.name] = group
    return list(by_name.values())


def _parts(stem: str, items: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Cut what is too much for one figure; return names of figures and their share of it."""
    pairs = list(items.items())
    size = math.ceil(len(pairs) / max(1, math.ceil(len(pairs) / LINES)))
    parts = [dict(pairs[start : start + size]) for start in range(0, len(pairs), max(1, size))]
    if len(parts) == 1:
        return [(stem, parts[0])]
    return [(f"{stem}_{index + 1}", part) for index, part in enumerate(parts)]


def _canvas() -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE, layout="constrained")
    return figure, figure.subplots()


def _draw_profiles(shown: Mapping[str, Group], axes: Any, title: str | None = None) -> None:
    trained = {name: group.row.profiles("trained") for name, group in shown.items()}
    plots.adjoint_profile(
        {name: _numbers(group.row.profiles("initial")) for name, group in shown.items()},
        {name: _numbers(values) for name, values in trained.items() if values} or None,
        title=title,
        ax=axes,
    )


def _through_training(group: Group, probe: str) -> tuple[list[int], list[list[dict[str, Any]]]]:
    """Return training steps, and what a probe measured at them, for each seed that has all."""
    by_seed = []
    for entry in group.entries:
        # By step: a run that stopped early is measured twice at its last.
        with suppress(ViewError):
            by_seed.append({row["step"]: row for row in measurements(entry, probe)})
    steps = max(by_seed, key=len, default={})
    return list(steps), [list(rows.values()) for rows in by_seed if list(rows) == list(steps)]


def _logged(entry: Entry, name: str) -> list[float]:
    """Return what a run logged; nothing where its log cannot be read."""
    with suppress(ViewError):
        return curve(entry, name)[1]
    return []


def _spectral_radius(row: Mapping[str, Any]) -> float | None:
    known = [value for value in row["matrices"]["l0"]["spectral_radius"] if value is not None]
    return max(known) if known else None


def _histograms(
    measured: Mapping[str, Any],
) -> tuple[dict[str, Saturation], dict[str, Saturation]]:
    """Return histograms of states, and of gates, by name and stage."""
    states, gates = {}, {}
    for stage in STAGES:
        found = measured.get(stage) or {}
        for name in ("hidden", "activation"):
            if name in found:
                states[f"{'h' if name == 'hidden' else 'f(z)'}, {stage}"] = _saturation(found[name])
        for name, values in (found.get("gates") or {}).items():
            to = states if name in ("cell", "new") else gates
            to[f"{name}, {stage}"] = _saturation(values)
    return states, gates


def _saturation(values: Mapping[str, Any]) -> Saturation:
    counts = np.asarray(values["counts"], dtype=float)
    edges = np.linspace(values["low"], values["high"], len(counts) + 1)
    share, derivative = values.get("share"), values.get("mean_derivative")
    return Saturation(counts, edges, _number(share), _number(derivative))  # type: ignore[arg-type]


def _numbers(values: Any, none: float = math.nan) -> Any:
    """Return nested lists as an array; ``None``, which a record has for what is not finite."""
    array = np.asarray(values, dtype=float)
    return np.where(np.isnan(array), none, array)


def _number(value: float | None, none: float = math.nan) -> float:
    return none if value is None else value


def _short(title: str, longest: int = 60) -> str:
    return title if len(title) <= longest else f"{title[: longest - 1]}…"


def _runs(groups: Any) -> str:
    """Say which runs a figure is of."""
    groups = list(groups)
    horizons = ", ".join(str(h) for h in sorted({group.row.horizon for group in groups}))
    seeds = sorted({record.config["seed"] for group in groups for record in group.row.records})
    count = sum(len(group.row.records) for group in groups)
    words = ", ".join(map(str, seeds)) if len(seeds) <= 10 else f"{len(seeds)} of them"
    return f"Runs: {count}; T = {horizons}; seeds {words}."


def _smoothed(losses: Sequence[float], block: int) -> list[float]:
    blocks = [losses[start : start + block] for start in range(0, len(losses), block)]
    return [sum(each) / len(each) for each in blocks]
