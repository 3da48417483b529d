"""One table and one figure over the runs of a multirun.

    python -m experiments.compare multirun/<date>/<time>

Hydra calls the same at the end of ``python -m experiments.run -m model=...``. Only finished runs
can be compared; a folder with another one is refused, naming it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import figures, report, results

Results = Mapping[str, Any]


class ComparisonError(ValueError):
    """Runs that cannot be compared."""


class ComparisonCallback(Callback):
    """Compares the runs of a multirun when the last one has ended."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write the comparison into the multirun's folder, or say why there is none."""
        console = Console()
        try:
            compare(Path(config.hydra.sweep.dir), console)
        except ComparisonError as error:
            # A sweep over tasks, or of one run, is no mistake: there is just nothing to compare.
            console.print(f"No comparison: {error}.")


def compare(folder: Path, console: Console) -> dict[str, Any]:
    """Compare the finished runs below ``folder``; leave table, figure and JSON in it.

    Returns:
        What ``comparison.json`` holds: one row per run and horizon.

    Raises:
        ComparisonError: fewer than two runs, different tasks, or no horizon in common.
        experiments.results.IncompleteRunError: a run was not finished.
    """
    runs = load_runs(folder)
    horizon = common_horizon(runs)
    found = {
        "task": runs[0]["task"],
        "profile_horizon": horizon,
        "runs": [run["folder"] for run in runs],
        "rows": [_row(run, arm) for run in runs for arm in run["arms"]],
    }
    figures.draw_comparison(runs, horizon, folder)
    with (folder / "comparison.txt").open("w", encoding="utf-8") as file:
        for target in (console, Console(file=file, width=140)):
            target.print()
            target.print(comparison_table(runs))
            for statement in statements(runs):
                target.print(f"  * {statement}", highlight=False)
    results.write_json(folder / "comparison.json", found)
    console.print(f"\nComparison: {folder}")
    return found


def load_runs(folder: Path) -> list[dict[str, Any]]:
    """Read every run below ``folder``, in Hydra's order, each with a ``label`` of its own."""
    if not folder.is_dir():
        raise ComparisonError(f"{folder} is not a folder")
    # Hydra makes one .hydra folder per run, whatever became of the run.
    run_dirs = sorted((path.parent for path in folder.glob("*/.hydra")), key=_order)
    if len(run_dirs) < 2:
        raise ComparisonError(f"{folder} holds {len(run_dirs)} run(s); a comparison needs two")
    runs = [{**results.load_results(path), "folder": path.name} for path in run_dirs]
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
    table = Table(
        title=f"{len(runs)} runs on {runs[0]['task']['name']}",
        caption="log10 ratio: |dL/dh_1| / |dL/dh_T|, total adjoint; low..high over seeds",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
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
        table.add_column(name, justify="left" if name == "run" else "right")
    table.add_column("verdict")
    horizons = sorted({arm["horizon"] for run in runs for arm in _ladder(run)})
    for horizon in horizons:
        rows = [(run, arm) for run in runs for arm in _ladder(run) if arm["horizon"] == horizon]
        for index, (run, arm) in enumerate(rows):
            table.add_row(
                str(horizon) if index == 0 else "",
                run["label"],
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
    try:
        compare(parser.parse_args().folder, Console())
    except (ComparisonError, results.IncompleteRunError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
