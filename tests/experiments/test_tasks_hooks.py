"""What a task can add to a run: its own judgement, baselines, looks, and a use for the model."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from experiments import figures, report, tasks, use, view
from experiments.config import RunConfig
from experiments.evaluation import HeldOut, evaluate, verdict
from experiments.fields import ConfigError
from experiments.looks import Animation, Drawing, Picture, Text, save_looks, saved_looks
from experiments.models import CORES, TORCHS
from experiments.record import Record
from experiments.tasks._frames import streamed
from experiments.tasks._task import MASKED_NUMBERS
from experiments.tasks.adding import AddingTask
from experiments.train import load_run
from tests.experiments.processes import assert_same
from tests.experiments.scenario_checks import run_of as scenario_run
from tests.experiments.scenario_checks import trained

ADDING = {"name": "adding", "test_size": 20}
VALUES = {
    "model": {"core": "fused_rnn", "hidden_size": 4},
    "task": ADDING,
    "horizon": 6,
    "training": {"steps": 4, "batch_size": 3},
    "evaluation": {"every": 2},
    "optimizer": {"name": "adam"},
}


@pytest.fixture
def scenario(monkeypatch):
    """The adding task with everything a scenario has."""

    def looks(self, model, horizon, generator):
        number = torch.rand((), generator=generator).item()
        return [Text("weights", f"<b> {model.readout.weight.sum().item()} {number}")]

    def add_arguments(self, parser):
        parser.add_argument("--number", type=int, required=True)

    def use(self, model, arguments, horizon):
        if arguments.number < 0:
            raise ConfigError(f"--number must be at least 0; got {arguments.number}")
        print(arguments.number, horizon, model.training)

    def judge(self, model, x_TBI, target):
        return model(x_TBI).abs().mean()

    def baselines(self, x_TBI, target, horizon):
        return {"half": ((target - 0.5) ** 2).mean().item()}

    def measures(self, model, x_TBI, target, horizon):
        assert not torch.is_grad_enabled()
        return {"largest, in units": float(model(x_TBI).max())}

    for function in (looks, add_arguments, use, judge, baselines, measures):
        monkeypatch.setattr(AddingTask, function.__name__, function)


@pytest.fixture
def finished(scenario, tmp_path):
    folder = trained(RunConfig.parse(VALUES), tmp_path)
    return folder, Record.load(folder)


def test_a_task_judges_models_itself_and_its_record_holds_what_it_measures(finished):
    folder, record = finished
    run, model = load_run(folder)
    x_TBI, target = HeldOut(run).test
    with torch.no_grad():
        prediction = model(x_TBI)
    assert record.result.test_error == pytest.approx(prediction.abs().mean().item(), rel=1e-6)
    assert record.result.measures == {"largest, in units": pytest.approx(prediction.max().item())}
    assert record.result.baselines == {"half": pytest.approx(((target - 0.5) ** 2).mean().item())}
    assert Record.load(folder).result == record.result


@pytest.mark.parametrize(
    ("share", "baselines", "expected"),
    [
        (0.09, (), "solved"),
        (0.24, (), "learned"),
        (0.26, (), "failed"),
        (0.6, (0.7, 0.8), "learned"),
        (0.7, (0.7, 0.8), "failed"),
        (0.09, (0.05,), "failed"),
        (1.1, (1.5,), "failed"),
        (0.93, (1.04,), "failed"),  # chance
    ],
)
def test_where_there_are_baselines_what_is_learned_beats_them(share, baselines, expected):
    assert verdict(share, *baselines) == expected


def test_looks_are_made_on_the_way_and_change_no_number(finished, monkeypatch, tmp_path):
    folder, record = finished
    files = saved_looks(folder)["weights"]
    assert list(files) == [0, 2, 4]
    texts = [path.read_text() for path in files.values()]
    assert len(set(texts)) == 3
    _, model = load_run(folder)
    assert str(model.readout.weight.sum().item()) in texts[-1]
    monkeypatch.setattr(AddingTask, "looks", lambda *_: [])
    without = trained(RunConfig.parse(VALUES), tmp_path / "without")
    assert Record.load(without).result == record.result
    assert not saved_looks(without)
    assert (without / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_a_report_and_its_figures_show_baselines_measures_and_looks(finished, tmp_path):
    folder, record = finished
    path, _ = report.write([folder])
    page = path.read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert f"half {record.result.baselines['half']:.3g}" in page
    assert "largest, in units" in page
    assert "below that of half" in page
    markdown, _ = report.write([folder], tmp_path / "page.md")
    assert "    <b> " in markdown.read_text(encoding="utf-8")
    seen = view.View("x", "", "", [view.entry_of(folder)])
    (drawn,) = figures.drawn(seen, ["quality"])
    words = [text.get_text() for text in drawn.figure.axes[0].get_legend().get_texts()]
    assert words == ["fused_rnn", "half", "knowing nothing"]


LOOKS = [
    Text("text", "é\n"),
    Picture("picture", np.arange(12, dtype=np.uint8).reshape(3, 4)),
    Animation("video", np.random.default_rng(0).integers(0, 255, (5, 6, 7, 3), dtype=np.uint8), 70),
    Drawing("drawing", Figure()),
]


def test_every_kind_of_look_is_a_file_that_holds_it(tmp_path):
    save_looks(LOOKS, tmp_path, 12)
    found = saved_looks(tmp_path)
    names = {path.name for files in found.values() for path in files.values()}
    assert names == {
        f"000012_{name}" for name in ("text.txt", "picture.png", "video.gif", "drawing.svg")
    }
    with Image.open(found["video"][12]) as video:
        assert (video.n_frames, video.size, video.info["duration"]) == (5, (7, 6), 70)
    with Image.open(found["picture"][12]) as picture:
        assert (np.asarray(picture) == LOOKS[1].pixels).all()


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.suffix)
def test_a_look_that_is_half_written_is_none(look, tmp_path, monkeypatch):
    save_looks([look], tmp_path, 1)
    (before,) = saved_looks(tmp_path)[look.name].values()
    content, save = before.read_bytes(), type(look).save

    def cut_off(self, path):
        save(self, path)
        os.truncate(path, path.stat().st_size // 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(look), "save", cut_off)
        with pytest.raises(KeyboardInterrupt):
            save_looks([look], tmp_path, 1)
    assert before.read_bytes() == content
    save_looks([look], tmp_path, 1)
    assert list((tmp_path / "looks").iterdir()) == [before]


def test_a_trained_model_is_used_by_its_folder_or_that_of_its_study(finished, capsys, monkeypatch):
    folder, _ = finished
    for here, word in ((".", folder), (".", folder.parent), (folder, "."), (folder.parent, ".")):
        monkeypatch.chdir(here)
        assert use.main([str(word), "--number", "3"]) == 0
        assert capsys.readouterr().out == "3 6 False\n"
    assert use.main([folder.name, "--number", "-1"]) == 1
    assert capsys.readouterr().err == "error: --number must be at least 0; got -1\n"
    with pytest.raises(SystemExit):
        use.main([str(folder), "--help"])
    assert capsys.readouterr().out.startswith(
        "usage: python -m experiments.use RUN [-h] --number NUMBER\n"
    )


def test_what_cannot_be_used_is_said(tmp_path, capsys):
    def fault(folder):
        assert use.main([str(folder)]) == 1
        return capsys.readouterr().err

    (tmp_path / "y").touch()
    for name, words in (
        ("x", "{} is missing"),
        ("y", "{} is not a folder"),
        ("", "no records in {}"),
    ):
        said = f"RUN must be a run's folder, or a study's: {words.format(tmp_path / name)}"
        assert fault(tmp_path / name) == f"error: {said}\n"
    folder = trained(RunConfig.parse({**VALUES, "evaluation": {}}), tmp_path)
    assert "task adding" in fault(folder)
    (folder / "config.json").write_text("{")
    (folder / "record.json").unlink()
    assert f"{folder}: no run that can be read" in fault(folder)
    (folder / "checkpoint.pt").unlink()
    assert f"RUN must have a run that was trained; {folder} has none" in fault(folder)


def test_a_model_whose_task_has_other_data_now_is_not_used(tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text("a cat sat on a mat. " * 40)
    folder = trained(scenario_run({"name": "text", "file": str(book)}, 6), tmp_path)
    book.write_text("a mat sat on a cat. " * 40)  # the same alphabet
    tasks._built.cache_clear()  # as a new process does
    assert use.main([str(folder)]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{folder} cannot be used: the data of task text has changed" in error
    assert str(book) in error


@pytest.mark.parametrize("core", sorted(CORES))
def test_a_stream_has_the_states_of_the_whole_sequence(core):
    model = scenario_run(ADDING, 6, model={"core": core, "num_layers": 2}).build_model()
    x_TBI = torch.randn(11, 3, 2)
    with torch.no_grad():
        output, last = model.core(x_TBI)
        whole = model.readout(output)
    pieces, state = [], None
    for piece in x_TBI.split([1, 1, 4, 1, 3, 1]):
        prediction, state = model.stream(piece, state)
        assert not prediction.requires_grad
        pieces.append(prediction)
    torch.testing.assert_close(torch.cat(pieces), whole)
    torch.testing.assert_close(state, last)
    torch.testing.assert_close(streamed(model, x_TBI), whole)
    if core in TORCHS:  # a CPU's states do not depend on how a sequence is cut
        assert_same(state, last)


def test_a_bidirectional_model_does_not_stream_and_must_not_see_answers_among_inputs():
    both_ways = {"bidirectional": True}
    with pytest.raises(ValueError, match="bidirectional must be false to stream"):
        scenario_run(ADDING, 6, model=both_ways).build_model().stream(torch.zeros(1, 1, 2))
    for options in (
        {"name": "text"},
        {"name": "translation", "source": "dates"},
        {"name": "tracking"},
    ):
        message = rf"^model\.bidirectional must be false for task .*{options['name']}"
        with pytest.raises(ConfigError, match=message):
            scenario_run(options, 25, model=both_ways)


def test_masked_numbers_that_are_nan_do_not_count():
    target = torch.tensor([[1.0, float("nan")], [3.0, 4.0]])
    prediction = torch.tensor([[2.0, 7.0], [3.0, 2.0]], requires_grad=True)
    loss = MASKED_NUMBERS.loss(prediction, target)
    assert loss.item() == pytest.approx(5 / 3)
    loss.backward()
    assert prediction.grad.tolist() == [[pytest.approx(2 / 3), 0], [0, pytest.approx(-4 / 3)]]
    assert int(MASKED_NUMBERS.scored(target)) == 3


def test_a_run_is_evaluated_a_piece_at_a_time_by_its_judge(scenario, monkeypatch):
    run = RunConfig.parse(VALUES)
    model, test = run.build_model(), HeldOut(run).test
    whole = evaluate(model, run, test)
    monkeypatch.setattr("experiments.evaluation.EVALUATION_NUMBERS", 6 * 4 * 7)
    assert evaluate(model, run, test) == pytest.approx(whole, rel=1e-6)


def test_a_reader_of_what_is_printed_may_end_first(finished, monkeypatch, capsys):
    folder, _ = finished
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert use.main([str(folder), "--number", "3"]) == 0
    assert capsys.readouterr().err == ""
