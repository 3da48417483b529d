"""Searches: they repeat, go on after a kill as if there had been none, prune where they must."""

import io
import json
import os
import shlex
import signal
import statistics

import pytest
from rich.console import Console

from experiments import extras
from experiments.record import METRICS, OWNER, Record
from experiments.search import main
from tests.experiments.processes import SERVER, wait_for
from tests.experiments.small_studies import study_of

SMALL = [
    "horizons=[8]",
    "model.hidden_size=8",
    "training.steps=50",
    "training.batch_size=8",
    "evaluation.every=10",
    "evaluation.train_size=8",
    "probe=[]",
    "search.n_trials=6",
    "search.startup_trials=2",
]
RATES = "search.space={optimizer.learning_rate: {low: 1e-5, high: 0.3, log: true}}"
pytestmark = pytest.mark.skipif(
    extras.find_spec("optuna") is None, reason='needs pip install -e ".[search]"'
)


def _arguments(root, *others):
    return [*SMALL, RATES, f"output.root={root}", *others]


def _search(root, *others):
    """Search; return what ``search.json`` holds, the folder, and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    main(_arguments(root, *others), console)
    (file,) = root.glob("runs/searches/*/search.json")
    return json.loads(file.read_text()), file.parent, console.file.getvalue()


def _start(root, *others):
    """Search in another process."""
    process = SERVER.Process(target=main, args=(_arguments(root, *others),))
    process.start()
    return process


def _intermediate(folder):
    import optuna

    storage = f"sqlite:///{folder}/trials.sqlite"
    (name,) = optuna.get_all_study_names(storage)
    return [
        t.intermediate_values for t in optuna.load_study(study_name=name, storage=storage).trials
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return _search(tmp_path_factory.mktemp("whole"))


def test_a_killed_search_goes_on_to_the_same_end_with_more_trials(whole, tmp_path):
    process = _start(tmp_path, "checkpoint_seconds=1e-9", "search.n_trials=3")
    # In the third run, whenever that is.
    wait_for(lambda: len(list(tmp_path.glob(f"runs/records/*/{METRICS}"))) == 3)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    values, folder, _ = _search(tmp_path)
    assert list(folder.parent.iterdir()) == [folder]
    assert values["trials"] == whole[0]["trials"]
    assert _intermediate(folder) == _intermediate(whole[1])
    for trial in values["trials"]:
        if trial["state"] == "complete":
            (run,) = trial["runs"]
            records = [each.parents[1] / "records" / run for each in (folder, whole[1])]
            assert Record.load(records[0]).result == Record.load(records[1]).result


def test_what_is_drawn_depends_on_the_seed(whole, tmp_path):
    values, _, _ = _search(tmp_path, "search.seed=1", "search.n_trials=1", "training.steps=1")
    assert values["trials"][0]["params"] != whole[0]["trials"][0]["params"]


def test_it_prunes_what_is_worse_than_the_median_and_nothing_else(whole):
    """A pruned run leaves a checkpoint and no record."""
    values, folder, _ = whole
    complete = []
    for number, (trial, reported) in enumerate(
        zip(values["trials"], _intermediate(folder), strict=True)
    ):
        pruned_at = None
        for step in sorted(reported):
            best = min(value for at, value in reported.items() if at <= step)
            others = [values[step] for values in complete]
            if number >= 2 and len(complete) >= 2 and best > statistics.median(others):
                pruned_at = step
                break
        assert (trial["state"] == "pruned") == (pruned_at is not None), number
        assert max(reported) == (40 if pruned_at is None else pruned_at)  # none at the end, 50
        if trial["state"] == "complete":
            complete.append(reported)
        (run,) = trial["runs"]
        records = folder.parents[1] / "records" / run
        assert (records / "record.json").exists() == (trial["state"] == "complete")
        assert (records / "checkpoint.pt").exists()
    assert {"pruned", "complete"} == {trial["state"] for trial in values["trials"]}


def test_the_command_of_the_best_trial_composes_its_run(whole):
    values, _, printed = whole
    best = values["best"]
    complete = [trial for trial in values["trials"] if trial["state"] == "complete"]
    assert best["value"] == min(trial["value"] for trial in complete)
    assert best["command"] in printed
    words = shlex.split(best["command"])
    assert words[:3] == ["python", "-m", "experiments.run"]
    assert [member.folder.name for member in study_of(*words[3:]).members] == best["runs"]


def test_processes_share_a_search(tmp_path):
    storage = "search.storage=journal"
    process = _start(tmp_path, storage)
    wait_for(lambda: list(tmp_path.glob(f"runs/records/*/{METRICS}")))
    _search(tmp_path, storage)
    process.join()
    assert process.exitcode == 0
    trials = _search(tmp_path, storage)[0]["trials"]
    assert [trial["number"] for trial in trials] == list(range(6))
    assert {trial["state"] for trial in trials} <= {"complete", "pruned"}
    assert len({trial["params"]["optimizer.learning_rate"] for trial in trials}) == 6
    owners = [tmp_path / "runs" / "records" / trial["runs"][0] / OWNER for trial in trials]
    pids = {json.loads(owner.read_text())["pid"] for owner in owners}
    assert pids == {process.pid, os.getpid()}


def test_a_trial_that_no_run_can_be_made_of_fails_with_its_reason(tmp_path):
    values, _, printed = _search(
        tmp_path,
        "search.space={model: [gru, fused_rnn], model.nonlinearity: [relu, tanh]}",
        "training.steps=2",
        "search.pruner=none",
        "search.sampler=random",
        "search.n_trials=3",
    )
    by_model = {trial["params"]["model"]: trial for trial in values["trials"]}
    assert by_model["gru"]["state"] == "fail"
    assert "model.nonlinearity" in by_model["gru"]["reason"]
    assert f"failed: {by_model['gru']['reason']}" in printed
    assert by_model["fused_rnn"]["state"] == "complete"


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["search.space={optimizer.lr: [1, 2]}"], "unknown key optimizer.lr"),
        (["search.space={model: [fused_rnn, grru]}"], "did you mean gru"),
        (["search.space={seeds: 3}"], "must be a list of values, or have low and high; got 3"),
        (["search.space=null"], "search.space must name a key and its values; got none"),
        (["search.trials=3"], "unknown key search.trials"),
        (["optimizer.learning_rate=1"], "is searched; it cannot be given too"),
        (["evaluation.every=null"], "search.pruner needs evaluation.every"),
        (["+arms={a: ['model=rnn'], b: ['model=gru']}"], "needs a study of one model"),
        (["launcher=slurm"], "makes its runs in its own process|needs submitit"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(tmp_path, others, message):
    with pytest.raises(SystemExit, match=message):
        _search(tmp_path, *others)
    assert not (tmp_path / "runs").exists()


def test_without_optuna_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r'needs optuna.*pip install -e "\.\[search\]"'):
        _search(tmp_path)
