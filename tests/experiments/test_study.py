"""Studies: arms, contrasts, runs in common, and what is refused."""

from __future__ import annotations

import os
import re

import pytest

from experiments.execution import worker_count
from experiments.fields import ConfigError
from tests.experiments.small_studies import ROOT, study_of, tiny


def test_arms_by_horizons_by_seeds_and_the_overrides_reach_every_arm():
    study = study_of(
        "experiment=four_models", "horizons=[20,10]", "seeds=[5,3]", "model.hidden_size=8"
    )
    first = [(m.label, m.run.horizon, m.run.seed) for m in study.members[:4]]
    assert first == [("fused_rnn", T, seed) for T in (10, 20) for seed in (5, 3)]
    assert len(study.members) == 7 * 4
    assert {m.run.core.config.hidden_size for m in study.members} == {8}
    assert {m.run.core.name for m in study.members} == {"fused_rnn", "rnn", "lstm", "gru"}


def test_contrasts_stand_beside_the_model_at_their_horizons(tmp_path):
    study = tiny(tmp_path, "horizons=[10,12]", "contrast_horizons=[12]")
    found = [(m.label, m.run.horizon, m.contrast_of) for m in study.members]
    assert found == [
        ("fused_rnn", 10, None),
        ("fused_rnn", 12, None),
        ("ReLU + identity", 12, "fused_rnn"),
        ("orthogonal", 12, "fused_rnn"),
    ]
    assert all(m.folder.parent == tmp_path / "runs" / "records" for m in study.members)


def test_arms_on_the_command_line_add_to_those_of_the_study():
    words = ("experiment=pascanu", "budget=smoke", "+arms.Adam=['optimizer=adam']")
    study = study_of(*words)
    assert [m.label for m in study.members][-1] == "Adam"
    assert study.members[-1].run.optimizer == "adam"
    alone = study_of("+arms={a b: ['model=lstm'], c: ['model=gru']}", "seeds=[0]")
    assert {m.label for m in alone.members if not m.contrast_of} == {"a b", "c"}


def test_arms_that_are_the_same_run_share_it():
    study = study_of("+arms={a: ['model=rnn'], b: ['model.core=rnn']}", "horizons=[10]",
                     "seeds=[0]", "contrast_horizons=[]")  # fmt: skip
    assert [m.label for m in study.members] == ["a", "b"]
    assert [m.label for m in study.runs] == ["a"]


def test_more_seeds_and_another_name_keep_the_runs_that_there_are(tmp_path):
    one = {m.folder for m in tiny(tmp_path, "seeds=[0]").members}
    more = {m.folder for m in tiny(tmp_path, "seeds=[1,0]", "name=x", "model.name=y").members}
    assert one < more


def test_a_study_without_budgets_is_told_of_a_budget_that_none_has():
    assert study_of("experiment=single", "budget=fast").config.budget == "fast"
    with pytest.raises(ConfigError, match="budget must be one of full, fast, smoke; got 'fats'"):
        study_of("experiment=single", "budget=fats")


@pytest.mark.parametrize("none", ["probe=[]", "remedy=[]"])
def test_a_study_can_be_without_probes_or_remedies(none):
    run = study_of(none, "horizons=[10]", "seeds=[0]").members[0].run
    assert run.plain()[none.split("=")[0]] == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model=lstm", "+arms.x=['model=gru']"],
            "model is what the arms of this study differ in; got model=lstm",
        ),
        (["+arms.x=['model=ls']"], r"arms\['x'\]: model must be one of .*; got ls; did you mean"),
        (["+arms.x=['model.hidden_siz=3']"], r"arms\['x'\]: unknown key .* model.hidden_size\?"),
        (["+arms.x=['horizons=[3]']"], r"arms\['x'\]: what an override changes must be one of "),
        (["+arms.x=model"], r"arms\['x'\] must be a list of overrides, such as model=lstm; got"),
        (["+arms.x=['model=null']"], r"arms\['x'\]: each of experiment, model, .* must be"),
    ],
)
def test_arms_that_cannot_be_made_are_refused_by_their_label(overrides, message):
    with pytest.raises(ConfigError, match=message):
        study_of(*overrides)


def test_worker_count_is_one_per_core_at_most_one_per_run(tmp_path):
    study = tiny(tmp_path, "workers=null")
    assert 1 <= worker_count(study, 1000) <= (os.cpu_count() or 1)
    assert worker_count(study, 1) == 1
    assert worker_count(tiny(tmp_path, "workers=5"), 3) == 3


def test_every_study_stands_in_the_docs():
    page = (ROOT / "docs" / "studies.md").read_text()
    names = {path.stem for path in (ROOT / "hydra_conf" / "experiment").glob("*.yaml")}
    for name in names - {"single", "smoke"}:
        assert f"[{name}](studies/{name}.md)" in page or f"`{name}`" in page
    for name in re.findall(r"\(studies/(\w+)\.md\)", page):
        written = (ROOT / "docs" / "studies" / f"{name}.md").read_text()
        assert re.search(r"    python -m experiments\.run .*\bexperiment=\w+", written)
        assert re.search(r"    python -m experiments\.run .*\bbudget=\w+", written)
        for figure in re.findall(r"\(<(.*)>\)", written):
            assert (ROOT / "docs" / "studies" / figure).exists()
