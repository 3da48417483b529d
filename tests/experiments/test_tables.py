"""What is said of runs is true to their numbers, whatever they are; names are text."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import view
from experiments.console import write_printed
from experiments.evaluation import verdict
from experiments.record import Record, Result
from experiments.run import compare, run_study
from experiments.run_folder import FAILURE
from experiments.tables import ROUNDING, conclusions, say_view, verdict_text
from experiments.view import Entry, View
from tests.experiments.small_studies import quiet, study_of, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


# Numbers made up to have each outcome


def arm(horizon, ratio, learned, label="rnn", contrast_of=None, steps=100) -> list[Entry]:
    """Entries of one arm at one horizon, a seed each; ``ratio`` "none": no adjoint probe."""
    entries = []
    for seed, share in enumerate(0.05 if good else 1.0 for good in learned):
        profile = {"log10_ratio": ratio, "state_norm": [1.0] * horizon}
        record = Record(
            "0" * 16,
            label,
            "finished",
            None,
            {"seed": seed, "training": {"steps": steps}},
            Result(
                task="adding", metric="MSE", hidden_size=4, parameters=9, steps=10, solved_at=None,
                know_nothing_loss=1 / 6, know_nothing_error=1 / 6, dependency=horizon - 1,
                verdict=verdict(share), error_over_know_nothing=share, test_metric=share / 6,
            ),
            {} if ratio == "none" else {"adjoint": {"initial": profile, "trained": profile}},
            {"seconds": 1.0, "processor_seconds": 1.0},
        )  # fmt: skip
        entries.append(Entry(label, horizon, seed, contrast_of, Path("x"), record))
    return entries


YES, NO = [True] * 3, [False] * 3
LADDER = [*arm(11, -2.0, YES), *arm(51, -10.0, NO)]


def said(entries, **others) -> str:
    return "\n".join(conclusions(View("x", "", "", entries, **others)))


def kernel(gradients=2e-7):
    differences = {"prediction": 1e-7, "gradients": gradients, "adjoint_profile": 3e-7}
    return {
        "torch": "LSTM",
        "horizon": 50,
        "relative_difference": differences,
        "fused_milliseconds": 1.0,
        "torch_milliseconds": 4.0,
    }


def test_the_expected_outcome_is_told_with_its_numbers():
    text = said([*LADDER, *arm(51, -0.1, YES, "ReLU + identity", "rnn")], kernel_checks=[kernel()])
    for words in (
        "falls by 0.20 decades per time step back (T = 11 to 51), to 1e-10.0 of its last value",
        "Seeds that learned: 3 of 3 at T = 11, 0 of 3 at T = 51; between T = 11 and 51 the initial "
        "ratio goes from 1e-2.0 to 1e-10.0",
        "from which a run learned is 1e-2.0 (T = 11). Of the others, 3 began below",
        "Contrast at T = 51, ReLU + identity: solved 3/3, MSE 0.0083, from an initial ratio of 1e-"
        "0.1; rnn: failed 3/3, MSE 0.17, from an initial ratio of 1e-10.0.",
        "Beside torch.nn.LSTM from the same seed (T = 50)",
        "parameter gradients by 2e-07",
        "(4.0x) on one thread",
    ):
        assert words in text
    assert "more than float32 rounding" not in text


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ([(11, -2.0, NO), (51, -10.0, NO)], "Seeds that learned: 0 of 3 at T = 11, 0 of 3 at T ="),
        ([(11, -2.0, NO), (51, -9.0, YES)], "learned: 0 of 3 at T = 11, 3 of 3 at T = 51."),
        ([(11, -2.0, YES), (51, -9.0, YES)], "learned: 3 of 3 at T = 11, 3 of 3 at T = 51."),
        (
            [(11, -2.0, YES), (51, -10.0, NO), (71, -14.0, YES)],
            "3 of 3 at T = 11, 0 of 3 at T = 51, 3 of 3 at T = 71; between T = 11 and 51",
        ),
        ([(11, 0.01, YES), (51, 0.1, YES)], "neither vanishes nor explodes"),
        ([(11, 2.0, YES), (51, 10.0, NO)], "explodes: at initialisation its norm grows by"),
        ([(11, -9.0, YES), (51, None, NO)], "from 1e-9.0 to 0 (underflow)"),
        ([(11, None, NO)], "the gradient at the first step is exactly zero (T = 11)."),
        ([(51, -0.1, YES, "x", "rnn")], "Contrast at T = 51, x: solved 3/3, MSE 0.0083, from an i"),
    ],
)
def test_an_unexpected_outcome_is_told_as_such(arms, words):
    assert words in said([entry for each in arms for entry in arm(*each)])


@pytest.mark.parametrize("learned", [YES, NO])
def test_a_gradient_that_was_not_measured_is_not_called_zero(learned):
    text = said([*arm(11, "none", learned), *arm(11, "none", learned, "x", "rnn")])
    assert "was not measured (no adjoint probe)" in text
    assert "underflow" not in text
    assert "ratio" not in text


def test_nothing_is_told_of_a_gradient_that_no_last_step_has():
    entries = arm(11, None, NO)
    for entry in entries:  # as where a probe batch has no sample of the greatest length
        entry.record.probes["adjoint"]["initial"]["state_norm"][-1] = 0.0
    text = said(entries)
    assert "eeds that learned: 0 of 3 at T = 11" in text
    assert "gradient" not in text


@pytest.mark.parametrize(
    ("task", "is_silent"),
    [
        ({"name": "copy_memory"}, True),
        ({"name": "speech", "answer": "along"}, True),
        ({"name": "speech", "answer": "after"}, False),
        ({"name": "translation"}, False),
        ({"name": "of another program"}, False),
    ],
)
def test_of_a_first_step_with_a_loss_of_its_own_no_gradient_is_told(task, is_silent):
    entries = [*arm(11, -2.0, YES), *arm(51, -10.0, NO), *arm(51, -0.1, YES, "x", "rnn")]
    for entry in entries:
        entry.record.config["task"] = task
    text = said(entries)
    assert "eeds that learned: 3 of 3 at T = 11, 0 of 3 at T = 51" in text
    assert "Contrast at T = 51, x: solved 3/3" in text
    assert ("gradient" not in text and "ratio" not in text) is is_silent


def test_a_kernel_that_disagrees_with_torch_is_not_spoken_for():
    text = said(LADDER, kernel_checks=[kernel(), kernel(gradients=2 * ROUNDING)])
    assert "more than float32 rounding explains" in text


def test_arms_are_told_apart():
    text = said([*LADDER, *arm(11, -1.0, YES, "gru"), *arm(51, -1.0, YES, "gru")])
    assert "rnn: seeds that learned: 3 of 3 at T = 11" in text
    assert "gru: seeds that learned: 3 of 3 at T = 11, 3 of 3 at T = 51." in text
    assert said([entry for label in "abcde" for entry in arm(11, -1.0, YES, label)]) == ""


def test_signatures_hold_for_their_settings_alone():
    expected = {
        "settings": {"training.steps": 100},
        "signatures": [
            {"arm": "rnn", "horizon": 11, "log10_ratio": [-2.1, -1.9], "learned": [1, 1]},
            {"arm": ["rnn", "gru"], "horizon": 51, "learned": [1, 1]},
        ],
        "published": [{"arm": "rnn", "test_metric": 0.2, "source": "S"}],
    }
    text = said(LADDER, expected=expected)
    assert "Signatures expected of this study: 2 of 3 met; not met: rnn, T = 51, share" in text
    assert "measured 0." in text
    other = [*arm(11, -2.0, YES, steps=99), *arm(51, -10.0, NO, steps=99)]
    assert "Signatures" not in said(other, expected=expected)


def test_verdicts_count_seeds_and_diverging_is_a_result():
    (row,) = View("x", "", "", arm(11, -1.0, [True, False])).rows
    assert verdict_text(row) == "learned 1/2"
    bad = [replace(e.record, status="diverged", reason="r", result=replace(e.record.result,
           verdict="diverged")) for e in arm(11, -1.0, NO)]  # fmt: skip
    row = replace(row, records=bad)
    assert verdict_text(row) == "failed 3/3, diverged 3"
    assert [verdict(share) for share in (0.099, 0.1, 0.249, 0.25)] == [
        "solved", "learned", "learned", "failed",
    ]  # fmt: skip


# Studies and sweeps on disk

TEXTS = ["relu [/b]", "$x_$ [scaled]", ":smile: [red]漢字 😀[/]", "_a\nb\x1b[31m\udc80", "x" * 90]


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A finished study whose every name needs care, with warnings as errors."""
    root = tmp_path_factory.mktemp("[named] :smile:")
    study = tiny(root, "horizons=[10]", "contrast_horizons=[]", "name='v[x]/2 [red]'",
                 "model.name='_m [/i] $y_$'")  # fmt: skip
    (member,) = study.members
    contrasts = tuple(replace(member, label=text, contrast_of=member.label) for text in TEXTS)
    study = replace(study, members=(member, *contrasts))
    folder, console = root / "0_v[x]2 b [/b]", quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_study(study, folder, console)
    return folder, console.file.getvalue()


