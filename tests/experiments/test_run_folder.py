"""Who owns a run's folder, where many processes want one at once."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from experiments import run_folder
from experiments.record import OWNER
from experiments.run_folder import FolderTakenError, claim, claim_next, file_name, release
from experiments.view import STUDY
from tests.experiments.processes import SERVER


@dataclass(frozen=True)
class Claimant:
    """A process that claims a folder when it is told to, and lives until it is told."""

    process: BaseProcess
    pipe: Connection

    @property
    def pid(self):
        return self.process.pid


def claim_when_told(how: str, folder: Path, pipe: Connection) -> None:
    pipe.recv()
    try:
        pipe.send(str(claim_next(folder) if how == "next" else claim(folder) or folder))
    except FolderTakenError as error:
        pipe.send(f"refused: {error}")
    with suppress(EOFError):
        pipe.recv()


def claimants(count: int, how: str, folder: Path) -> list[Claimant]:
    found = []
    for _ in range(count):
        ours, theirs = SERVER.Pipe()
        process = SERVER.Process(target=claim_when_told, args=(how, folder, theirs))
        process.start()
        theirs.close()
        found.append(Claimant(process, ours))
    return found


def answers(processes: list[Claimant]) -> list[str]:
    """Let all of them claim at once; return what each says of it."""
    for each in processes:
        each.pipe.send("claim")
    return [each.pipe.recv() for each in processes]


def ended(processes: list[Claimant]) -> None:
    for each in processes:
        each.pipe.close()
        each.process.join(60)
        assert each.process.exitcode is not None


def test_of_processes_that_start_at_once_each_takes_a_folder_of_its_own(tmp_path):
    processes = claimants(6, "next", tmp_path / "a" / "12-00-00_x")
    folders = [Path(answer) for answer in answers(processes)]
    numbers = ["12-00-00_x", *(f"12-00-00_x_{number}" for number in range(2, 7))]
    assert sorted(folder.name for folder in folders) == numbers
    owners = [json.loads((folder / OWNER).read_text())["pid"] for folder in folders]
    assert owners == [process.pid for process in processes]
    ended(processes)


def test_a_named_folder_has_one_owner_and_others_are_told_whether_it_lives(tmp_path):
    folder = tmp_path / "x"
    processes = claimants(4, "named", folder)
    said = answers(processes)
    (owner,) = (
        process for process, words in zip(processes, said, strict=True) if words == str(folder)
    )
    before = sorted(folder.iterdir())
    for words in said:
        if words != str(folder):
            assert f"refused: {folder} was taken by " in words
    with pytest.raises(
        FolderTakenError, match=rf"process {owner.pid} on .* is still running; choose"
    ):
        claim(folder)
    owner.process.kill()
    ended(processes)
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
    (process,) = processes = claimants(1, "named", tmp_path / "x")
    answers(processes)

    def fail(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", fail)
    with pytest.raises(FolderTakenError, match=f"process {process.pid} .* may still be running"):
        claim(tmp_path / "x")
    claim(tmp_path / "y")
    ended(processes)


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
