"""The comparison of two versions: it finds the slower one and the one that computes otherwise."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.machine import REPOSITORY
from benchmarks.versions import Version, compare, folder_of, largest, main, same_bits
from benchmarks.workers import WorkerError

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


@pytest.fixture
def changed_version(tmp_path: Path) -> Path:
    """A copy of the package that takes its time and doubles its output."""
    for name in ("rnn_cuda", "csrc"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    with (tmp_path / "rnn_cuda" / "__init__.py").open("a") as file:
        file.write(SLOW_AND_WRONG)
    return tmp_path


def test_a_version_that_is_slower_and_computes_otherwise_is_found_out(changed_version):
    with (
        contextlib.closing(Version("old", REPOSITORY, 1)) as old,
        contextlib.closing(Version("new", changed_version, 1)) as new,
    ):
        changed = compare(old, new, TINY, 1, 0.01)
        unchanged = compare(old, old, TINY, 1, 0.01)
    assert changed["new"]["ratio"]["median"] < 0.5
    assert changed["new"]["seconds"]["median"] > 5e-3
    assert not changed["same_bits"]
    assert changed["apart"] == pytest.approx(0.5)
    assert unchanged["same_bits"]
    assert unchanged["apart"] == 0


def test_a_folder_without_the_package_is_no_version(tmp_path):
    with (
        contextlib.closing(Version("none", tmp_path, 1)) as version,
        pytest.raises(WorkerError, match="the process of none ended with exit status 1"),
    ):
        version.run()


@needs_git
def test_the_files_of_a_commit_are_its_own_and_gone_afterwards():
    command = ["git", "-C", str(REPOSITORY), "show", "HEAD:setup.py"]
    committed = subprocess.run(command, capture_output=True, check=True).stdout
    with folder_of("HEAD") as folder:
        assert folder != REPOSITORY
        assert (folder / "setup.py").read_bytes() == committed
    assert not folder.exists()


@needs_git
def test_a_commit_against_what_is_here(tmp_path, capfd):
    file = tmp_path / "found.json"
    options = ["--threads", "1", "--seconds", "0.01", "--json", str(file)]
    assert main(["HEAD", "--shapes", "3,2,2,4", "1,1,1,1", *options]) == 0
    found = json.loads(file.read_text())
    cases = [(Case.from_json(each["case"]).shape, each["case"]["mode"]) for each in found]
    shapes = [(3, 2, 2, 4), (1, 1, 1, 1)]
    assert cases == [(shape, mode) for shape in shapes for mode in ("forward", "train")]
    assert all(math.isfinite(each["apart"]) for each in found)
    printed = capfd.readouterr().out
    assert "what is here against HEAD" in printed
    assert "geometric mean" in printed


@needs_git
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-commit"], "old: there is no commit 'no-such-commit'"),
        (["HEAD", "nor-this"], "new: there is no commit 'nor-this'"),
        (["HEAD", "--threads", "0"], "--threads takes numbers from 1 to"),
        (["HEAD", "--shapes", "1,2,3"], "invalid shape value: '1,2,3'"),
        (["HEAD", "--shapes", "1,2,3,0"], "invalid shape value: '1,2,3,0'"),
    ],
)
def test_what_cannot_be_compared_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_gradients_that_are_nan_are_not_apart_by_nothing():
    nan = math.nan
    assert math.isnan(largest([0.0, nan, 1.0]))
    assert math.isnan(largest([nan, 0.0]))
    assert largest([0.0, 2.0, 1.0]) == 2


@needs_git
def test_what_was_measured_before_a_version_died_is_shown(tmp_path, capfd, monkeypatch):
    prepare = Version.prepare

    def dies_at_the_second_case(self, case, results):
        if case.mode == "train":
            self._process.kill()
        return prepare(self, case, results)

    monkeypatch.setattr(Version, "prepare", dies_at_the_second_case)
    file = tmp_path / "found.json"
    options = ["--threads", "1", "--seconds", "0.01", "--json", str(file)]
    assert main(["HEAD", "--shapes", "3,2,2,4", *options]) == 1
    assert [each["case"]["mode"] for each in json.loads(file.read_text())] == ["forward"]
    printed = " ".join(capfd.readouterr().out.split())
    assert "(3, 2, 2, 4) train 1t: the process of HEAD ended with signal 9" in printed
    assert "what is here against HEAD" in printed


def test_a_changed_bit_is_a_difference():
    a = torch.tensor([0.0, 1.0])
    assert same_bits(a, a.clone())
    assert not same_bits(a, torch.tensor([-0.0, 1.0]))
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