def test_names_and_labels_are_shown_as_they_are(named):
    folder, printed = named
    stored = (folder / "report.txt").read_text()
    assert [entry.label for entry in view.load(folder).entries][1:] == TEXTS
    for text in TEXTS[:3]:
        for shown in (stored, printed):
            assert f"Contrast at T = 10, {text}: " in " ".join(shown.split())
        assert f" beside: {text} " in stored
    assert r"T = 10, _a\nb\x1b[31m\udc80: " in stored
    assert "\x1b" not in stored + printed
    assert "v[x]/2 [red]: adding" in stored
    assert printed.splitlines()[-1] == f"Table, figures and configuration: {folder}"
    assert {path.name for path in folder.iterdir()} == {
        "study.json", "report.txt", "ladder.png", "ladder.svg", "loss_curves.png",
        "loss_curves.svg",
    }  # fmt: skip


def test_a_sweep_is_one_view_and_lists_the_members_that_failed(named, tmp_path):
    folder, _ = named
    study = json.loads((folder / "study.json").read_text())
    for run in study["runs"]:
        run["folder"] = str((folder / run["folder"]).resolve())
    for name in ("0_a", "1_[b]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.json").write_text(json.dumps(study))
    (tmp_path / "2_c").mkdir()
    (tmp_path / "2_c" / FAILURE).write_text('{"reason": "ValueError: eleven [/b]"}')
    console = quiet()
    assert not compare(tmp_path, console)
    assert (tmp_path / "ladder.png").exists()
    for text in ((tmp_path / "report.txt").read_text(), console.file.getvalue()):
        assert "2 studies: adding" in text
        assert "_m [/i] $y_$ (0_a)" in text
        assert "_m [/i] $y_$ (1_[b])" in text
        assert "2_c: ValueError: eleven [/b]" in text


