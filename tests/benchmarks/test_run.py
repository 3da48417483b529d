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
def test_the_page_of_committed_results_is_what_they_render_to(folder):
    found = tables.load(folder)
    assert len(tables.tables_of(found)) > len({case.suite for case, _ in tables.timings_of(found)})
    figures = [figure.name for figure in folder.glob("*.png")]
    assert (folder / "results.md").read_text() == tables.page_of(found, figures)


def test_shortfalls_and_warnings_follow_from_the_numbers():
    found = tables.load(run.RESULTS_FOLDER / "amd-epyc-2026-11-26")
    assert tables.shortfall_table(found).rows == []
    for timing in found["timings"]:
        entry, is_first = timing["contestants"]["fused_rnn"], timing is found["timings"][0]
        if is_first:
            entry["ratio"] = {"median": 0.9, "low": 0.8, "high": 0.99}
            timing["load"] = 1.0
        if timing["case"]["suite"] == "memory":
            entry["bytes"] *= 2
        if timing["case"]["suite"] == "accuracy":
            entry["errors"]["output"] = 3e-6
    rows = tables.shortfall_table(found).rows
    first, *others = [row[-1] for row in rows]
    assert first == "ratio 0.90 (0.80 to 0.99), 963 us"
    # Where torch.nn.RNN errs by more, FusedRNN may; below 32 MiB it may hold more.
    words = ["sequences of states", "output errs by 3.0e-06"]
    assert [sum(text.endswith(word) for text in others) for word in words] == [3, 15]
    assert len(others) == 18
    found |= {"complete": False, "unmeasured": 3}
    warnings = tables.warnings_of(found)
    assert "the run was ended before it finished" in warnings[0]
    assert warnings[1] == "3 cases were not measured"
    assert "others used more than 0.1 cores (up to 1.00)" in warnings[2]


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
