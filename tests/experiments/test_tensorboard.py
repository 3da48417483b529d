"""TensorBoard: every scalar of a run's log, once, whatever ended the run in between."""

import json
import shutil
import sys

import pytest

from experiments import extras
from experiments.config import RunConfig
from experiments.execution import Job, make
from experiments.record import METRICS, read_metrics
from experiments.tensorboard import EVENTS, convert, main

RUN = {
    "model": {"core": "fused_rnn", "hidden_size": 8},
    "task": {"name": "adding"},
    "probe": {"adjoint": {"every": 60}},
    "training": {"steps": 200, "batch_size": 8},
    "evaluation": {"every": 50, "probe_size": 4, "train_size": 8},
    "horizon": 8,
}
pytestmark = pytest.mark.skipif(
    extras.find_spec("tensorboard") is None, reason='needs pip install -e ".[tensorboard]"'
)


def _job(folder, tensorboard=True, **changes):
    run = RunConfig.parse({**RUN, **changes})
    return Job(run.plain(), "RNN", folder / run.folder_name, 30.0, tensorboard)


def _make(job, stop_at=None):
    steps = []
    is_asked = (lambda: bool(steps) and steps[-1] >= stop_at) if stop_at else (lambda: False)
    return make(job, lambda step, loss: steps.append(step), is_asked)


def _events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / EVENTS), size_guidance={"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def _assert_equal(folder):
    """Every scalar of the log is an event, once and in its place."""
    expected = {}
    for row in read_metrics(folder):
        prefix = f"{row['probe']}/" if "probe" in row else ""
        for name, value in row.items():
            if isinstance(value, float) or value is None:
                expected.setdefault(prefix + name, []).append((row["step"], value))
    events = _events(folder)
    assert list(events) == list(expected)
    for name, points in expected.items():
        for found, wanted in zip(
            zip(*events[name], strict=True), zip(*points, strict=True), strict=True
        ):
            assert found == pytest.approx(wanted, rel=1e-6), name


def test_a_run_writes_every_scalar_of_its_log_and_is_the_run_without_it(tmp_path, monkeypatch):
    job, plain = _job(tmp_path / "a"), _job(tmp_path / "b", tensorboard=False)
    assert _make(job).state == "done"
    with monkeypatch.context() as patch:  # nothing is loaded that may not be installed
        patch.setitem(sys.modules, "tensorboard", None)
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert _make(plain).state == "done"
    assert job.folder.name == plain.folder.name
    assert (job.folder / METRICS).read_bytes() == (plain.folder / METRICS).read_bytes()
    _assert_equal(job.folder)
    events = _events(job.folder)
    assert [step for step, _ in events["loss"]] == list(range(1, 201))
    assert [step for step, _ in events["test_error"]] == [50, 100, 150, 200]
    assert [step for step, _ in events["adjoint/log10_ratio"]] == [0, 60, 120, 180, 200]


def test_a_resumed_run_has_every_point_once(tmp_path):
    job = _job(tmp_path)
    assert _make(job, stop_at=100).state == "interrupted"
    at_checkpoint = shutil.copytree(job.folder, tmp_path / "copy")
    # A process that went on from there, and died after its checkpoint: more events and more log.
    assert _make(job, stop_at=150).state == "interrupted"
    shutil.copy(at_checkpoint / "checkpoint.pt", job.folder)
    assert _make(job).state == "done"
    _assert_equal(job.folder)


def test_a_run_that_began_without_tensorboard_has_its_first_points_too(tmp_path):
    job = _job(tmp_path, tensorboard=False)
    _make(job, stop_at=100)
    assert not (job.folder / EVENTS).exists()
    _make(_job(tmp_path))
    _assert_equal(job.folder)


def test_records_are_converted_afterwards(tmp_path, capsys):
    job, other = _job(tmp_path, tensorboard=False), _job(tmp_path, tensorboard=False, seed=1)
    _make(job)
    _make(other, stop_at=50)
    main([str(tmp_path)])
    main([str(tmp_path)])
    assert capsys.readouterr().out.startswith("2 runs")
    _assert_equal(job.folder)
    _assert_equal(other.folder)


def test_a_number_that_was_not_finite_is_shown_as_nan(tmp_path):
    (tmp_path / METRICS).write_text(json.dumps({"step": 1, "loss": None}) + "\n")
    convert(tmp_path)
    ((step, value),) = _events(tmp_path)["loss"]
    assert step == 1
    assert value != value


def test_a_damaged_log_is_named_and_the_others_are_converted(tmp_path, capsys):
    for name, line in (("a", b"\xff\n"), ("b", b'{"step": 1, "loss": 2.0}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / METRICS).write_bytes(line)
    with pytest.raises(SystemExit, match=r"a/metrics\.jsonl: line 1 is damaged"):
        main([str(tmp_path)])
    assert "1 runs" in capsys.readouterr().out
    assert _events(tmp_path / "b")["loss"] == [(1, 2.0)]


def test_without_the_package_nothing_is_converted(monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r'needs tensorboard.*pip install -e "\.\[tensorboard\]"'):
        main([str(tmp_path)])
