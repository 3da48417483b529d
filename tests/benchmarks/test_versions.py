"""The comparison of two versions: it finds the slower one and the one that computes otherwise."""

import json
import math
import shutil

import pytest

from benchmarks import tables, versions
from benchmarks.cases import Case
from benchmarks.machine import REPOSITORY
from benchmarks.workers import Worker, WorkerError

TINY = Case("versions", 3, 2, 2, 4, "train")

needs_git = pytest.mark.skipif(
    not (REPOSITORY / ".git").exists() or shutil.which("git") is None,
    reason="commits are read out of a git repository",
)

SLOW_AND_WRONG = """
import time as _time
_forward = FusedRNN.forward
def _slow_and_wrong(self, *arguments):
    _time.sleep(5e-3)
    output, h_n = _forward(self, *arguments)
    return 2 * output, h_n
FusedRNN.forward = _slow_and_wrong
"""


def test_a_version_that_is_slower_and_computes_otherwise_is_found_out(tmp_path):
    for name in ("rnn_cuda", "csrc"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    with (tmp_path / "rnn_cuda" / "__init__.py").open("a") as file:
        file.write(SLOW_AND_WRONG)
    with Worker(1, folder=REPOSITORY) as old, Worker(1, folder=tmp_path) as new:
        changed = versions.compare({"old": old, "new": new}, TINY, 1, 0.01)
        unchanged = versions.compare({"old": old, "new": old}, TINY, 1, 0.01)
    assert changed["new"]["ratio"]["median"] < 0.5
    assert changed["new"]["seconds"]["median"] > 5e-3
    assert not changed["same_bits"]
    assert changed["apart"] == pytest.approx(0.5)
    assert (unchanged["same_bits"], unchanged["apart"]) == (True, 0)


def test_a_folder_without_the_package_is_no_version(tmp_path):
    with Worker(1, folder=tmp_path) as worker, pytest.raises(WorkerError, match="no rnn_cuda in"):
        worker.ask(tables.number, 1.0)


@needs_git
def test_a_commit_against_what_is_here_and_what_was_measured_before_one_died(
    tmp_path, capfd, monkeypatch
):
    compare = versions.compare

    def dies_at_second(workers, case, threads, seconds):
        if case.mode == "train":
            raise WorkerError("new: the measuring process ended with signal 9")
        return compare(workers, case, threads, seconds)

    monkeypatch.setattr(versions, "compare", dies_at_second)
    file = tmp_path / "found.json"
    options = ["--shapes", "3,2,2,4", "--threads", "1", "--seconds", "0.01", "--json", str(file)]
    assert versions.main(["HEAD", *options]) == 1
    (found,) = json.loads(file.read_text())
    assert (found["case"]["mode"], math.isfinite(found["apart"])) == ("forward", True)
    printed = capfd.readouterr().out
    assert "new: the measuring process ended with signal 9; see its output above" in printed
    assert "what is here against HEAD" in printed


@needs_git
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-commit"], "there is no commit 'no-such-commit'"),
        (["HEAD", "--shapes", "1,2,3,0"], "invalid shape value: '1,2,3,0'"),
    ],
)
def test_what_cannot_be_compared_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        versions.main(arguments)
    assert message in capsys.readouterr().err


def test_gradients_that_are_nan_are_not_apart_by_nothing():
    assert math.isnan(versions.largest([0.0, math.nan, 1.0]))
    assert versions.largest([0.0, 2.0, 1.0]) == 2