def test_records_that_are_missing_or_damaged_are_said(named, tmp_path):
    study = tiny(tmp_path, "horizons=[10,12]", "contrast_horizons=[]")
    (tmp_path / "study").mkdir()
    view.save(study, tmp_path / "study", "command")
    study.members[0].folder.mkdir(parents=True)
    (study.members[0].folder / "record.json").write_text("{")
    seen = view.load(tmp_path / "study")
    assert seen.records == []
    damaged, missing = seen.failures.values()
    assert "is damaged" in damaged
    assert missing == "has not ended; the same command goes on"
    write_printed(tmp_path / "report.txt", lambda console: say_view(console, seen))
    assert "2 run(s) without a result" in (tmp_path / "report.txt").read_text()
    with pytest.raises(view.ViewError, match=r"holds no study\.json and no runs"):
        view.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer=sgd", "optimizer.learning_rate=1e30", "remedy=[]", "model.nonlinearity=relu",
          "training.steps=60"], "diverged 2"),
        (["probe=[]"], "was not measured"),
        (["task=digits", "horizons=[8]", "model=gru"], "knowing nothing: accuracy 0.1"),
    ],
    ids=["diverged", "no probe", "accuracy"],
)  # fmt: skip
def test_a_study_of_any_kind_is_shown_and_drawn(overrides, words, tmp_path):
    study = study_of("experiment=smoke", "horizons=[10]", "contrast_horizons=[]", "seeds=[0,1]",
                     "training.steps=3", f"output.root={tmp_path}", *overrides)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_study(study, tmp_path / "study", quiet())
    assert words in (tmp_path / "study" / "report.txt").read_text()
    assert (tmp_path / "study" / "ladder.png").exists()
