"""What holds for the data of every task and for every scenario, and oracles that several need."""

from __future__ import annotations

import argparse
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.config import RunConfig
from experiments.evaluation import HeldOut
from experiments.looks import Drawing, save_looks
from experiments.tasks import Task, build_task
from experiments.train import train

UNSCORED = -100


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


def trained(run: RunConfig, root: Path) -> Path:
    """Make a run below a folder; return its own folder."""
    folder = root / run.folder_name
    train(run, folder)
    return folder


def use(run: RunConfig, *words: str) -> None:
    """Use a fresh model of a run as the command line does."""
    parser = argparse.ArgumentParser()
    run.task.add_arguments(parser)
    run.task.use(run.build_model(), parser.parse_args(words), run.horizon)


@cache
def distance(one: str, other: str) -> int:
    """Return the fewest edits that make one text of another."""
    if not one or not other:
        return len(one) + len(other)
    return min(
        distance(one[1:], other[1:]) + (one[0] != other[0]),
        distance(one[1:], other) + 1,
        distance(one, other[1:]) + 1,
    )


def check_data(task: Task, horizon: int) -> tuple[Tensor, Tensor]:
    """Check that a seed alone fixes what is drawn, and its shapes; return a batch."""
    assert build_task(task.settings).settings == task.settings
    before = torch.get_rng_state()
    one, two, other = (task.sample(6, horizon, generator(seed)) for seed in (3, 3, 4))
    tests = [task.test_set(horizon, generator(5)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in ((one, two), tests):
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))
    assert not torch.equal(one[0], other[0])
    x_TBI, target = one
    assert x_TBI.shape[1:] == (6, task.input_size)
    assert x_TBI.dtype == torch.float32
    assert x_TBI.isfinite().all()
    assert target.shape[task.sample_dim] == 6
    if target.dtype == torch.long:
        assert target.shape == ((6,) if task.reads == "last" else x_TBI.shape[:2])
        assert target[target != UNSCORED].max() < task.output_size
    else:
        assert target.dtype == torch.float32
        assert target.shape[-1] == task.output_size
        assert target.shape[:-1] == ((6,) if task.reads == "last" else x_TBI.shape[:2])
    assert ((target == UNSCORED) | target.isnan()).any() == (task.reads == "masked")
    test_x, test_target = tests[0]
    assert test_x.shape[::2] == x_TBI.shape[::2]
    assert test_target.dtype == target.dtype
    assert 0 <= task.dependency(horizon) < len(x_TBI)
    return one


def check_scenario(options: dict[str, Any], horizon: int, folder: Path) -> None:
    """Check a task's data, numbers and looks, and a run of it."""
    task = build_task(options)
    check_data(task, horizon)
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
