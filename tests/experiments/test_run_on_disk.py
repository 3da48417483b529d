"""What a run leaves, whose its folder is, and what becomes of a full disk and damaged files."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from experiments import checkpoint, interrupts, record
from experiments.checkpoint import CheckpointError
from experiments.config import RunConfig
from experiments.evaluation import evaluate
from experiments.record import MetricsLog, Record, RecordError, RunTakenError, is_owned, owned
from experiments.tasks.adding import AddingTask
from experiments.train import Interrupted, load_run, train
from tests.experiments.processes import OFTEN, assert_same, forked, make, outcome, small

STEPS = 11
VALUES = small(training={"steps": STEPS})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run that nothing has stopped; do not change it."""
    return make(VALUES, tmp_path_factory.mktemp("whole"))


@contextmanager
def refused(folder, error, message):
    """Refuse to go on with a run, and change none of its files."""
    before = contents(folder)
    with pytest.raises(error, match=message):
        yield
    assert contents(folder) == before


@pytest.fixture
def half(tmp_path):
    """Return the folder of a run that was interrupted after five steps, two checkpoints in it."""
    asked = iter([False] * 5)
    with pytest.raises(Interrupted):
        make(VALUES, tmp_path, is_asked_to_end=lambda: next(asked, True), **OFTEN)
    return tmp_path / RunConfig.parse(VALUES).folder_name


def resumed(folder):
    """Make the rest of a run."""
    return outcome(make(VALUES, folder.parent))


def contents(folder):
    """Return every file of a folder but that of its owner."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "owner.json"}


# ---- what is there at the end


def test_each_step_is_logged_once_and_the_trained_model_can_be_loaded(whole):
    rows = record.read_metrics(whole)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    run, model = load_run(whole)
    test = run.task.test_set(run.horizon, torch.Generator().manual_seed(run.evaluation.seed))
    assert evaluate(model, run, test) == Record.load(whole).result.test_error


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer": {"name": "sgd", "learning_rate": 1e30}},  # the error alone overflows
        {"optimizer": {"name": "sgd", "learning_rate": 1e200}},
        {  # weights overflow, and an accuracy is finite all the same
            "task": {"name": "latch", "test_size": 20},
            "optimizer": {"name": "sgd", "learning_rate": 1e200},
        },
    ],
)
def test_a_run_whose_last_update_diverges_ends_as_one_that_diverged_before(tmp_path, values):
    folder = make(small(training={"steps": 1}, probe={"adjoint": {}}, **values), tmp_path)
    done = Record.load(folder)
    assert done.status == done.result.verdict == "diverged"
    assert done.reason == "after step 1 the weights or the test error are not finite"
    assert done.result.test_error is None
    assert done.probes["adjoint"]["trained"] is None


def test_there_is_no_look_at_weights_that_are_not_finite(tmp_path, monkeypatch):
    seen = []

    def looks(task, model, *_):
        seen.append(all(p.isfinite().all() for p in model.parameters()))
        return []

    monkeypatch.setattr(AddingTask, "looks", looks)
    optimizer = {"name": "sgd", "learning_rate": 1e200}
    make(small(training={"steps": 3}, optimizer=optimizer, evaluation={"every": 1}), tmp_path)
    assert seen == [True]


def test_a_folder_without_a_checkpoint_has_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_run(tmp_path)


def test_a_run_that_has_ended_is_shown_and_nothing_is_opened_for_writing(whole, monkeypatch):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened for writing"))
    assert train(RunConfig.parse(VALUES), whole) == Record.load(whole)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_a_folder_of_another_name_is_refused(tmp_path):
    run = RunConfig.parse(VALUES)
    with pytest.raises(ValueError, match=f"identity, {run.identity}; got .*elsewhere"):
        train(run, tmp_path / "elsewhere")


# ---- a full disk


class FullDisk:
    """A disk on which the n-th write of the log or of another file fails, having written half."""

    def __init__(self, monkeypatch, at):
        self.left = at
        log, fsync = MetricsLog.write, os.fsync

        def full_log(metrics, rows):
            if self._is_full():
                os.write(metrics._file.fileno(), b'{"step": 7')
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(metrics._path))
            log(metrics, rows)

        def full_fsync(file):
            if self._is_full():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(file)

        monkeypatch.setattr(MetricsLog, "write", full_log)
        monkeypatch.setattr(os, "fsync", full_fsync)

    def _is_full(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("at", range(0, 40, 3))
def test_a_run_stopped_by_a_full_disk_goes_on_when_there_is_space(whole, tmp_path, monkeypatch, at):
    with monkeypatch.context() as patch:
        FullDisk(patch, at)
        with pytest.raises(OSError, match="No space left on device"):
            make(VALUES, tmp_path, **OFTEN)
    folder = tmp_path / whole.name
    assert not list(folder.glob(".*"))
    assert_same(resumed(folder), outcome(whole))


def limited(root, size, _):
    """Make a run in a process whose files have a greatest size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        make(VALUES, root, **OFTEN)
    except OSError as error:
        os._exit(7 if str(error.filename).startswith(str(root)) else 8)


