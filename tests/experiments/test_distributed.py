"""Several processes make the run that one would make."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import distributed
from experiments.config import RunConfig
from experiments.fields import ConfigError
from experiments.record import read_metrics
from tests.experiments.processes import assert_same, make, outcome, small, together

STEPS = 20
EXACT = {"precision": "float64"}

RUNS = {
    # 3 samples: the shares are 2 and 1.
    "dense": small(**EXACT, training={"steps": STEPS}, remedy={"clipping": {"norm": 0.1}}),
    "sequences": small(
        **EXACT,
        model={"core": "lstm"},
        task={"name": "copy_memory", "test_size": 10},
        training={"steps": STEPS, "batch_size": 5, "accumulation": 2},
    ),
    "masked": small(
        **EXACT,
        task={"name": "delayed_recall", "length": 12, "test_size": 10},
        training={"steps": STEPS},
    ),
    # One process has no sample.
    "one sample": small(
        **EXACT,
        task={"name": "perceptual_decision", "test_size": 10},
        training={"steps": STEPS, "batch_size": 1},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one_to_1e_10(name, tmp_path):
    values = RUNS[name]
    assert together(values, tmp_path / "two") == [0, 0]
    one, folder = make(values, tmp_path / "one"), tmp_path / "two"
    two = folder / one.name  # the identity does not depend on the number of processes
    weights, expected = (outcome(each)["state"]["model"] for each in (two, one))
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, rtol=0, atol=1e-10, msg=key)
    logs = [[row for row in read_metrics(each) if "loss" in row] for each in (two, one)]
    assert len(logs[0]) == STEPS
    for row, its in zip(*logs, strict=True):
        assert row == pytest.approx(its, rel=0, abs=1e-10)


def test_a_share_counts_by_what_is_scored_of_it(tmp_path):
    """Sequences of unequal length: process 0 has the longer ones, or all that are scored."""
    task = RunConfig.parse(RUNS["masked"]).task
    generator = torch.Generator().manual_seed(0)
    target = task.sample(4, 3, generator)[1]
    target[8:, 1:] = -100.0
    target[:, 3] = -100.0
    prediction = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    whole = task.loss(prediction, target.double())
    for shares in ((2, 2), (3, 1)):
        parts = zip(prediction.split(shares, 1), target.double().split(shares, 1), strict=True)
        scored = [(p, y) for p, y in parts if task.scored(y)]
        total = sum(
            task.loss(p, y) * distributed.weight(task, y, target.double()) for p, y in scored
        )
        torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)


def test_a_distributed_run_that_is_killed_ends_with_the_same_bits(tmp_path):
    values = small(training={"steps": 6}, probe={"adjoint": {"every": 4}}, evaluation={"every": 3})
    assert together(values, tmp_path / "whole") == [0, 0]
    killed = tmp_path / "killed"
    for moment in random.Random(0).sample(range(5, 50), 2):
        assert together(values, killed, kill_at=moment)[0] == -9
    assert together(values, killed) == [0, 0]
    name = RunConfig.parse(values).folder_name
    assert_same(outcome(killed / name), outcome(tmp_path / "whole" / name))


def test_a_penalty_on_a_whole_batch_is_refused_by_name(monkeypatch):
    run = RunConfig.parse(small(remedy={"clipping": {"norm": 1.0}}))
    monkeypatch.setattr(distributed, "count", lambda: 2)
    distributed.check(run)
    monkeypatch.setattr(type(run.remedies[0]), "penalty", lambda *_: None)
    with pytest.raises(ConfigError, match=r"remedy\.clipping adds a penalty.* not 2"):
        distributed.check(run)


SCRIPT = """
import sys
from pathlib import Path
from experiments import distributed
from tests.experiments.processes import make, small
with distributed.initialised():
    folder = make(small(), Path(sys.argv[1]))
    # One write: the two processes share the pipe.
    sys.stdout.write(f"{'main' if distributed.is_main() else 'other'} {distributed.count()}\\n")
"""


@pytest.mark.slow
def test_torchrun_makes_one_run(tmp_path):
    script = tmp_path / "one_run.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, script, tmp_path],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["2", "2", "main", "other"]
    assert (tmp_path / RunConfig.parse(small()).folder_name / "record.json").exists()
