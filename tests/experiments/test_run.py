"""The command line: what it prints, where it writes, how it ends."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from experiments import run
from experiments.record import OWNER, RECORD
from tests.experiments.processes import SERVER, wait_for
from tests.experiments.small_studies import TINY

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def command(monkeypatch, capfd):
    """Call the command in this process; return status, stdout and stderr."""

    def call(*arguments: str):
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        capfd.readouterr()
        status: object = 0
        try:
            run.start()
        except SystemExit as end:
            status = end.code
        printed = capfd.readouterr()
        if isinstance(status, str):
            return 1, printed.out, printed.err + status
        return status, printed.out, printed.err

    return call


def test_help_and_configuration_are_for_a_newcomer(command):
    status, out, _ = command("--help")
    assert status == 0
    assert "model: antisymmetric, fused_gru, fused_lstm, fused_rnn, gru, gru_chrono" in out
    assert out.count("python -m experiments.run ") == 6
    assert "$" not in out
    assert "hydra" not in out.replace("hydra_conf", "").lower()
    assert "\n  hidden_size: 16\n" in command("--cfg", "job", "experiment=smoke")[1]


def test_a_sweep_ends_in_one_comparison_and_lists_the_member_that_failed(
    command, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(run.figures, "draw", lambda _, folder: drawn.append(folder))
    root = tmp_path / "a [b] c"
    words = [*TINY, "horizons=[10]", "contrast_horizons=[]", "name='s/t [red]'"]
    status, out, err = command(
        "-m", *words, f"output.root='{root}'", "model=fused_rnn,rnn", "training.steps=3,0"
    )
    assert status == 1
    assert "training.steps must be an integer of at least 1; got 0" in err
    (folder,) = (root / "multirun").glob("*/*")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        f"{number}_s_t [red]_{model}"
        for number, model in enumerate(("fused_rnn", "rnn", "fused_rnn", "rnn"))
    ]
    report = (folder / "report.txt").read_text()
    assert "2 studies: adding" in report
    assert "fused_rnn: the gradient vanishes" in report
    assert "\n2 run(s) without a result:\n  2_s_t [red]_fused_rnn: training.steps must be" in report
    assert drawn == [folder / "0_s_t [red]_fused_rnn", folder / "1_s_t [red]_rnn", folder]
    assert out.splitlines()[-1] == f"Comparison: {folder}"
    # Given again without them: nothing is made a second time.
    records = {path: path.stat().st_mtime_ns for path in root.rglob(RECORD)}
    status, out, _ = command("-m", *words, f"output.root='{root}'", "model=fused_rnn,rnn")
    assert status == 0
    assert out.count("1 of 1 runs are on record already") == 2
    assert records == {path: path.stat().st_mtime_ns for path in root.rglob(RECORD)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=0", "training.steps must be an integer of at least 1; got 0"),
        ("model=lsm", "got lsm; did you mean lstm?"),
        ("taks=adding", "unknown key taks; "),
        ("training.step=3", "did you mean training.steps?"),
        ("probe.spectrum.every=3", "there is no probe.spectrum in this study; +probe.spectrum="),
        ("training=null", "field 'training' is not Optional"),
        ("model=null", "each of experiment, model, optimizer, probe, remedy, task must be"),
        ("+arms.x=model=lstm", "+arms.x=model=lstm is not an override that Hydra can read: "),
        ("model.hidden_size=1000000000", "model cannot be built: "),
        ("budget=", "budget must be one of"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_leaves_nothing(override, message, command, tmp_path):
    status, out, err = command(override, f"output.root={tmp_path}")
    assert status == 1
    assert out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("kind", [["hydra.run.dir"], ["-m", "hydra.sweep.dir"]])
def test_a_named_folder_with_a_run_in_it_is_refused_before_it_is_touched(kind, command, tmp_path):
    (tmp_path / "study.json").touch()
    *option, key = kind
    status, _, err = command(*option, *TINY, f"{key}={tmp_path}", f"output.root={tmp_path}/x")
    assert status == 1
    assert err == f"error: {tmp_path} already holds a run (study.json); choose another folder"
    assert os.listdir(tmp_path) == ["study.json"]


def test_what_cannot_be_drawn_costs_no_record_and_is_said(command, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no ink")

    monkeypatch.setattr(run.figures, "draw", fail)
    status, out, _ = command(*TINY, "horizons=[10]", "contrast_horizons=[]",
                             f"hydra.run.dir={tmp_path}/x", f"output.root={tmp_path}")  # fmt: skip
    assert status == 1
    assert "What was measured" in out
    assert "not everything could be printed and drawn: ValueError: no ink" in out
    assert len(list(tmp_path.rglob(RECORD))) == 1


# Processes


def started(output: Path, *arguments: str) -> BaseProcess:
    """Give the command in a process with a session of its own; it prints to a file."""
    process = SERVER.Process(target=give, args=(output, arguments))
    process.start()
    return process


def give(output: Path, arguments: tuple[str, ...]) -> None:
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["run.py", *arguments]
    run.start()


def session(leader: int) -> list[int]:
    """Return the processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended between the listing and the reading
        if int(its) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_killed_it_leaves_no_process_asked_to_end_it_saves_and_twice_at_once_is_seen(tmp_path):
    words = (*TINY, "horizons=[10,12]", "contrast_horizons=[]", f"output.root={tmp_path}",
             "training.steps=1000000", "checkpoint_seconds=0.01")  # fmt: skip

    def checkpoints():
        return list(tmp_path.rglob("checkpoint.pt"))

    first = started(tmp_path / "first", *words, "workers=2")
    try:
        wait_for(lambda: len(checkpoints()) == 2, first)
        first.kill()
        first.join()
        wait_for(lambda: not session(first.pid))
    finally:
        if session(first.pid):
            os.killpg(first.pid, signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in checkpoints()}
    second = started(tmp_path / "second", *words, "workers=1")
    third = None
    try:
        # The longest first. A process that finds it taken says so, and goes on with the next.
        (owner,) = tmp_path.rglob(f"*T12*/{OWNER}")
        wait_for(lambda: f'"pid": {second.pid},' in owner.read_text(), second)
        third = started(tmp_path / "third", *words, "workers=1")
        (other,) = tmp_path.rglob(f"*T10*/{OWNER}")
        wait_for(lambda: f'"pid": {third.pid},' in other.read_text(), third)
        for process, how in ((second, signal.SIGTERM), (third, signal.SIGINT)):
            os.kill(process.pid, how)
            process.join(60)
            assert process.exitcode == 1
            out = (tmp_path / ("second" if process is second else "third")).read_text()
            assert "the same command goes on from here" in out.splitlines()[-1]
        assert f"elsewhere: {owner.parent}: process {second.pid} on " in out
    finally:
        for process in (second, third):
            if process is not None:
                process.kill()
    assert all(path.stat().st_mtime_ns > at for path, at in before.items())
