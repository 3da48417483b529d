"""Who owns a run's folder, where many processes want one at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from experiments import run_folder
from experiments.record import OWNER
from experiments.run_folder import FolderTakenError, claim, claim_next, file_name, release
from experiments.view import STUDY
from tests.experiments.processes import forked


def claim_when_told(how: str, folder: Path, pipe: Connection) -> None:
    """Claim a folder when told to, and live until told."""
    pipe.recv()
    try:
        pipe.send(str(claim_next(folder) if how == "next" else claim(folder) or folder))
    except FolderTakenError as error:
        pipe.send(f"refused: {error}")
    with suppress(EOFError):
        pipe.recv()


@contextmanager
def claimants(count: int, how: str, folder: Path) -> Iterator[dict[BaseProcess, str]]:
    """Let processes claim at once; yield what each says of it, and end them."""
    started = [forked(claim_when_told, how, folder) for _ in range(count)]
    for _, pipe in started:
        pipe.send("claim")
    yield {process: pipe.recv() for process, pipe in started}
    for process, pipe in started:
        pipe.close()
        process.join(60)
        assert process.exitcode is not None


def test_of_processes_that_start_at_once_each_takes_a_folder_of_its_own(tmp_path):
    with claimants(6, "next", tmp_path / "a" / "12-00-00_x") as answers:
        folders = {Path(answer): process.pid for process, answer in answers.items()}
        numbers = ["12-00-00_x", *(f"12-00-00_x_{number}" for number in range(2, 7))]
        assert sorted(folder.name for folder in folders) == numbers
        for folder, pid in folders.items():
            assert json.loads((folder / OWNER).read_text())["pid"] == pid


def test_a_named_folder_has_one_owner_and_others_are_told_whether_it_lives(tmp_path):
    folder = tmp_path / "x"
    with claimants(4, "named", folder) as answers:
        (owner,) = (process for process, words in answers.items() if words == str(folder))
        del answers[owner]
        assert all(f"refused: {folder} was taken by " in words for words in answers.values())
        before = sorted(folder.iterdir())
        alive = rf"process {owner.pid} on .* is still running; choose"
        with pytest.raises(FolderTakenError, match=alive):
            claim(folder)
        owner.kill()
    with pytest.raises(FolderTakenError, match=rf"process {owner.pid} .* has ended; .* or delete"):
        claim(folder)
    (folder / STUDY).touch()
    with pytest.raises(FolderTakenError, match=r"already holds a run \(study\.json\)"):
        claim(folder)
    assert sorted(folder.iterdir()) == sorted([*before, folder / STUDY])


def test_a_process_keeps_its_folder_until_it_holds_a_run(tmp_path):
    (tmp_path / "slurm.out").touch()
    claim(tmp_path)
    claim(tmp_path / "." / ".." / tmp_path.name)
    (tmp_path / STUDY).touch()
    with pytest.raises(FolderTakenError, match=r"already holds a run \(study\.json\)"):
        claim(tmp_path)


def test_a_folder_given_back_can_be_taken_again(tmp_path):
    folder = tmp_path / "x"
    for _ in range(2):
        claim(folder)
        release(folder)
        assert not folder.exists()


@pytest.mark.parametrize(
    "name", [".hydra", "multirun.yaml", "partial_results.json", "results.json", STUDY]
)
def test_runs_from_before_folders_had_owners_are_left_alone(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(FolderTakenError, match=rf"already holds a run \({name}\)"):
        claim(tmp_path)
    assert os.listdir(tmp_path) == [name]
    assert claim_next(tmp_path).name == f"{tmp_path.name}_2"


def test_a_file_in_the_way_is_no_folder(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(FolderTakenError, match="x is not a folder"):
        claim(tmp_path / "x")
    assert claim_next(tmp_path / "x").name == "x_2"


def test_without_locks_an_owner_may_still_be_running(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no locks available")

    with claimants(1, "named", tmp_path / "x") as answers:
        monkeypatch.setattr(run_folder.fcntl, "flock", fail)
        (owner,) = answers
        with pytest.raises(FolderTakenError, match=f"process {owner.pid} .* may still be running"):
            claim(tmp_path / "x")
        claim(tmp_path / "y")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("fused_rnn", "fused_rnn"),
        ("v[x]2 $a :b: 漢字", "v[x]2 $a :b: 漢字"),
        ("a/b\n\x00\udc80", "a_b___"),
        ("é" * 300, "é" * 40),
    ],
)
def test_a_name_can_be_part_of_a_folder(text, name, tmp_path):
    assert file_name(text) == name
    (tmp_path / f"x{file_name(text)}").mkdir()
