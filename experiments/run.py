"""Runs one study: a model at growing horizons, contrast arms beside it, several seeds.

    python -m experiments.run model=fused_rnn
    python -m experiments.run model=lstm model.match_parameters=true
    python -m experiments.run experiment=noise_padded_digits model=gru
    python -m experiments.run -m model=fused_rnn,rnn,lstm,gru      # one comparison over all runs

The run folder holds ``results.json``, ``curves.csv``, ``profiles.csv``, figures, the table and
conclusions as text, the resolved configuration, and what it takes to repeat the run.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments import figures, report, results, run_folder
from experiments.kernel_check import compare_with_torch
from experiments.ladder import Arm, build_arms, run_arm, summarise_arm
from experiments.provenance import provenance
from experiments.settings import ConfigError, validated
from experiments.tasks import build_task
from experiments.workers import available_cores, noticed_interrupts, run_jobs
from rnn_cuda import backend

CONFIGURATION = Path(__file__).resolve().parents[1] / "hydra_conf"


@hydra.main(version_base="1.3", config_path=str(CONFIGURATION), config_name="config")
def main(config: DictConfig) -> None:
    """Check the configuration and run it in a folder of its own.

    A member of a sweep that fails records why and returns, so that the others run;
    `experiments.compare` lists it when the sweep ends.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        _run_member(config, run_folder.claim_next(folder))
    else:
        _run_alone(config, folder)


def _run_member(config: DictConfig, folder: Path) -> None:
    try:
        _run(config, folder)
    except Exception as error:
        results.write_failure(folder, error)
        if not isinstance(error, ConfigError | report.PresentationError):
            traceback.print_exc()
        print(f"error: {folder.name}: {error}", file=sys.stderr)


def _run_alone(config: DictConfig, folder: Path) -> None:
    try:
        # Taken already, unless Hydra was told to do without our callback.
        run_folder.claim(folder)
        _run(config, folder)
    except run_folder.FolderTakenError as error:
        raise SystemExit(f"error: {error}") from None
    except ConfigError as error:
        run_folder.release(folder)
        raise SystemExit(f"error: {error}") from error
    except report.PresentationError as error:
        results.write_failure(folder, error)
        raise SystemExit(f"error: {error}") from error
    except Exception as error:
        results.write_failure(folder, error)
        raise


def _run(config: DictConfig, folder: Path) -> None:
    plain = validated(config)
    # As Hydra writes it, which would do so before the folder is known to be free.
    hydra_config = HydraConfig.instance().cfg
    described = {
        "config": config,
        "hydra": hydra_config,
        "overrides": hydra_config.hydra.overrides.task,
    }
    (folder / ".hydra").mkdir(exist_ok=True)
    for name, node in described.items():
        results.write_text(folder / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(node))
    try:
        with noticed_interrupts():
            run_study(plain, folder, report.new_console())
    except KeyboardInterrupt:
        raise SystemExit(f"\ninterrupted; what was done so far: {folder}") from None


def run_study(config: dict[str, Any], folder: Path, console: Console) -> dict[str, Any]:
    """Run a validated configuration and leave everything in ``folder``.

    Returns:
        What ``results.json`` holds.

    Raises:
        experiments.run_folder.FolderTakenError: another run is, or was, in ``folder``.
        experiments.workers.WorkerError: an arm failed in its process.
        experiments.report.PresentationError: the results are on disk, but could not be printed or
            drawn.
    """
    run_folder.claim(folder)
    task = build_task(config["task"])
    arms = build_arms(config)
    workers = worker_count(config, len(arms) * len(config["seeds"]))
    found: dict[str, Any] = {
        "complete": False,
        "config": config,
        "provenance": {**provenance(config["device"]), "workers": workers},
        "task": {"name": task.name, "metric": task.metric},
        "kernel_check": None,
        "arms": [],
    }
    results.write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    results.write_json(folder / results.PARTIAL, found)
    report.say(
        console, f"{config['name']}: {config['model']['name']} on {task.name}, {workers} worker(s)"
    )

    found["kernel_check"] = compare_with_torch(config, check_horizon(config))
    runs = _run_arms(config, arms, workers, console, folder, found, task)
    found["arms"] = [summarise_arm(config, task, arm, runs[arm.title]) for arm in arms]
    found["conclusions"] = report.conclusions(found)
    # Only now has this process used a kernel; each run says for itself what its process used.
    found["provenance"]["backend"] = backend.describe()
    found["complete"] = True

    _write_tables(folder, arms, runs)
    results.write_json(folder / results.RESULTS, found)
    (folder / results.PARTIAL).unlink()

    losses = {arm.title: [run["loss"] for run in runs[arm.title]] for arm in arms}
    try:
        report.present(
            lambda: report.write_report(
                folder / "report.txt", lambda target: report.say_results(target, found)
            ),
            lambda: report.say_results(console, found),
            lambda: figures.draw_run(found, losses, folder),
            lambda: report.say(console, f"Results, curves and figures: {folder}"),
        )
    except report.PresentationError as error:
        raise report.PresentationError(
            f"the run is finished and its results are in {folder}, but not all of them could be "
            f"printed and drawn: {error}"
        ) from error
    return found


