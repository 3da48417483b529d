"""A run that was killed or interrupted ends with the same bits as one that was not."""

import random
import time

import pytest

from experiments.config import RunConfig
from experiments.remedies import REMEDIES
from experiments.tasks import TASKS, build_task
from experiments.train import Interrupted
from tests.experiments.processes import (
    BLOCK,
    OFTEN,
    assert_same,
    forked,
    in_process,
    killed,
    make,
    outcome,
    small,
)

PROBED = {"probe": {"adjoint": {"every": 3}}, "evaluation": {"every": 5}}

# What changes from run to run: model, optimizer and schedule, precision, how it ends.
RUNS = {
    "adam": small(**PROBED, remedy={"clipping": {"norm": 0.1}}),
    "adamw, cosine, accumulation": small(
        model={"core": "lstm", "num_layers": 2, "bidirectional": True},
        optimizer={"name": "adamw", "schedule": "cosine", "warmup": 3},
        training={"accumulation": 3},
        evaluation={"horizons": [4, 9]},
    ),
    "rmsprop, linear": small(
        model={"core": "fused_gru"},
        optimizer={"name": "rmsprop", "momentum": 0.9, "schedule": "linear"},
    ),
    "sgd, cosine": small(
        **PROBED,
        model={"core": "fused_lstm", "num_layers": 2, "bidirectional": True},
        optimizer={"name": "sgd", "momentum": 0.9, "schedule": "cosine"},
    ),
    "nesterov, step": small(
        model={"core": "leaky"},
        optimizer={"name": "sgd", "momentum": 0.9, "nesterov": True, "schedule": "step"},
        remedy={"clipping": {"value": 0.01}},
    ),
    "full batch": small(optimizer={"name": "sgd", "samples": 7}),
    "float64": small(**PROBED, model={"core": "antisymmetric"}, precision="float64"),
    "bfloat16": small(**PROBED, precision="bfloat16", model={"core": "rnn"}),
    "diverges": small(
        model={"nonlinearity": "identity"},
        optimizer={"name": "sgd", "learning_rate": 1e20},
        evaluation={"every": 10},
    ),
    "solved early": small(
        task={"name": "latch", "test_size": 20},
        optimizer={"name": "adam", "learning_rate": 0.1},
        training={"stop_when_solved": True, "steps": 60, "batch_size": 20},
        evaluation={"every": 6},
    ),
}


def of_task(name):
    """Return a small run on a task."""
    few = {"test_size": 10} if hasattr(TASKS[name].Config, "test_size") else {}
    source = {"source": "dates"} if name == "translation" else {}
    task = {"name": name, **few, **source}
    return small(task=task, horizon=max(4, build_task(task).minimum_horizon), **PROBED)


def interrupt_after(steps):
    """Return a function that asks a run to end before its n-th next step."""
    asked = iter([False] * steps)
    return lambda: next(asked, True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return what a run leaves that nothing has stopped; each is made once."""
    outcomes = {}

    def of(values):
        key = RunConfig.parse(values).identity
        if key not in outcomes:
            outcomes[key] = outcome(make(values, tmp_path_factory.mktemp("whole")))
        return outcomes[key]

    return of


@pytest.mark.parametrize("name", RUNS)
def test_a_run_interrupted_at_every_step_ends_with_the_same_bits(name, whole, tmp_path):
    values = RUNS[name]
    folder, interruptions = None, 0
    while folder is None:
        try:
            # At its first step and after each: within blocks of steps, too.
            folder = make(values, tmp_path, is_asked_to_end=interrupt_after(interruptions > 0))
        except Interrupted:
            interruptions += 1
    assert interruptions >= BLOCK
    assert_same(outcome(folder), whole(values))


def test_a_run_that_diverges_and_one_that_is_solved_end_as_named(whole):
    assert whole(RUNS["diverges"])["record"]["status"] == "diverged"
    solved = whole(RUNS["solved early"])["record"]["result"]
    assert solved["steps"] == solved["solved_at"] < 60


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"mnist"}))  # which is digits with files
def test_a_run_on_any_task_killed_at_a_random_moment_ends_with_the_same_bits(name, whole, tmp_path):
    values = of_task(name)
    moment = random.Random(name).randrange(1, 60)  # of about a hundred
    assert killed(values, tmp_path, moment, **OFTEN) == 0
    assert_same(outcome(make(values, tmp_path)), whole(values))


@pytest.mark.parametrize("name", sorted(REMEDIES))
def test_a_run_with_any_remedy_killed_at_a_random_moment_ends_with_the_same_bits(
    name, whole, tmp_path
):
    options = {"clipping": {"norm": 0.5}, "flossing": {"steps": 3}}.get(name, {})
    core = "lstm" if name in ("gate_bias", "flossing") else "rnn"
    values = small(model={"core": core}, remedy={name: options}, **PROBED)
    assert killed(values, tmp_path, random.Random(name).randrange(20, 60), **OFTEN) == 0
    assert_same(outcome(make(values, tmp_path)), whole(values))


def test_a_run_killed_at_any_moment_at_which_a_file_changes_ends_with_the_same_bits(
    whole, tmp_path
):
    values = small(training={"steps": 3}, probe={"adjoint": {}})
    moments = killed(values, tmp_path / "counted", None, **OFTEN)
    assert moments > 30
    for moment in range(1, moments + 1):
        root = tmp_path / str(moment)
        assert killed(values, root, moment, **OFTEN) == 0
        folder = make(values, root)
        assert_same(outcome(folder), whole(values), f"killed at {moment}")
        assert not list(folder.glob(".*")), "what the killed process left half written"


def test_a_run_killed_by_the_clock_ends_with_the_same_bits(whole, tmp_path):
    values = small(training={"steps": 400}, **PROBED)
    times = random.Random(0)
    for _ in range(4):
        process, _ = forked(in_process, values, tmp_path, None, OFTEN)
        time.sleep(times.uniform(0.1, 0.9))
        process.kill()
        process.join()
    assert_same(outcome(make(values, tmp_path)), whole(values))
