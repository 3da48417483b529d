"""Studies that take a second, composed as the command line composes them."""

from __future__ import annotations

import io
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments.composition import CONFIGURATION
from experiments.study import Study, parse_study

ROOT = Path(__file__).parents[2]
TINY = (
    "experiment=smoke", "training.steps=3", "training.batch_size=4", "task.test_size=8",
    "evaluation.train_size=8", "model.hidden_size=4",
)  # fmt: skip


def listing_also(package: str, folder: Path) -> str:
    """Return lines of a program that run a package again, with a second folder to list."""
    return (
        f"import {package} as package\n"
        f"package.__path__.append({str(folder)!r})\n"
        "package.__spec__.loader.exec_module(package)\n"
    )


def example(group: str, key: str) -> tuple[str, str, DictConfig]:
    """Return the file's name, source and choice that ``docs/remedies.md`` adds to a group."""
    page = (ROOT / "docs/remedies.md").read_text(encoding="utf-8")
    source = page.partition(f"```python\n# experiments/{group}/")[2].partition("```")[0]
    name, _, source = source.partition(".py\n")
    choice = page.partition(f"```yaml\n# @package {key}.{name}")[2].split("```")[0]
    return name, source, OmegaConf.create(choice)


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
