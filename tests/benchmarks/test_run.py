"""Whole runs on tiny sizes, and the results that are in the repository."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import report, run, streaming
from benchmarks.cases import cases_of
from benchmarks.gates import gate_table
from benchmarks.tables import tables_of

RESULTS = sorted(run.RESULTS_FOLDER.glob("*/results.json"))
PAGES = {
    "docs/performance/results.md": "amd-epyc-2026-11-26",
    "docs/performance/results-avx2.md": "amd-epyc-2026-11-25",
}


def test_a_quick_run_measures_writes_and_can_be_rendered_again(tmp_path, capfd):
    options = ["--quick", "--suite", "grid,accuracy", "--threads", "1"]
    assert run.main([*options, "--output", str(tmp_path)]) == 0
    found = report.load(tmp_path / "results.json")
    assert found["complete"]
    assert len(found["timings"]) == len(cases_of(["grid"], quick=True))
    assert all("ratio" in timing["contestants"]["fused_rnn"] for timing in found["timings"])
    assert all(result["passed"] for result in found["accuracy"])
    text = (tmp_path / "results.md").read_text()
    assert str(tmp_path) not in text + (tmp_path / "results.json").read_text()
    page = tmp_path / "docs" / "results.md"
    assert run.main(["--render", str(tmp_path / "results.json"), "--page", str(page)]) == 0
    assert (tmp_path / "results.md").read_text() == text == page.read_text()
    assert "Errors against float64" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "tabel"], "unknown suite 'tabel'; choose from table, grid, variants"),
        (["--contestants", "tensorflow"], "unknown contestant 'tensorflow'; choose from torch_rnn"),
        (["--threads", "two"], "--threads takes whole numbers and commas, got 'two'"),
        (["--threads", "0"], "--threads takes positive numbers, got 0"),
        (["--render", "nowhere.json"], "there is no file nowhere.json"),
    ],
)
def test_a_wrong_option_is_answered_with_the_choices(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_committed_results_can_be_read_and_their_page_is_what_they_render_to(path):
    found = report.load(path)
    tables = [gate_table(found), *tables_of(found)]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    assert len(tables) > len(found["suites"])
    figures = [figure.name for figure in path.parent.glob("*.png")]
    assert (path.parent / "results.md").read_text() == report.markdown(found, figures)


@pytest.mark.parametrize(("page", "folder"), PAGES.items())
def test_the_pages_of_the_documentation_are_what_the_results_render_to(page, folder):
    folder, path = run.RESULTS_FOLDER / folder, Path(page)
    figures = [f"../../{f.relative_to(run.machine.REPOSITORY)}" for f in folder.glob("*.png")]
    text = (run.machine.REPOSITORY / path).read_text()
    assert text == report.markdown(report.load(folder / "results.json"), figures)


def test_gates_and_warnings_follow_from_the_numbers():
    found = report.load(run.RESULTS_FOLDER / "amd-epyc-2026-11-26" / "results.json")
    before = {row[0]: row[1:] for row in gate_table(found).rows}
    assert before["ahead of everyone that was timed"] == ("yes", "all 18")
    assert before["ratio / target at least 0.9"][0] == "NO"
    timing = found["timings"][0]
    timing["contestants"]["jax"]["ratio"]["median"] = 99.0
    timing["load"]["others"] = 1.0
    for point in found["memory"]:
        point["bytes"] *= 2
    found["complete"] = False
    after = {row[0]: row[1:] for row in gate_table(found).rows}
    assert after["ahead of everyone that was timed"][0] == "NO"
    assert after["peak memory of a training step at most 1.2 x T*B*H*4 bytes"][0] == "NO"
    assert "the run was ended before it finished" in report.warnings_of(found)[0]
    assert "other processes used more than 0.1 cores (up to 1.00)" in report.warnings_of(found)[1]


def test_results_are_strict_json_written_whole_and_others_are_refused(tmp_path):
    report.save(report.empty_results(ratio=float("inf"), seconds=1 / 3), tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["seconds"] == 0.333333
    (tmp_path / "results.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match=r"results\.json holds no results"):
        report.load(tmp_path / "results.json")


def test_streaming_times_two_models_that_write_the_same(monkeypatch):
    written = {}

    def timed(works, seconds):
        written.update({name: work.run() for name, work in works.items()})
        return {"fused_rnn": [0.5], "rnn": [1.0]}, {}

    monkeypatch.setattr(streaming, "interleave", timed)
    row = streaming.row_of(8, 3, 0.0)
    assert row == ("8", "3", "300", "150", "2.00 (2.00 to 2.00)")
    assert written["fused_rnn"].shape == (streaming.WRITTEN, 3)
    assert torch.equal(written["fused_rnn"], written["rnn"])
