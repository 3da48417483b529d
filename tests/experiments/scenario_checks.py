"""What holds for every scenario, whatever its data is."""

from __future__ import annotations

import math
from typing import Any

import torch

from experiments.config import RunConfig
from experiments.evaluation import HeldOut
from experiments.looks import Drawing, save_looks
from experiments.tasks import Task, build_task
from experiments.train import train


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run_of(options: dict[str, Any], horizon: int, **values: Any) -> RunConfig:
    """Return a run of a few steps on a task."""
    return RunConfig.parse(
        {
            "model": {"core": "fused_rnn", "hidden_size": 8, **values.pop("model", {})},
            "task": options,
            "horizon": horizon,
            "training": {"steps": 3, "batch_size": 4, **values.pop("training", {})},
            "evaluation": {"probe_size": 4, "train_size": 8},
            "optimizer": {"name": "adam"},
            **values,
        }
    )


def check_scenario(options: dict[str, Any], horizon: int, folder) -> None:
    """Check a task's data, numbers and looks, and a run of it."""
    task = build_task(options)
    assert build_task(task.settings).settings == task.settings
    before = torch.get_rng_state()
    one, two, other = (task.sample(6, horizon, generator(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0])
    x_TBI, target = one
    assert x_TBI.shape[1:] == (6, task.input_size)
    assert x_TBI.dtype == torch.float32
    assert x_TBI.isfinite().all()
    assert target.shape[task.sample_dim] == 6
    tests = [task.test_set(horizon, generator(5)) for _ in range(2)]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*tests, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert 0 <= task.dependency(horizon) < len(x_TBI)
    assert task.know_nothing_loss(horizon) > 0
    assert task.know_nothing_error(horizon) > 0

    run = run_of(options, horizon)
    result = train(run, folder / run.folder_name).result
    assert result.baselines
    for values in (result.baselines, result.measures):
        assert all(math.isfinite(value) for value in values.values())
    held_out, model = HeldOut(run), run.build_model()
    _check_looks(task, held_out.looks(model), held_out.looks(model), folder)


def _check_looks(task: Task, looks, again, folder) -> None:
    assert looks
    for look in looks:
        if isinstance(look, Drawing):  # a layout that is solved for differs in its last bits
            assert look.figure.get_layout_engine() is None
    for each, name in ((looks, "looks_a"), (again, "looks_b")):
        (folder / name).mkdir()
        save_looks(each, folder / name, 0)
    for path in sorted((folder / "looks_a").rglob("*.*")):
        twin = folder / "looks_b" / path.relative_to(folder / "looks_a")
        assert path.read_bytes() == twin.read_bytes()
        if path.suffix == ".txt" and task.name.startswith("synthetic"):
            assert "synthetic" in path.read_text(encoding="utf-8").splitlines()[0]
