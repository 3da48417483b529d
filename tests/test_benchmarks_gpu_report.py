"""The one call on a GPU, rehearsed with stand-ins: its command line, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.gpu import __main__ as command_line
from benchmarks.gpu import info, report
from benchmarks.gpu.cases import REGIMES, all_cases
from benchmarks.gpu.session import STAGES, Session, clear
from benchmarks.gpu.stages import Outcome, Stage
from tests.gpu_stand_ins import found_with, python, timing_of

REPOSITORY = Path(__file__).resolve().parents[1]


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stage", "chek"], "unknown stage 'chek'"),
        (["--stage", ","], "no stage given"),
        (["--seconds", "0"], "--seconds takes a positive number"),
        (["--render", "none.json"], "there is no file none.json"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused_by_name(arguments, words, capsys):
    with pytest.raises(SystemExit):
        command_line.main(arguments)
    assert words in capsys.readouterr().err


@pytest.fixture
def fake_stages(monkeypatch, tmp_path):
    """Replace the stages' commands; return a dict from name to program, to be filled."""
    about = {"card": "Fake 9000", "date": "2026-01-31", "git_commit": "abc", "rehearsal": False}
    programs = dict.fromkeys(STAGES, "print('fine')")
    programs["info"] = (
        f"import json; open({str(tmp_path / 'runs' / 'work' / 'info.json')!r}, 'w').write("
        f"json.dumps({about!r})); print('Fake 9000')"
    )
    original = Session.stage

    def stage(self, name):
        real = original(self, name)
        return Stage(name, python(programs[name]), real.limit, real.required, real.environment)

    monkeypatch.setattr(Session, "stage", stage)
    monkeypatch.setattr(command_line, "RUNS_FOLDER", tmp_path / "runs")
    monkeypatch.setattr(command_line, "RESULTS_FOLDER", tmp_path / "results")
    monkeypatch.delenv("OUT", raising=False)
    return programs


def test_a_run_leaves_results_report_and_log_named_after_card_and_date(
    fake_stages, tmp_path, capsys
):
    fake_stages["profile"] = (
        f"open({str(tmp_path / 'runs' / 'work' / 'profile.txt')!r}, 'w').write('hot'); print('ncu')"
    )
    assert command_line.main([]) == 0
    folder = tmp_path / "results" / "fake-9000-2026-01-31"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("log.txt", "profile.txt", "results.json", "results.md")
    ]
    found = results.load(folder / "results.json")
    assert found["machine"]["git_commit"] == "abc"
    assert [stage["name"] for stage in found["stages"]] == list(STAGES)
    assert found["passed"]
    assert "PASSED" in capsys.readouterr().out
    assert command_line.main([]) == 0  # a second run of the day does not replace the first
    assert (tmp_path / "results" / "fake-9000-2026-01-31-2" / "results.json").exists()


def test_a_failed_stage_is_reported_and_the_exit_status_says_so(fake_stages, tmp_path, capsys):
    fake_stages["memcheck"] = "print('3 errors'); raise SystemExit(1)"
    assert command_line.main(["--output", str(tmp_path / "out")]) == 1
    found = results.load(tmp_path / "out" / "results.json")
    failed = [stage for stage in found["stages"] if stage["status"] == "failed"]
    assert [(stage["name"], stage["note"]) for stage in failed] == [
        ("memcheck", "exit status 1; last line: 3 errors")
    ]
    last = capsys.readouterr().out.splitlines()
    assert any(line.startswith("memcheck") and "FAILED" in line for line in last)
    assert last[-2].startswith("FAILED in")


def test_results_of_some_stages_stay_out_of_the_repository(fake_stages, tmp_path, monkeypatch):
    assert command_line.main(["--stage", "info,check"]) == 0
    assert (tmp_path / "runs" / "fake-9000-2026-01-31" / "results.json").exists()
    monkeypatch.setenv("OUT", str(tmp_path / "given"))
    assert command_line.main(["--stage", "check"]) == 0
    assert (tmp_path / "given" / "fake-9000-2026-01-31" / "results.json").exists()
    assert not (tmp_path / "results").exists()


def test_without_a_card_the_run_fails_at_once_and_says_why(tmp_path, monkeypatch):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert "sees no CUDA device" in done.stdout
    assert "FAILED" in done.stdout.splitlines()[-2]
    found = results.load(tmp_path / "no-card" / "results.json")
    assert found["stages"][1]["note"] == "info failed"


