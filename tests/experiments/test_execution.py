"""Runs of a study: the same bits from any number of processes, and nothing stops the others."""

from __future__ import annotations

import json
import os
import signal
from multiprocessing import forkserver

import pytest

from experiments import execution
from experiments.execution import execute
from experiments.record import OWNER, RECORD, owned
from experiments.tasks.adding import AddingTask
from tests.experiments import processes
from tests.experiments.small_studies import tiny

pytestmark = pytest.mark.usefixtures("one_thread", "forked")
PAIR = ("horizons=[10,12]", "contrast_horizons=[]")


@pytest.fixture
def forked(monkeypatch):
    """Fork workers from the server that has torch loaded; test_run.py has some that are spawned."""
    # Before a pool holds signals back: a server that is started then never gets any.
    forkserver.ensure_running()
    monkeypatch.setattr(execution.multiprocessing, "get_context", lambda _: processes.SERVER)


class Watch:
    """Executes a study; keeps what it was told, and does something at progress."""

    def __init__(self, study, at_progress=lambda member: None, is_asked_to_end=lambda: False):
        self.outcomes = {}
        self.times_told = 0

        def on_outcome(member, outcome):
            self.times_told += 1
            self.outcomes[member.run.horizon] = outcome

        execute(study, is_asked_to_end, lambda member, *_: at_progress(member), on_outcome)

    def states(self):
        return {horizon: outcome.state for horizon, outcome in self.outcomes.items()}


def assert_same(ours, theirs):
    for each, other in zip(ours.members, theirs.members, strict=True):
        processes.assert_same(processes.outcome(each.folder), processes.outcome(other.folder))


def fail_at(horizon, monkeypatch):
    sample = AddingTask.sample

    def failing(self, batch_size, T, generator):
        if horizon == T:
            raise ValueError("no [data]")
        return sample(self, batch_size, T, generator)

    monkeypatch.setattr(AddingTask, "sample", failing)


def test_a_run_that_fails_is_recorded_with_its_reason_and_stops_nothing(tmp_path, monkeypatch):
    study = tiny(tmp_path, *PAIR)
    with monkeypatch.context() as patch:
        fail_at(12, patch)
        first = Watch(study)
    assert first.states() == {12: "failed", 10: "done"}
    assert first.outcomes[12].reason == "ValueError: no [data]"
    record = study.members[1].record()
    assert (record.status, record.reason) == ("failed", "ValueError: no [data]")
    assert "in failing" in record.provenance["traceback"]
    # It is told again and not made again, until that is asked for.
    again = Watch(study)
    assert again.outcomes[12].reason == "ValueError: no [data] (retry=true makes it again)"
    assert again.times_told == 1
    assert Watch(tiny(tmp_path, *PAIR, "retry=true")).states() == {12: "done"}
    untouched = tiny(tmp_path / "other", *PAIR)
    Watch(untouched)
    assert_same(study, untouched)


def test_what_a_disk_or_a_file_is_to_blame_for_is_no_record(tmp_path, monkeypatch):
    study = tiny(tmp_path, *PAIR)
    (tmp_path / "runs" / "records").mkdir(parents=True)
    study.members[1].folder.touch()  # a file where the run's folder should be
    states = Watch(study)
    assert states.states() == {12: "failed", 10: "done"}
    study.members[1].folder.unlink()
    assert Watch(study).states() == {12: "done"}
    (study.members[0].folder / RECORD).write_text("{")
    damaged = Watch(study)
    assert damaged.states() == {10: "failed"}
    assert "is damaged" in damaged.outcomes[10].reason


def test_a_run_that_another_process_works_on_is_left_to_it(tmp_path):
    study = tiny(tmp_path, *PAIR)
    with owned(study.members[0].folder):
        watch = Watch(study)
        assert watch.states() == {12: "done", 10: "elsewhere"}
        assert f"process {os.getpid()} on " in watch.outcomes[10].reason
    assert Watch(study).states() == {10: "done"}


LONG = (*PAIR, "training.steps=2000")  # longer than it takes to notice its first progress


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    study = tiny(tmp_path_factory.mktemp("long"), *LONG)
    Watch(study)
    return study


def test_a_process_that_is_killed_is_tried_alone_and_reported_and_the_others_end(
    tmp_path, undisturbed
):
    study = tiny(tmp_path, *LONG, "workers=2", "checkpoint_seconds=0.05")
    killed = set()

    def kill(member):
        """Kill whichever process makes the run at T = 12; at T = 10, the first one."""
        pid = json.loads((member.folder / OWNER).read_text())["pid"]
        if pid not in killed and member.run.horizon == 12:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)

    watch = Watch(study, kill)
    assert len(killed) == 2
    assert watch.states() == {12: "failed", 10: "done"}
    assert watch.outcomes[12].reason == "its process died (killed, or out of memory)"
    assert study.members[1].record() is None
    assert Watch(study).states() == {12: "done"}
    # From two processes and from one, killed or not: the same bits. And nothing is made twice.
    assert_same(study, undisturbed)
    assert Watch(study).times_told == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_runs_that_are_asked_to_end_are_saved_and_go_on(workers, tmp_path, undisturbed):
    study = tiny(tmp_path, *LONG, f"workers={workers}")
    seen = []
    watch = Watch(study, seen.append, lambda: bool(seen))
    assert "interrupted" in watch.states().values()
    assert not all(member.record() for member in study.members)
    Watch(tiny(tmp_path, *LONG))
    assert_same(study, undisturbed)
