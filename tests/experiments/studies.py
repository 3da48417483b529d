"""Studies that take a second, composed as the command line composes them."""

from __future__ import annotations

import io
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console

from experiments.composition import CONFIGURATION
from experiments.study import Study, parse_study

ROOT = Path(__file__).parents[2]
TINY = (
    "experiment=smoke", "training.steps=3", "training.batch_size=4", "task.test_size=8",
    "evaluation.train_size=8", "model.hidden_size=4",
)  # fmt: skip


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGURATION / group).glob("*.yaml"))


def composed(*overrides: str):
    with initialize_config_dir(str(CONFIGURATION), version_base="1.3"):
        return compose("config", list(overrides))


def study_of(*overrides: str) -> Study:
    with initialize_config_dir(str(CONFIGURATION), version_base="1.3"):
        return parse_study(compose("config", list(overrides)), overrides)


def tiny(root: Path, *overrides: str) -> Study:
    return study_of(*TINY, f"output.root='{root}'", *overrides)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)