def worker_count(config: dict[str, Any], jobs: int) -> int:
    """Return the number of processes: as configured, else one per core; one for a GPU."""
    if config["workers"] is not None:
        return min(config["workers"], jobs)
    if config["device"] != "cpu":
        return 1
    return min(available_cores(), jobs)


def check_horizon(config: dict[str, Any]) -> int:
    """Return where the kernel is put beside ``torch.nn.RNN``: a contrast's T, else mid-ladder."""
    horizons = sorted(config["contrast_horizons"] or config["horizons"])
    return horizons[len(horizons) // 2]


def _run_arms(
    config: dict[str, Any],
    arms: list[Arm],
    workers: int,
    console: Console,
    folder: Path,
    found: dict[str, Any],
    task: Any,
) -> dict[str, list[dict[str, Any]]]:
    """Run every arm from every seed; return the runs by arm title, in the order of the seeds."""
    # Longest first, so that no core is left with a long job at the end.
    jobs = [
        (config, arm, seed)
        for arm in sorted(arms, key=lambda arm: -arm.horizon)
        for seed in config["seeds"]
    ]
    runs: dict[str, list[dict[str, Any]]] = {arm.title: [] for arm in arms}
    steps = config["training"]["steps"]
    with _progress(console) as progress:
        bars = {
            arm.title: progress.add_task(
                report.as_line(arm.title), total=steps * len(config["seeds"]), loss=""
            )
            for arm in arms
        }
        total = progress.add_task("all", total=steps * len(jobs), loss="")
        done = [0] * len(jobs)

        def on_progress(index: int, told: tuple[int, float]) -> None:
            step, loss = told
            advance, done[index] = step - done[index], step
            progress.update(bars[jobs[index][1].title], advance=advance, loss=f"loss {loss:.4f}")
            progress.advance(total, advance)

        def on_result(index: int, run: dict[str, Any]) -> None:
            arm = jobs[index][1]
            # A run that diverged stopped early; its bar is full all the same.
            on_progress(index, (steps, run["loss"][-1]))
            runs[arm.title].append(run)
            runs[arm.title].sort(key=lambda run: config["seeds"].index(run["seed"]))
            found["arms"] = [
                summarise_arm(config, task, a, runs[a.title]) for a in arms if runs[a.title]
            ]
            results.write_json(folder / results.PARTIAL, found)
            if not console.is_terminal:
                report.say(console, f"  {arm.title}, seed {run['seed']}: {run['verdict']}")

        run_jobs(run_arm, jobs, workers, on_progress, on_result)
    return runs


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<24}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
        disable=not console.is_terminal,
    )


def _write_tables(folder: Path, arms: list[Arm], runs: dict[str, list[dict[str, Any]]]) -> None:
    every = [(arm, run) for arm in arms for run in runs[arm.title]]
    results.write_csv(
        folder / "curves.csv",
        ("arm", "horizon", "seed", "step", "loss", "gradient_norm"),
        (
            (arm.title, arm.horizon, run["seed"], step, loss, norm)
            for arm, run in every
            for step, (loss, norm) in enumerate(
                zip(run["loss"], run["gradient_norm"], strict=True), start=1
            )
        ),
    )
    results.write_csv(
        folder / "profiles.csv",
        ("arm", "horizon", "seed", "stage", "lag", "state_norm", "hidden_norm"),
        (
            (arm.title, arm.horizon, run["seed"], stage, lag, state, hidden)
            for arm, run in every
            for stage in ("initial", "trained")
            for lag, (state, hidden) in enumerate(
                zip(run[stage]["state_norm"][::-1], run[stage]["hidden_norm"][::-1], strict=True)
            )
        ),
    )


if __name__ == "__main__":
    main()
