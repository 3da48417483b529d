"""Whole runs on tiny sizes, and the results that are in the repository."""

import json

import pytest
import torch

from benchmarks import run, streaming, tables
from benchmarks.cases import cases_of

RESULTS = sorted(path.parent for path in run.RESULTS_FOLDER.glob("*/results.json"))


def test_a_quick_run_measures_writes_and_can_be_rendered_again(tmp_path, capfd):
    suites = ["grid", "accuracy"]
    options = ["--quick", "--suite", *suites, "--threads", "1"]
    assert run.main([*options, "--output", str(tmp_path)]) == 0
    found = tables.load(tmp_path)
    assert found["complete"]
    assert len(found["timings"]) == len(cases_of(suites, quick=True))
    assert all("ratio" in timing["contestants"]["fused_rnn"] for timing in found["timings"])
    found["quick"] = False
    errors = [row for row in tables.gate_table(found).rows if row[0].startswith("errors at most")]
    assert [row[1] for row in errors] == ["yes"]
    text = (tmp_path / "results.md").read_text()
    assert str(tmp_path) not in text + (tmp_path / "results.json").read_text()
    assert "## Errors of values and gradients" in capfd.readouterr().out
    tables.render(tmp_path)
    assert (tmp_path / "results.md").read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "tabel"], "argument --suite: invalid choice: 'tabel' (choose from"),
        (["--contestants", "tensorflow"], "argument --contestants: invalid choice: 'tensorflow'"),
        (["--threads", "0"], "argument --threads: invalid choice: 0"),
    ],
)
def test_a_wrong_option_is_answered_with_the_choices(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_committed_results_can_be_read_and_their_page_is_what_they_render_to(folder):
    found = tables.load(folder)
    suites = {case.suite for case, _ in tables.timings_of(found)}
    drawn = [table for table in tables.tables_of(found) if table.rows]
    assert len(drawn) > len(suites) >= len(found["suites"])
    figures = [figure.name for figure in folder.glob("*.png")]
    assert (folder / "results.md").read_text() == tables.page_of(found, figures)


def test_gates_and_warnings_follow_from_the_numbers():
    found = tables.load(run.RESULTS_FOLDER / "amd-epyc-2026-11-26")
    before = {row[0]: row[1:] for row in tables.gate_table(found).rows}
    assert before["ahead of everyone that was timed"] == ("yes", "all 18")
    assert before["ratio / target at least 0.9"][0] == "NO"
    first = found["timings"][0]
    first["contestants"]["jax"]["ratio"]["median"] = 99.0
    first["load"] = 1.0
    for timing in found["timings"]:
        entry = timing["contestants"]["fused_rnn"]
        if timing["case"]["suite"] == "memory":
            entry["bytes"] *= 2
        if timing["case"]["suite"] == "accuracy":
            entry["errors"]["output"] = 3e-6
    found["complete"] = False
    after = {row[0]: row[1:] for row in tables.gate_table(found).rows}
    assert after["ahead of everyone that was timed"][0] == "NO"
    assert after["peak memory of a training step at most 1.2 sequences of states"][0] == "NO"
    # Where torch.nn.RNN errs by more, FusedRNN may.
    assert after["errors at most 2e-06 where torch's are"][1].startswith("15 of 17 do not")
    warnings = tables.warnings_of(found)
    assert "the run was ended before it finished" in warnings[0]
    assert "others used more than 0.1 cores (up to 1.00)" in warnings[1]


def test_results_are_strict_json_with_six_digits(tmp_path):
    tables.save(tables.empty_results(ratio=float("inf"), seconds=1 / 3), tmp_path)
    text = (tmp_path / "results.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    assert (found["seconds"], found["ratio"]) == (0.333333, None)


def test_streaming_times_two_models_that_write_the_same(monkeypatch):
    written = {}

    def timed(works, seconds):
        written.update({name: work.run() for name, work in works.items()})
        return {"fused_rnn": [0.5], "rnn": [1.0]}

    monkeypatch.setattr(streaming, "interleave", timed)
    row = streaming.row_of(8, 3, 0.0)
    assert row == ("8", "3", "300", "150", "2.00 (2.00 to 2.00)")
    assert written["fused_rnn"].shape == (streaming.WRITTEN, 3)
    assert torch.equal(written["fused_rnn"], written["rnn"])
