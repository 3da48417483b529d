"""The table of gradients at initialisation: what is measured, what is said, and the page."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

from experiments import initialisation
from experiments.initialisation import (
    INPUT_SIZE,
    LAGS,
    ROWS,
    SPREAD,
    Row,
    Settings,
    additive_path,
    conclusion,
    distance,
    measure_row,
    path_table,
    table,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "vanishing-gradients.md"
COMMITTED = json.loads((DOCS / "figures" / "initialisation" / "results.json").read_text())
SMALL = Settings(hidden_size=12, steps=15, batch_size=3, seeds=2)


def drawn(row: Row, seed: int, settings: Settings):
    """Return what ``measure_row`` draws: core, input and direction."""
    torch.manual_seed(seed)
    core = row.build(settings).double()
    x = torch.rand(settings.steps, settings.batch_size, INPUT_SIZE, dtype=torch.float64)
    direction = torch.randn(settings.hidden_size, dtype=torch.float64)
    return core, x, direction / direction.norm()


def unrolled(core, x, direction, *, additive_only: bool = False):
    """Norms of dL/dh_t and of the derivative by what is carried on beside h, (T, B) each.

    Written out gate by gate. Every state is passed to the next step as a node of its own, so its
    derivative has the other state held fixed. With ``additive_only``, gates and candidates are
    constants.
    """
    W, U, b_ih, b_hh = core.weight_ih_l0, core.weight_hh_l0, core.bias_ih_l0, core.bias_hh_l0
    constant = (lambda value: value.detach()) if additive_only else (lambda value: value)
    h = c = torch.zeros(x.shape[1], core.hidden_size, dtype=x.dtype, requires_grad=True)
    hidden, cells = [], []
    for x_t in x:
        z_in, z_h = x_t @ W.T + b_ih, h @ U.T + b_hh
        if core.mode == "LSTM":
            i, f, g, o = (z_in + z_h).chunk(4, dim=1)
            c = constant(f.sigmoid()) * c + constant(i.sigmoid() * g.tanh())
            h = constant(o.sigmoid()) * c.tanh()
            c = c.clone()
            cells.append(c)
        elif core.mode == "GRU":
            (r, z, n), (r_h, z_h, n_h) = z_in.chunk(3, dim=1), z_h.chunk(3, dim=1)
            z = constant((z + z_h).sigmoid())
            h = constant((1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh()) + z * h
        else:
            h = {"tanh": torch.tanh, "relu": torch.relu}[core.nonlinearity](z_in + z_h)
        hidden.append(h)
    by_all = torch.autograd.grad(
        (h @ direction).sum(), hidden + cells, allow_unused=True, materialize_grads=True
    )
    norms = torch.stack(by_all).norm(dim=-1)
    return norms[: len(x)], norms[len(x) :]


# What is measured


@pytest.mark.parametrize("label", ROWS)
def test_the_profiles_are_those_of_a_cell_written_out(label):
    found = measure_row(ROWS[label], 3, SMALL)
    core, x, direction = drawn(ROWS[label], 3, SMALL)
    h_TB, c_TB = unrolled(core, x, direction)
    state_TB = (h_TB**2 + c_TB**2).sqrt() if len(c_TB) else h_TB
    expected = {"state": state_TB}
    if len(c_TB):
        expected["hidden"] = h_TB
        # h without c would be seen.
        assert not torch.allclose(h_TB[:-1], state_TB[:-1], rtol=0.01)
    for name, norms_TB in expected.items():
        profile = torch.tensor(found[name], dtype=torch.float64)
        torch.testing.assert_close(profile, norms_TB.mean(1), rtol=1e-9, atol=0)
    assert set(found) == set(expected) | ({"additive"} if label[:4] in ("LSTM", "GRU ") else set())
    # The direct part alone is zero before the last step.
    assert all(norm > 0 for norm in found["state"])
    assert found["state"][-1] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("label", ["LSTM default", "LSTM chrono", "GRU default", "GRU chrono"])
def test_the_additive_path_is_what_is_left_when_gates_are_constants(label):
    core, x, direction = drawn(ROWS[label], 0, SMALL)
    h_TB, c_TB = unrolled(core, x, direction, additive_only=True)
    alone = additive_path(core, x, direction)
    if core.mode == "LSTM":
        # Before the last step h feeds nothing but gates, and c_T itself feeds only h_T.
        assert not h_TB[:-1].any()
        torch.testing.assert_close(alone[:-1], c_TB[:-1], rtol=1e-9, atol=0)
    else:
        torch.testing.assert_close(alone, h_TB, rtol=1e-9, atol=0)
    assert not torch.allclose(alone[0], unrolled(core, x, direction)[0][0], rtol=0.01)


def test_measuring_leaves_the_global_generator_alone_and_repeats():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = measure_row(ROWS["GRU chrono"], 1, SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    assert measure_row(ROWS["GRU chrono"], 1, SMALL) == one
    assert measure_row(ROWS["GRU chrono"], 2, SMALL) != one


@pytest.mark.parametrize("label", ROWS)
def test_the_committed_results_are_what_is_measured_and_reproduce_the_reference(label):
    """The last seed once more; results are rounded to four decimals."""
    seed = Settings().seeds - 1
    found = measure_row(ROWS[label], seed, Settings())
    row = COMMITTED["rows"][label]
    for name, of_seeds in row["log10_norm"].items():
        again = [math.log10(found[name][-1 - lag]) for lag in LAGS]
        assert again == pytest.approx(of_seeds[seed], abs=2e-4)
    ratios = [math.log10(found["state"][-1 - lag] / found["state"][-1]) for lag in LAGS]
    assert ratios == pytest.approx(row["log10_ratio"][seed], abs=2e-4)
    assert tuple(row["reference"]) == ROWS[label].reference
    for reference, values in zip(
        row["reference"], zip(*row["log10_ratio"], strict=True), strict=True
    ):
        assert abs(reference - mean(values)) < 2 * stdev(values) + 0.05


# What is said


def test_a_distance_is_in_standard_deviations_beyond_rounding():
    values = [-1.0, -2.0, -3.0]
    for reference, of, expected in (
        (-2.04, values, 0),
        (-3.05, values, 1),
        (0.05, values, 2),
        (-2.2, [-2.0, -2.0], math.inf),
        (-2.0, [-2.0], 0),
    ):
        assert distance(reference, of) == pytest.approx(expected)


def made_up(ratios, reference):
    row = {"reference": reference, "log10_ratio": ratios, "log10_norm": {"state": ratios}}
    return {"settings": {"lags": [10, 25]}, "rows": {"A": row}}


def test_a_reference_outside_the_spread_is_bold_and_named():
    ratios = [[-1.0, -10.0], [-1.2, -11.0], [-1.4, -12.0]]
    found = made_up(ratios, [-1.3, -20.0])
    assert table(found).splitlines()[-1] == (
        "| A | -1.20 ± 0.20 (-1.3) | -11.00 ± 1.00 (**-20.0**) |"
    )
    said = conclusion(found)
    assert "1 of 2 references" in said
    assert "not A at k = 25" in said
    assert "the farthest is 8.9 away" in said
    assert "not" not in conclusion(made_up(ratios, [-1.3, -11.0]))
    assert conclusion(made_up(ratios, None)) == "No reference holds for these settings."


# The command and the page


def test_the_command_leaves_table_results_profiles_and_figures(tmp_path, capsys):
    out = tmp_path / "out"
    sizes = ["--hidden-size=8", "--steps=27", "--batch-size=2", "--seeds=2"]
    initialisation.main(["--folder", str(out), *sizes])
    figures = ("initialisation", "additive_path", "lstm_state")
    assert {path.name for path in out.iterdir()} == {"table.md", "results.json", "profiles.csv"} | {
        f"{stem}.{suffix}" for stem in figures for suffix in ("png", "svg")
    }
    found = json.loads((out / "results.json").read_text())
    assert found["settings"]["lags"] == [10, 25]
    assert {row["reference"] for row in found["rows"].values()} == {None}
    assert (out / "table.md").read_text().startswith(table(found))
    by_hand = measure_row(ROWS["LSTM chrono"], 1, Settings(8, 27, 2, 2))["hidden"]
    place = {"row": "LSTM chrono", "quantity": "hidden", "seed": "1", "lag": "26"}
    with (out / "profiles.csv").open() as file:
        (line,) = (line for line in csv.DictReader(file) if line.items() >= place.items())
    assert float(line["norm"]) == by_hand[0]
    printed = capsys.readouterr().out
    assert all(label in printed for label in ROWS)
    assert "No reference holds" in printed


@pytest.mark.parametrize("wrong", ["--seeds=0", "--steps=1", "--hidden-size=x"])
def test_sizes_that_make_no_sense_are_refused(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        initialisation.main([wrong])
    assert "--" in capsys.readouterr().err


def test_the_page_shows_the_committed_results_which_are_those_of_the_default_command():
    settings = dict(COMMITTED["settings"])
    assert settings.pop("lags") == list(LAGS)
    assert settings.pop("input_size") == INPUT_SIZE
    assert Settings(**settings) == Settings()
    assert list(COMMITTED["rows"]) == list(ROWS)
    assert all(len(row["log10_ratio"]) == Settings().seeds for row in COMMITTED["rows"].values())
    assert SPREAD == 2
    page = PAGE.read_text()
    assert table(COMMITTED) in page
    assert path_table(COMMITTED) in page
    assert conclusion(COMMITTED) in page.replace("\n", " ")


def test_the_example_of_the_page_runs_and_shows_what_it_says(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(example, PAGE.name, "exec"), {})
    default, forget, chrono = (
        float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()
    )
    assert default < 1e-15 < 1e-9 < forget < 1e-4 < 0.05 < chrono < 1


def test_every_figure_and_link_of_the_page_exists():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE.read_text())
    assert len(targets) >= 4
    assert [target for target in targets if not (DOCS / target).exists()] == []