@pytest.mark.parametrize("size", [50, 300, 3000])  # in the owner's file, in the log, a checkpoint
def test_the_system_s_own_refusal_names_the_file_and_harms_nothing(whole, half, size):
    process, _ = forked(limited, half.parent, size)
    process.join()
    assert process.exitcode == 7
    assert_same(resumed(half), outcome(whole))


# ---- damaged checkpoints

DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a flipped bit": lambda content: content[:-99] + bytes([content[-99] ^ 4]) + content[-98:],
    "not a checkpoint": lambda content: b"PK" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, half, capsys, damage):
    path = half / checkpoint.CHECKPOINT
    path.write_bytes(damage(path.read_bytes()))
    assert_same(resumed(half), outcome(whole))
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1
    assert str(path) in notice
    assert f"going on from {checkpoint.PREVIOUS}" in notice


def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(half):
    whole_one = (half / checkpoint.PREVIOUS).read_bytes()
    (half / checkpoint.CHECKPOINT).write_bytes(b"damaged")
    checkpoint.save(half, {"step": 6})
    assert (half / checkpoint.PREVIOUS).read_bytes() == whole_one
    assert checkpoint.load(half)["step"] == 6


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_run_none_of_whose_checkpoints_can_be_read_is_not_begun_again(half, damage):
    for name in (checkpoint.CHECKPOINT, checkpoint.PREVIOUS):
        (half / name).write_bytes(damage((half / name).read_bytes()))
    with refused(half, CheckpointError, r"no checkpoint can be read.*delete"):
        resumed(half)


def test_a_checkpoint_of_another_version_model_or_run_is_refused(half, monkeypatch):
    other = small(training={"steps": STEPS}, seed=7)
    folder = half.parent / RunConfig.parse(other).folder_name
    shutil.copytree(half, folder)
    for goes_on in (lambda: make(other, half.parent), lambda: load_run(folder)):
        with refused(folder, CheckpointError, "that of another run"):
            goes_on()
    with monkeypatch.context() as patch, refused(half, CheckpointError, "version 1, .* reads 2"):
        patch.setattr(checkpoint, "VERSION", 2)
        resumed(half)
    state = checkpoint.load(half)
    del state["model"]["readout.bias"]
    checkpoint.save(half, state)
    for goes_on in (resumed, load_run):
        with refused(half, CheckpointError, r"does not fit this program.*readout\.bias"):
            goes_on(half)


# ---- a damaged log, record or configuration


