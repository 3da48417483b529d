"""Figures: what is drawn is what came in, zeros are shown, and what does not fit is refused."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings
from functools import partial
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image

from rnn_cuda import instruments
from rnn_cuda.instruments import plots
from rnn_cuda.instruments.plots._series import median, quantile

T = 12
FALLING = 10.0 ** -np.arange(T)[::-1]  # in the order of time: the last step's norm is 1


def axes_of(figure: Figure):
    (axes,) = (axes for axes in figure.axes if axes.get_label() != "<colorbar>")
    return axes


def line(axes, label: str):
    (found,) = (line for line in axes.lines if line.get_label() == label)
    return found


def zeros(axes) -> list[list[float]]:
    """Return where each line of crosses stands."""
    return [list(l.get_xdata()) for l in axes.lines if l.get_gid() == "exact zeros"]


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def bands(axes) -> list[np.ndarray]:
    """Return the corners of each band."""
    kind = mpl.collections.PolyCollection
    return [c.get_paths()[0].vertices for c in axes.collections if isinstance(c, kind)]


# Statistics over seeds


def test_the_median_is_the_geometric_mean_of_two_on_a_log_axis_and_knows_zero_and_nan():
    values = np.array([[1.0, 1.0, 0.0, np.nan], [100.0, np.nan, 5.0, np.nan], [9.0, 4.0, 7.0, 2.0]])
    assert median(values[:2], log=True)[0] == 10
    assert median(values[:2], log=False)[0] == 50.5
    assert median(values, log=True).tolist() == [9, 2, 5, 2]
    assert median(np.array([[0.0], [5.0]]), log=True)[0] == 0
    assert median(np.array([[-np.inf], [5.0]]), log=False)[0] == -np.inf
    tiny = np.array([[1e-300], [1e-200]])
    assert median(tiny, log=True)[0] == pytest.approx(1e-250, rel=1e-12)
    assert np.isnan(median(np.full((3, 1), np.nan), log=True)[0])


def test_a_quantile_is_one_of_the_values():
    values = np.array([[3.0], [0.0], [np.nan], [1.0], [2.0], [10.0]])
    assert [quantile(values, q)[0] for q in (0, 0.25, 0.5, 0.75, 1)] == [0, 1, 2, 3, 10]
    assert np.isnan(quantile(np.full((2, 1), np.nan), 0.5)[0])


# 1. adjoint profile


def test_a_profile_is_drawn_against_the_lag_on_a_log_axis():
    axes = axes_of(plots.adjoint_profile({"rnn": torch.from_numpy(FALLING), "short": FALLING[-3:]}))
    assert axes.get_yscale() == "log"
    assert line(axes, "rnn").get_xdata().tolist() == list(range(T))
    np.testing.assert_allclose(line(axes, "rnn").get_ydata(), 10.0 ** -np.arange(T))
    assert line(axes, "short").get_xdata().tolist() == [0, 1, 2]
    assert "lag" in axes.get_xlabel()
    assert "h_t" in axes.get_ylabel()
    assert legend(axes) == ["rnn", "short"]


def test_seeds_become_a_median_and_a_band():
    seeds = torch.tensor([[1.0], [2.0], [4.0], [8.0], [100.0]]) * torch.from_numpy(FALLING)
    axes = axes_of(plots.adjoint_profile({"rnn": seeds}))
    np.testing.assert_allclose(line(axes, "rnn").get_ydata(), 4 * 10.0 ** -np.arange(T))
    (band,) = bands(axes)
    at_last = band[band[:, 0] == 0][:, 1]
    assert {1, 100} == set(at_last)
    axes = axes_of(plots.adjoint_profile({"rnn": seeds}, band=(0.25, 0.75)))
    (band,) = bands(axes)
    assert set(band[band[:, 0] == 0][:, 1]) == {2, 8}
    assert bands(axes_of(plots.adjoint_profile({"rnn": seeds}, band=None))) == []


def test_exact_zeros_are_crosses_at_the_foot_and_not_in_the_line():
    seeds = np.stack([FALLING, FALLING, FALLING])
    seeds[:, 0] = 0  # lag 11: every seed
    seeds[0, 1] = 0  # lag 10: one of three
    other = FALLING.copy()
    other[0] = 0
    axes = axes_of(plots.adjoint_profile({"rnn": seeds, "gru": other}))
    assert zeros(axes) == [[10, 11], [11]]
    crosses = [l for l in axes.lines if l.get_gid() == "exact zeros"]
    heights = [set(l.get_ydata()) for l in crosses]
    assert heights[0] != heights[1]  # both can be seen
    assert all(0 < y < 0.1 for y in set.union(*heights))
    assert crosses[0].get_transform() == axes.get_xaxis_transform()  # of the axes, not of the data
    y = line(axes, "rnn").get_ydata()
    assert np.isnan(y[11])
    assert y[10] == pytest.approx(1e-10)
    assert "exactly 0" in legend(axes)
    assert axes.get_ylim()[0] > 1e-14  # a zero does not stretch the axis


def test_the_smallest_double_is_no_zero():
    axes = axes_of(plots.adjoint_profile({"rnn": [5e-324, 1.0]}))
    assert zeros(axes) == []
    assert line(axes, "rnn").get_ydata().tolist() == [1.0, 5e-324]


def test_a_relative_profile_is_divided_seed_by_seed():
    seeds = np.stack([3 * FALLING, 5 * FALLING, 0 * FALLING])
    axes = axes_of(plots.adjoint_profile({"rnn": seeds}, relative=True))
    np.testing.assert_allclose(line(axes, "rnn").get_ydata(), 10.0 ** -np.arange(T))
    assert zeros(axes) == []  # 0 / 0 says nothing


def test_trained_profiles_are_dashed_in_the_colour_of_their_label():
    axes = axes_of(
        plots.adjoint_profile({"a": FALLING, "b": FALLING}, {"b": FALLING**0.5, "c": FALLING})
    )
    drawn = [l for l in axes.lines if len(l.get_xdata()) == T]
    looks = [(l.get_color(), l.get_linestyle()) for l in drawn]
    assert looks[2] == (looks[1][0], "--")
    assert looks[3][0] not in {colour for colour, _ in looks[:3]}
    assert legend(axes) == ["a", "b", "c", "at initialisation", "trained"]
    axes = axes_of(plots.adjoint_profile({"a": FALLING}, {"a": FALLING}, stages=("(h, c)", "h")))
    assert legend(axes) == ["a", "(h, c)", "h"]


# 2. heatmap


def test_a_heatmap_has_training_across_time_up_and_zeros_apart():
    norms = np.stack([FALLING, FALLING * 10, FALLING * 100])
    norms[0, :4] = 0
    norms[2, 5] = np.nan
    axes = axes_of(plots.adjoint_heatmap(norms, steps=[0, 10, 40]))
    image, grey = axes.collections
    assert isinstance(image.norm, LogNorm)
    assert image.norm.vmin == pytest.approx(1e-10)
    assert image.norm.vmax == pytest.approx(100)
    shown = image.get_array()
    assert shown.shape == (T, 3)
    assert shown.mask.sum() == 5
    assert shown[5, 1] == pytest.approx(10 * FALLING[5])
    assert (~grey.get_array().mask).nonzero()[0].tolist() == [0, 1, 2, 3]
    corners = image.get_coordinates()[0]
    assert corners[:, 0].tolist() == [-5, 5, 25, 55]
    assert image.get_coordinates()[:, 0, 1].tolist() == [0.5 + t for t in range(T + 1)]
    assert legend(axes) == ["exactly 0"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "time step $t$")


def test_a_heatmap_of_seeds_shows_the_median_and_one_of_zeros_alone_is_grey():
    seeds = np.stack([np.stack([FALLING] * 2) * factor for factor in (1, 10, 1000)])
    image = axes_of(plots.adjoint_heatmap(seeds)).collections[0]
    np.testing.assert_allclose(image.get_array()[:, 0], 10 * FALLING)
    figure = plots.adjoint_heatmap(np.zeros((1, 3)))
    assert (~figure.axes[0].collections[1].get_array().mask).all()
    assert len(figure.axes) == 1  # no colour bar without a colour


# 3, 5 and 9: over training


def test_losses_are_drawn_with_the_line_of_knowing_nothing():
    losses = {"rnn": torch.full((3, 5), 0.2), "gru": np.array([0.1, 0.01, np.nan, np.inf, 0.0])}
    axes = axes_of(plots.loss_curves(losses, [0, 5, 10, 15, 20], know_nothing=1 / 6))
    assert axes.get_yscale() == "log"
    assert set(line(axes, "knowing nothing").get_ydata()) == {1 / 6}
    assert line(axes, "knowing nothing").get_linestyle() == "--"
    assert line(axes, "gru").get_xdata().tolist() == [0, 5, 10, 15, 20]
    np.testing.assert_array_equal(line(axes, "gru").get_ydata(), [0.1, 0.01] + 3 * [np.nan])
    assert zeros(axes) == [[20]]
    assert len(bands(axes)) == 1


def test_clipped_shares_count_every_seed_and_what_overflowed():
    norms = {"rnn": np.array([[0.5, 1.0, 2.0], [np.inf, np.nan, 0.1]]), "gru": [0.1, 0.2]}
    axes = axes_of(plots.gradient_norms(norms, 1.0))
    assert legend(axes) == ["rnn (50% clipped)", "gru (0% clipped)", "threshold"]
    assert set(line(axes, "threshold").get_ydata()) == {1.0}
    assert line(axes, "gru (0% clipped)").get_xdata().tolist() == [1, 2]
    assert axes.get_yscale() == "log"


def test_the_recurrent_matrix_over_training_has_three_panels():
    adjoint, radius, margin = [0.0, 1e-9, 1e-3], [0.6, 0.9, 1.1], [0.4, 0.1, -0.2]
    figure = plots.recurrent_weights({"a": adjoint}, {"a": radius}, {"a": margin}, [0, 10, 20])
    first, second, third = figure.axes
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "linear"]
    assert zeros(first) == [[0]]
    assert line(second, "a").get_ydata().tolist() == radius
    assert line(third, "a").get_ydata().tolist() == margin
    assert 1.0 in {l.get_ydata()[0] for l in second.lines if l.get_label() != "a"}
    assert 0 in {l.get_ydata()[0] for l in third.lines if l.get_label() != "a"}
    assert "sigma" in third.get_ylabel()


# 4. the cliff


def test_the_cliff_shows_every_seed_the_median_and_the_bounds():
    errors = {"rnn": np.array([[0.01, 0.3, 1.0], [0.02, 0.5, 1.1], [0.0, 0.9, np.inf]])}
    axes = axes_of(plots.horizon_cliff(errors, [10, 20, 50]))
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert line(axes, "rnn").get_ydata() == pytest.approx([0.01, 0.5, (1.0 * 1.1) ** 0.5])
    (dots,) = (l for l in axes.lines if l.get_linestyle() == "None" and len(l.get_xdata()) == 9)
    shown = dots.get_ydata()[np.isfinite(dots.get_ydata())]
    assert sorted(shown) == [0.01, 0.02, 0.3, 0.5, 0.9, 1.0, 1.1]
    assert zeros(axes) == [[10]]
    assert {1, 0.25, 0.1} <= {l.get_ydata()[0] for l in axes.lines}
    assert axes.get_xticks().tolist() == [10, 20, 50]


def test_the_share_solved_counts_diverged_seeds_as_failed_and_missing_ones_not_at_all():
    errors = {"rnn": np.array([[0.01, 0.3, np.nan], [0.02, 0.05, np.nan], [np.inf, np.nan, 1.0]])}
    axes = axes_of(plots.horizon_cliff(errors, [10, 20, 50], share_solved=True))
    assert axes.get_yscale() == "linear"
    assert line(axes, "rnn").get_ydata() == pytest.approx([2 / 3, 1 / 2, 0])
    assert "below 0.1" in axes.get_ylabel()


# 6 and 7: spectra


def test_a_lyapunov_spectrum_has_a_zero_line_and_shows_minus_infinity():
    exponents = {"before": torch.tensor([[0.1, -0.5, -torch.inf], [0.3, -0.7, -torch.inf]])}
    axes = axes_of(plots.lyapunov_spectrum(exponents))
    spectrum = line(axes, "before")
    assert spectrum.get_xdata().tolist() == [1, 2, 3]
    np.testing.assert_allclose(spectrum.get_ydata(), [0.2, -0.6, np.nan], rtol=1e-6)
    assert zeros(axes) == [[3]]
    assert axes.get_yscale() == "linear"
    assert 0 in {l.get_ydata()[0] for l in axes.lines}
    assert legend(axes) == ["before", r"$-\infty$"]


def test_singular_values_are_a_line_per_lag_darker_with_length():
    values = torch.tensor([[-0.1, -0.2], [-1.0, -torch.inf]]).double()
    seeds = torch.stack([values, values - 2, values - 1], dim=1)
    axes = axes_of(plots.jacobian_singular_values(seeds, [1, 10]))
    np.testing.assert_allclose(line(axes, "lag 1").get_ydata(), [-1.1, -1.2])
    np.testing.assert_allclose(line(axes, "lag 10").get_ydata(), [-2.0, np.nan])
    assert zeros(axes) == [[2]]
    assert len(bands(axes)) == 2
    light, dark = (sum(line(axes, f"lag {k}").get_color()[:3]) for k in (1, 10))
    assert light > dark
    axes = axes_of(plots.jacobian_singular_values([[0.0, -1.0]], [3], indices=[1, 64]))
    assert line(axes, "lag 3").get_xdata().tolist() == [1, 64]


# 8. histograms


def test_histograms_are_densities_with_the_saturated_share():
    states = {"h": torch.tensor([[-0.99, -0.1], [0.2, 0.97]]), "relu": [0.0, 3.0]}
    figure = plots.saturation_histograms(states, {"forget": [0.01, 0.5, 0.6, 0.99]}, bins=4)
    left, right = figure.axes
    assert legend(left) == ["h: 50%", "relu: 50%"]
    assert legend(right) == ["forget: 25%, 25%"]
    assert "0.95" in left.get_legend().get_title().get_text()
    outline = left.patches[0].get_data()
    assert outline.edges.tolist() == [-3, -1.5, 0, 1.5, 3]
    assert (outline.values * np.diff(outline.edges)).tolist() == [0, 0.5, 0.5, 0]
    assert right.patches[0].get_data().edges[[0, -1]].tolist() == [0, 1]


# 10. outcomes


def test_remedy_bars_are_medians_with_every_seed():
    scores = {"default": [0.1, 0.2, 0.6], "chrono": 0.9}
    axes = axes_of(plots.remedy_bars(scores, know_nothing=0.1, score_label="accuracy"))
    assert [bar.get_width() for bar in axes.patches] == [0.2, 0.9]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["default", "chrono"]
    assert axes.yaxis_inverted()
    assert axes.lines[0].get_xdata().tolist() == [0.1, 0.2, 0.6]
    assert set(line(axes, "knowing nothing").get_xdata()) == {0.1}


def test_remedy_bars_on_a_log_axis_show_zeros_at_its_foot():
    axes = axes_of(plots.remedy_bars({"a": [0.0, 1e-3, 1e-1], "b": [0.2]}, log=True))
    assert axes.get_xscale() == "log"
    assert axes.lines[0].get_xdata().tolist() == [1e-3, 1e-1]
    (cross,) = (l for l in axes.lines if l.get_gid() == "exact zeros")
    assert list(cross.get_ydata()) == [0]
    assert cross.get_transform() == axes.get_yaxis_transform()
    assert "exactly 0" in legend(axes)


def test_speed_against_accuracy_pairs_labels():
    seconds, scores = {"a": [1.0, 2.0, 4.0], "b": 8.0}, {"b": [0.9, 0.8], "a": [0.1, 0.2, 0.3]}
    axes = axes_of(plots.speed_against_accuracy(seconds, scores))
    assert axes.get_xscale() == "log"
    middles = {label: line(axes, label).get_xydata()[0].tolist() for label in "ab"}
    assert middles["a"] == [2.0, 0.2]
    assert middles["b"] == pytest.approx([8.0, 0.85])
    every = np.concatenate([l.get_xydata() for l in axes.lines if l.get_label() not in "ab"])
    assert {(1.0, 0.1), (2.0, 0.2), (4.0, 0.3), (8.0, 0.9), (8.0, 0.8)} <= set(map(tuple, every))


# Labels and titles are text

TEXTS = [
    "relu $x_$",
    "$",
    r"from \$5 to \$10, a $ more",
    "_hidden",
    "",
    "50% {0} [b] \\alpha",
    "漢字 😀 שלום",
    "two\nlines",
    "x" * 400,
]
TITLE = "_a $x_$ and $y_$ of 漢字"
ALL = {
    # By name: draws lines with the labels of ``s``, in given axes and with a title if it has one.
    "adjoint_profile": lambda s, **o: plots.adjoint_profile(
        s(FALLING), s(FALLING), stages=(TITLE, "b"), **o
    ),
    "adjoint_heatmap": lambda s, **o: plots.adjoint_heatmap(np.stack([FALLING] * 2), **o),
    "loss_curves": lambda s, **o: plots.loss_curves(s(FALLING), **o),
    "gradient_norms": lambda s, **o: plots.gradient_norms(s(FALLING), 1.0, **o),
    "horizon_cliff": lambda s, **o: plots.horizon_cliff(s([0.1, 1.0]), [1, 2], **o),
    "share_solved": lambda s, **o: plots.horizon_cliff(
        s([0.1, 1.0]), [1, 2], share_solved=True, **o
    ),
    "quality_by_horizon": lambda s, **o: plots.quality_by_horizon(
        s([0.1, 1.0]), [1, 2], score_label=TITLE, references=s([0.2, 0.3]), **o
    ),
    "solved_by_ratio": lambda s, **o: plots.solved_by_ratio(s([-2.5, -np.inf]), s([0.1, 1.0]), **o),
    "lyapunov_spectrum": lambda s, **o: plots.lyapunov_spectrum(s([-0.1, -np.inf]), **o),
    "jacobian_singular_values": lambda s, **o: plots.jacobian_singular_values([[-1.0]], [1], **o),
    "recurrent_weights": lambda s, title=None, **o: plots.recurrent_weights(
        *[s([1.0, 2.0])] * 3, margin_label=title, **o
    ),
    "saturation_histograms": lambda s, title=None, ax=None: plots.saturation_histograms(
        s([0.1]), s([0.2]) if ax is None else None, ax=ax
    ),
    "remedy_bars": lambda s, **o: plots.remedy_bars(s(0.5), score_label=TITLE, **o),
    "speed_against_accuracy": lambda s, **o: plots.speed_against_accuracy(
        s(1), s(1), score_label=TITLE, seconds_label=TITLE, **o
    ),
}
TITLES = {"adjoint_profile": 2, "quality_by_horizon": 2, "remedy_bars": 2}
TITLES |= {"speed_against_accuracy": 3, "saturation_histograms": 0}


def labelled(values) -> dict:
    return dict.fromkeys(TEXTS, values)


@pytest.mark.parametrize("name", ALL)
def test_every_text_can_be_drawn_in_every_place_of_a_figure(name, tmp_path):
    with warnings.catch_warnings(), mpl.rc_context({"svg.fonttype": "none"}):
        warnings.simplefilter("error")
        (path,) = plots.save(ALL[name](labelled, title=TITLE), tmp_path / "figure", ["svg"])
    drawn = [words.strip() for words in ElementTree.parse(path).getroot().itertext()]
    assert drawn.count(TITLE) == TITLES.get(name, 1)
    if name not in ("adjoint_heatmap", "jacobian_singular_values"):
        for row in (row for text in TEXTS for row in text.splitlines()):
            # What is longer than there is room for may be cut, and shares may follow a label.
            assert any(words.startswith(row[:30]) for words in drawn), row


def test_a_bitmap_of_every_text_can_be_drawn_too(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.save(plots.remedy_bars(labelled(0.5), title=TITLE), tmp_path / "figure", ["png"])


def test_a_legend_has_the_labels_that_were_given():
    assert legend(axes_of(plots.adjoint_profile(labelled(FALLING)))) == TEXTS
    shares = legend(plots.saturation_histograms(labelled([0.1])).axes[0])
    assert shares == [f"{text}: 0%" for text in TEXTS]


@pytest.mark.parametrize("name", [name for name in ALL if name != "recurrent_weights"])
def test_a_figure_can_be_drawn_into_given_axes_and_settings_stay_as_they_were(name):
    def draw(axes):
        return ALL[name](lambda values: {"a": values}, ax=axes)

    before, figure = dict(mpl.rcParams), Figure()
    axes = figure.subplots()
    assert draw(axes) is figure
    assert axes.has_data()
    assert draw(None) is not figure
    assert dict(mpl.rcParams) == before
    nested = Figure().subfigures(1, 1)
    assert draw(nested.subplots()) is nested.figure


def test_formulas_of_our_own_and_of_the_callers_axes_are_still_formulas(tmp_path):
    axes = Figure().subplots()
    axes.plot([1, 2], label=r"$\alpha$")
    figure = plots.lyapunov_spectrum({"$a$": [-0.1, -np.inf]}, ax=axes)
    texts = {text.get_text(): text.get_parse_math() for text in axes.get_legend().get_texts()}
    assert texts == {r"$\alpha$": True, "$a$": False, r"$-\infty$": True}
    with mpl.rc_context({"svg.fonttype": "none"}):
        (path,) = plots.save(figure, tmp_path / "figure", ["svg"])
    drawn = "".join(ElementTree.parse(path).getroot().itertext())
    assert "$a$" in drawn
    assert "∞" in drawn
    assert r"$\alpha$" not in drawn


def test_control_characters_are_drawn_as_escapes(tmp_path):
    figure = plots.loss_curves({"\x1b[31m \t \x00 \udc80 \uffff": FALLING})
    assert legend(axes_of(figure)) == [r"\x1b[31m \t \x00 \udc80 \uffff"]
    ElementTree.parse(plots.save(figure, tmp_path / "figure", ["svg"])[0])


def test_runs_are_taken_together_by_the_decade_of_their_initial_ratio():
    ratios = {"a": [-0.5, -0.9, -3.1, np.nan, -np.inf], "b": [-1.5]}
    errors = {"a": [0.01, 0.5, np.inf, 0.01, 1.0], "b": [np.nan]}
    axes = axes_of(plots.solved_by_ratio(ratios, errors))
    assert line(axes, "a").get_xydata().tolist() == [[-3.5, 0.0], [-0.5, 0.5]]
    assert line(axes, "b").get_xydata().tolist() == []
    assert zeros(axes) == [[-4.5]]
    assert legend(axes) == ["a", "b", "exactly 0"]


def test_histograms_that_were_counted_before_are_drawn_as_they_are():
    values = torch.linspace(-1, 1, 101, dtype=torch.float64)
    counted = instruments.saturation(values, "tanh", bins=8)
    axes = axes_of(plots.saturation_histograms({"a": counted}))
    stairs = [patch for patch in axes.patches if patch.get_label().startswith("a")]
    (drawn,) = stairs
    assert np.allclose(drawn.get_data().edges, np.linspace(-1, 1, 9))
    assert np.allclose(drawn.get_data().values * 101 * 0.25, counted.counts)
    assert drawn.get_label() == f"a: {counted.share:.0%}"
    gate = instruments.saturation(values.abs(), "sigmoid", bins=8)._replace(share=math.nan)
    _, right = plots.saturation_histograms({"a": counted}, {"gate": gate}).axes
    assert legend(right) == ["gate"]


# All of them


def test_panels_can_be_given_as_an_array_and_their_number_is_checked():
    series = {"a": [1.0, 2.0]}
    figure = Figure()
    grid = figure.subplots(1, 3)
    assert plots.recurrent_weights(series, series, series, ax=grid) is figure
    assert all(axes.has_data() for axes in grid)
    with pytest.raises(ValueError, match="ax: expected 3 axes, got 1"):
        plots.recurrent_weights(series, series, series, ax=grid[0])


def test_more_lines_than_colours_differ_in_marker():
    axes = axes_of(plots.adjoint_profile({str(index): FALLING for index in range(18)}))
    looks = {(l.get_color(), l.get_marker(), l.get_markerfacecolor()) for l in axes.lines}
    assert len(looks) == 18


def test_saving_writes_bitmap_and_vector_that_repeat_to_the_byte(tmp_path):
    figure = plots.adjoint_profile({"rnn": FALLING})
    paths = plots.save(figure, tmp_path / "deep" / "profile.v1", ("png", "svg", "pdf"))
    assert [path.name for path in paths] == [f"profile.v1.{s}" for s in ("png", "svg", "pdf")]
    with Image.open(paths[0]) as image:
        assert image.size == (round(6.4 * 160), round(4.2 * 160))
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    assert ElementTree.parse(paths[1]).getroot().tag.endswith("svg")
    first = [path.read_bytes() for path in paths]
    again = plots.save(plots.adjoint_profile({"rnn": FALLING}), tmp_path / "b", ("svg", "pdf"))
    assert [path.read_bytes() for path in again] == first[1:]
    with pytest.raises(ValueError, match=r"formats: expected some of .*got 'bmpp'"):
        plots.save(figure, tmp_path / "c", ["bmpp"])


A, B = {"a": [1.0]}, {"b": [1.0]}


@pytest.mark.parametrize(
    ("function", "arguments", "error"),
    [
        (plots.adjoint_profile, ([1.0],), "TypeError: norms: .*mapping.*got list"),
        (plots.adjoint_profile, ({},), "ValueError: norms: expected at least one label"),
        (plots.adjoint_profile, ({"a": -FALLING},), "ValueError: a: expected no negative"),
        (plots.adjoint_profile, ({"a": [[[1]]]},), r"ValueError: norms\['a'\]: .*\(1, 1, 1\)"),
        (partial(plots.adjoint_profile, band=(0.9, 0.1)), (A,), "ValueError: band: "),
        (plots.adjoint_profile, ({"a": ["x"]},), r"TypeError: norms\['a'\]: .*numbers"),
        (plots.adjoint_heatmap, (FALLING,), r"ValueError: norms: .*\(12,\)"),
        (plots.adjoint_heatmap, (-np.ones((2, 2)),), "ValueError: norms: .*negative"),
        (plots.adjoint_heatmap, (np.ones((2, 2)), [2, 1]), "ValueError: steps: .*increasing"),
        (plots.loss_curves, (A, [1, 2]), r"ValueError: steps: .*\(1,\), got \(2,\)"),
        (plots.gradient_norms, (A, 0), "ValueError: threshold: .*got 0"),
        (plots.solved_by_ratio, (A, B), r"ValueError: errors: .*\['a', 'b'\]"),
        (partial(plots.solved_by_ratio, decades=0), (A, A), "ValueError: decades: "),
        (plots.horizon_cliff, (A, [1, 2]), r"ValueError: errors\['a'\]: expected 2 .*got 1"),
        (plots.jacobian_singular_values, ([[0.0]], [1, 2]), "ValueError: lags: .*1 .*got 2"),
        (
            partial(plots.jacobian_singular_values, indices=[1]),
            ([[0.0, -1.0]], [3]),
            r"ValueError: indices: expected shape \(2,\)",
        ),
        (plots.saturation_histograms, (A, {"f": [1.5]}), r"ValueError: gates\['f'\]: .*\[0, 1\]"),
        (plots.saturation_histograms, ({"a": [np.nan]},), "ValueError: .*finite values"),
        (partial(plots.remedy_bars, log=True), ({"a": -1.0},), "ValueError: scores: .*negative"),
        (plots.speed_against_accuracy, (A, B), r"ValueError: scores: .*\['a', 'b'\]"),
        (plots.speed_against_accuracy, ({"a": 0}, A), r"ValueError: seconds\['a'\]: .*got 0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(function, arguments, error):
    with pytest.raises((TypeError, ValueError)) as raised:
        function(*arguments)
    assert re.match(error, f"{raised.typename}: {raised.value}")


def test_without_matplotlib_the_module_loads_and_says_what_is_missing():
    script = """
import sys
sys.modules["matplotlib"] = None  # as if it were not installed
import rnn_cuda
from rnn_cuda import instruments
from rnn_cuda.instruments import plots
try:
    plots.adjoint_profile({"a": [1.0]})
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "draws with matplotlib, which is not installed: pip install matplotlib" in done.stdout
