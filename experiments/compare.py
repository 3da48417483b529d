"""One table and one figure over the runs of a multirun.

    python -m experiments.compare multirun/<date>/<time>

Hydra calls the same at the end of ``python -m experiments.run -m model=...``. Finished runs are
compared; those that failed are listed after them, each with its reason.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from experiments import figures, report, results, run_folder

Results = Mapping[str, Any]


class ComparisonError(ValueError):
    """Runs that cannot be compared."""


class ComparisonCallback(Callback):
    """Compares the runs of a multirun when the last one has ended."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write the comparison into the multirun's folder, or say why there is none.

        Ends the process with status 1 if a run failed.
        """
        folder = Path(config.hydra.sweep.dir)
        console = report.new_console()
        is_shown = False
        # Hydra turns an exception of a callback into a warning, and reports success.
        try:
            compare(folder, console)
            is_shown = True
        except ComparisonError as error:
            # A sweep over tasks, or of one run, is no mistake: there is just nothing to compare.
            report.say(console, f"No comparison: {error}.")
            is_shown = True
        except Exception:
            traceback.print_exc()
        failed = failed_runs(folder)
        if failed:
            say_failed(console, failed)
        if failed or not is_shown:
            raise SystemExit(1)


def compare(folder: Path, console: Console) -> dict[str, Any]:
    """Compare the finished runs below ``folder``; leave table, figure and JSON in it.

    Returns:
        What ``comparison.json`` holds: one row per finished run and horizon, and why others failed.

    Raises:
        ComparisonError: fewer than two finished runs, different tasks, or no horizon in common.
        experiments.report.PresentationError: the comparison could not be printed or drawn.
    """
    runs = load_runs(folder)
    horizon = common_horizon(runs)
    failed = failed_runs(folder)
    found = {
        "task": runs[0]["task"],
        "profile_horizon": horizon,
        "runs": [run["folder"] for run in runs],
        "rows": [_row(run, arm) for run in runs for arm in run["arms"]],
        "failed": failed,
    }
    results.write_json(folder / "comparison.json", found)

    def tell(target: Console) -> None:
        target.print()
        target.print(comparison_table(runs))
        report.say_items(target, statements(runs))

    def tell_file(target: Console) -> None:
        tell(target)
        if failed:
            say_failed(target, failed)

    report.present(
        lambda: report.write_report(folder / "comparison.txt", tell_file),
        lambda: tell(console),
        lambda: figures.draw_comparison(runs, horizon, folder),
        lambda: report.say(console, f"Comparison: {folder}"),
    )
    return found


def say_failed(console: Console, failed: Mapping[str, str]) -> None:
    """Print the runs that failed, each with the first and the last line of its reason."""
    report.say(console, f"{len(failed)} run(s) failed:")
    for name, reason in failed.items():
        lines = [line for line in reason.splitlines() if line.strip()]
        words = " ... ".join(dict.fromkeys((lines[0], lines[-1])))
        report.say(console, f"  {name}: {words}")


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of all runs below ``folder``, in Hydra's order."""
    if not folder.is_dir():
        raise ComparisonError(f"{folder} is not a folder")
    # A run leaves the first of these whatever becomes of it, and older ones the second.
    marks = [path for name in (run_folder.OWNER, ".hydra") for path in folder.rglob(name)]
    return sorted({path.parent for path in marks} - {folder}, key=_order)


def failed_runs(folder: Path) -> dict[str, str]:
    """Return why the runs below ``folder`` that failed did, by the names of their folders."""
    reasons = {_name(path, folder): results.failure(path) for path in run_folders(folder)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def load_runs(folder: Path) -> list[dict[str, Any]]:
    """Read the finished runs below ``folder``, in Hydra's order, each with its own ``label``."""
    folders = run_folders(folder)
    run_dirs = [path for path in folders if (path / results.RESULTS).exists()]
    if len(run_dirs) < 2:
        others = [_name(path, folder) for path in folders if path not in run_dirs]
        raise ComparisonError(
            f"{folder} holds {len(run_dirs)} run(s) that finished; a comparison needs two"
            + (f" (not finished: {', '.join(others)})" if others else "")
        )
    runs = [{**results.load_results(path), "folder": _name(path, folder)} for path in run_dirs]
    tasks = {run["task"]["name"] for run in runs}
    if len(tasks) > 1:
        raise ComparisonError(
            f"runs on different tasks cannot be compared: {', '.join(sorted(tasks))}"
        )
    names = [run["config"]["model"]["name"] for run in runs]
    for run, name in zip(runs, names, strict=True):
        # Runs of one model differ in something else: the number Hydra gave them tells them apart.
        run["label"] = name if names.count(name) == 1 else run["folder"]
    return runs


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder))