def test_a_log_with_a_half_written_last_line_goes_on(whole, half):
    with (half / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "lo')
    assert record.read_metrics(half)[-1]["step"] == 4
    assert_same(resumed(half), outcome(whole))


@pytest.mark.parametrize("keep", [0, 100])
def test_a_log_older_than_its_checkpoint_is_refused(half, keep):
    os.truncate(half / "metrics.jsonl", keep)
    with refused(half, RecordError, r"metrics\.jsonl is not the log.*delete the folder"):
        resumed(half)


@pytest.mark.parametrize("garbage", [b"\x00\xff", b"3\n", b"\n\n"])
def test_a_log_that_is_damaged_inside_is_refused(half, garbage):
    path = half / "metrics.jsonl"
    path.write_bytes(garbage + path.read_bytes()[len(garbage) :])
    with refused(half, RecordError, r"metrics\.jsonl is not the log.*line 1 is damaged"):
        resumed(half)


def test_a_configuration_that_is_damaged_or_another_run_s_is_written_again(whole, half):
    for text in ("", (whole / "config.json").read_text().replace('"seed": 0', '"seed": 5')):
        (half / "config.json").write_text(text)
        resumed(half)
        assert (half / "config.json").read_bytes() == (whole / "config.json").read_bytes()
        (half / "record.json").unlink()


RECORDS = {
    "truncated": (lambda text: text[:200], "damaged"),
    "empty": (lambda text: "", "damaged"),
    "a list": (lambda text: "[]", "version None"),
    "another version": (lambda text: text.replace('"version": 1', '"version": 9'), "version 9"),
    "without result": (lambda text: text.replace('"result"', '"resolt"'), "record.resolt"),
    "an unknown status": (lambda text: text.replace('"finished"', '"fine"'), "record.status"),
    "a number for identity": ({"identity": 3}, "ident"),
    "an empty result": ({"result": {}}, "record.result"),
    "a number for a probe": ({"probes": {"adjoint": {"trained": 3}}}, "probes.adjoint.trained"),
    "of another run": ({"identity": "0" * 16}, "record of another run, 0000000000000000"),
}


@pytest.mark.parametrize(("change", "reason"), RECORDS.values(), ids=RECORDS)
def test_a_record_that_cannot_be_read_is_an_error_and_stays(whole, tmp_path, change, reason):
    folder = shutil.copytree(whole, tmp_path / whole.name)
    path = folder / "record.json"
    text = path.read_text()
    path.write_text(change(text) if callable(change) else json.dumps(json.loads(text) | change))
    with refused(folder, RecordError, reason):
        make(VALUES, tmp_path)


# ---- whose the folder is


def hold(folder, ready):
    """Own a folder until killed."""
    with owned(folder):
        ready.send(os.getpid())
        time.sleep(60)


@pytest.fixture
def owner(half):
    """Start another process that owns the folder; return its id."""
    process, pipe = forked(hold, half)
    yield pipe.recv()
    process.kill()
    process.join()


def test_a_live_run_is_not_taken_and_a_dead_one_s_is(whole, half, owner):
    assert is_owned(half)
    message = rf"process {owner} on {os.uname().nodename}, started 2"
    with refused(half, RunTakenError, message):
        resumed(half)
    (half / f".checkpoint.pt.{owner}.unfinished").write_bytes(b"half")
    os.kill(owner, signal.SIGKILL)
    assert_same(resumed(half), outcome(whole))
    assert not list(half.glob(".*"))
    assert not is_owned(half)


def test_an_owner_on_another_host_is_named(half, owner):
    (half / "owner.json").write_text(
        json.dumps({"pid": 17, "host": "node7", "started": "2026-01-01T00:00:00+00:00"})
    )
    with pytest.raises(RunTakenError, match="process 17 on node7, started 2026-01-01"):
        resumed(half)


def test_who_only_looks_does_not_keep_an_owner_out(half):
    """`is_owned` holds a lock for a moment; an owner that comes just then waits for it."""
    with (half / "owner.json").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        descriptor = os.dup(file.fileno())
    timer = threading.Timer(0.1, os.close, [descriptor])
    timer.start()
    resumed(half)
    timer.join()


def test_a_file_system_without_locks_is_refused(half, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match=r"has no locks .*No locks available.*output\.root"):
        resumed(half)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_named(half):
    for path in (*half.iterdir(), half):
        path.chmod(0o555 if path == half else 0o444)
    with pytest.raises(PermissionError, match=half.name):
        resumed(half)


# ---- signals


def end_at(folder, number, results):
    """Make a run that sends itself a signal at its first progress; send what became of it."""

    def signal_itself(*_):
        os.kill(os.getpid(), number)

    options = {"on_progress": signal_itself, "checkpoint_seconds": 1e9}
    with interrupts.noticed() as is_asked, pytest.raises(Interrupted):
        make(VALUES, folder.parent, is_asked_to_end=is_asked, **options)
    results.send(checkpoint.load(folder)["step"])


@pytest.mark.parametrize("number", interrupts.SIGNALS, ids=lambda number: number.name)
def test_a_signal_saves_and_ends_the_run(whole, tmp_path, number):
    folder = tmp_path / whole.name
    process, pipe = forked(end_at, folder, number)
    process.join()
    assert pipe.recv() == 4
    assert_same(resumed(folder), outcome(whole))


def test_a_second_ctrl_c_ends_at_once_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    with interrupts.noticed() as is_asked:
        assert not is_asked()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert is_asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


def test_a_ctrl_c_in_a_destructor_is_noticed():
    class Unlucky:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    with interrupts.noticed() as is_asked:
        del [Unlucky()][0]
        assert is_asked()