def test_old_results_do_not_pass_for_new_ones(tmp_path):
    for name in ("info.json", "timings.jsonl", "floor.json", "checker-123"):
        (tmp_path / name).write_text("{}")
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checker-123"]


# ---- the report ----------------------------------------------------------------------------------


def gate(found: dict, words: str) -> tuple[str, str]:
    row = next(row for row in report.gate_table(found).rows if words in row[0])
    return row[1], row[2]


def test_gates_hold_each_case_to_its_target_and_every_case_to_one():
    cases = {case.label: case for case in all_cases()}
    small = cases["small (1000, 20, 10, 128) fp32 train"]
    grid = cases["grid (1, 1, 1, 1) fp32 train"]
    fine = found_with([timing_of(small, 2.5), timing_of(grid, 3.5)])
    assert gate(fine, "targets") == ("yes", "all 1")
    assert gate(fine, "never below") == ("yes", "all 2")
    assert gate(fine, "geometric mean")[0] == "yes"
    poor = found_with([timing_of(small, 1.9), timing_of(grid, 0.98)])
    assert gate(poor, "targets") == ("NO", f"1 of 1 do not: {small.label} 1.90 for 2.00")
    assert gate(poor, "never below") == ("NO", f"1 of 2 do not: {grid.label} 0.98")
    assert gate(poor, "geometric mean")[0] == "NO"
    partial = found_with([timing_of(small)], unmeasured=[grid.label])
    assert gate(partial, "everything measured") == ("NO", "1 cases were not")
    rehearsal = found_with([timing_of(small)], machine={"rehearsal": True})
    assert not report.gate_table(rehearsal).rows


def test_times_over_the_floor_are_shown_and_gated():
    case = all_cases()[0]
    floor = {"rates": {"copy": 4e12}, "cases": {case.label: {"seconds": 4e-4}}}
    found = found_with([timing_of(case)], floor=floor)
    assert gate(found, "floor") == ("NO", f"1 of 1 do not: {case.label} 2.50")
    row = dict(
        zip(report.SPEED_COLUMNS, report.speed_table(found, case.regime).rows[0], strict=True)
    )
    assert row["time / floor"] == "2.50"
    assert row["plan"] == "cluster 8"
    assert row["quartiles"] == "4.50 to 5.50"


def test_what_was_not_timed_is_listed_with_its_reason():
    first, second, third, *_ = all_cases()
    skipped = timing_of(second)
    skipped["graphed"] = {**skipped["graphed"], "fused_rnn": {"skipped": "failed: no capture"}}
    timings = [{"case": first.as_json(), "failed": "hung: killed after 40 s"}, skipped]
    found = found_with(timings, unmeasured=[third.label])
    assert report.not_timed_table(found).rows == [
        (first.label, "hung: killed after 40 s"),
        (f"{second.label}, graphed, fused_rnn", "failed: no capture"),
        (third.label, "no time was left"),
    ]
    assert "1 cases were not measured" in report.markdown(found)


def test_the_end_of_the_log_is_short_however_much_was_measured():
    stages = [Outcome(name, "passed", 12.0, "x" * 200).as_json() for name in STAGES]
    found = found_with([timing_of(case, 0.5) for case in all_cases()], stages=stages)
    last = report.last_words(found)
    assert len(last) < 9000
    assert all(regime in last for regime in REGIMES)
    assert last.endswith("PASSED in 500 s")


def test_results_can_be_rendered_again_from_their_file(tmp_path, capsys):
    results.save(found_with([timing_of(all_cases()[0])]), tmp_path)
    assert command_line.main(["--render", str(tmp_path / "results.json")]) == 0
    assert "Fake 9000" in (tmp_path / "results.md").read_text()
    assert all_cases()[0].label.split(" ", 1)[0] in capsys.readouterr().out


# ---- the machine ---------------------------------------------------------------------------------


def test_results_are_named_after_card_and_date():
    about = {"card": "NVIDIA H100 80GB HBM3", "date": "2026-01-31T10:00:00+00:00"}
    assert info.folder_name(about) == "nvidia-h100-80gb-hbm3-2026-01-31"


def test_the_description_names_no_path_and_no_host():
    about = info.describe("cpu")
    text = json.dumps(about)
    assert about["rehearsal"]
    assert len(about["sources"]) == 16
    assert str(REPOSITORY) not in text
    assert os.uname().nodename not in text