def _order(path: Path) -> tuple[int, str]:
    number = path.name.split("_")[0]
    return (int(number) if number.isdigit() else 0, path.name)


def common_horizon(runs: Sequence[Results]) -> int:
    """Return the horizon of the profiles drawn: a contrast's, else the longest in common."""
    common = set.intersection(*({arm["horizon"] for arm in _ladder(run)} for run in runs))
    if not common:
        raise ComparisonError("the runs' ladders have no horizon in common")
    contrasts = common & {h for run in runs for h in run["config"]["contrast_horizons"]}
    return max(contrasts or common)


def _ladder(run: Results) -> list[Mapping[str, Any]]:
    return [arm for arm in run["arms"] if not arm["is_contrast"]]


def _row(run: Results, arm: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "run": run["label"],
        "arm": arm["title"],
        "horizon": arm["horizon"],
        "is_contrast": arm["is_contrast"],
        "hidden_size": arm["hidden_size"],
        "parameters": arm["parameters"],
        "log10_ratio_initial": [r["initial"]["log10_ratio"] for r in arm["runs"]],
        "log10_ratio_trained": [r["trained"]["log10_ratio"] for r in arm["runs"]],
        "test_metric": [r["test_metric"] for r in arm["runs"]],
        "error_over_know_nothing": [r["error_over_know_nothing"] for r in arm["runs"]],
        "verdict": report.verdict_text(arm),
    }


def comparison_table(runs: Sequence[Results]) -> Table:
    """Return a line per horizon and run: gradient ratio before and after, metric, verdict."""
    metric = runs[0]["task"]["metric"]
    table = report.new_table(
        f"{len(runs)} runs on {runs[0]['task']['name']}",
        "log10 ratio: |dL/dh_1| / |dL/dh_T|, total adjoint; low..high over seeds",
    )
    for name in (
        "T",
        "run",
        "H",
        "parameters",
        "log10 ratio\nat init",
        "\ntrained",
        f"test\n{metric}",
    ):
        table.add_column(name, justify="left" if name == "run" else "right", overflow="fold")
    table.add_column("verdict")
    horizons = sorted({arm["horizon"] for run in runs for arm in _ladder(run)})
    for horizon in horizons:
        rows = [(run, arm) for run in runs for arm in _ladder(run) if arm["horizon"] == horizon]
        for index, (run, arm) in enumerate(rows):
            table.add_row(
                str(horizon) if index == 0 else "",
                report.as_text(run["label"]),
                str(arm["hidden_size"]),
                str(arm["parameters"]),
                *report.measured_cells(arm, metric),
                report.verdict_text(arm),
                end_section=index == len(rows) - 1,
            )
    return table


def statements(runs: Sequence[Results]) -> list[str]:
    """Return, for each run, how its gradient falls and how far it learned."""
    said = []
    for run in runs:
        ladder = _ladder(run)
        slope = report.decades_per_step(ladder)
        fall = "no measurable slope" if slope is None else f"{slope:+.3f} decades per step back"
        learned = [arm["horizon"] for arm in ladder if arm["majority_learned"]]
        horizons = ", ".join(map(str, learned)) if learned else "no horizon"
        said.append(f"{run['label']}: gradient at initialisation {fall}; learned T = {horizons}.")
    return said


def main() -> None:
    """Compare the runs of the multirun folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a multirun folder, e.g. multirun/<date>/<time>")
    console = report.new_console()
    try:
        found = compare(parser.parse_args().folder, console)
    except (ComparisonError, report.PresentationError) as error:
        raise SystemExit(f"error: {error}") from error
    if found["failed"]:
        say_failed(console, found["failed"])


if __name__ == "__main__":
    main()
