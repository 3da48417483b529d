"""Runs a study, or what is left of it: models at growing horizons, several seeds.

    python -m experiments.run model=fused_rnn
    python -m experiments.run model=lstm model.match_parameters=true
    python -m experiments.run experiment=noise_padded_digits model=gru
    python -m experiments.run -m model=fused_rnn,rnn,fused_lstm,fused_gru   # one comparison
    torchrun --nproc-per-node 2 -m experiments.run ...             # two processes make each run
    python -m experiments.run --help

Every run has a folder of its own in ``runs/records`` and is made once: a command that was killed
goes on where it was, and one that is given again shows what it showed. The study's folder holds the
table and what was measured as text, figures, the resolved configuration and ``study.json``.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from experiments import distributed, figures, interrupts, run_folder, tables, view
from experiments.composition import CONFIGURATION, explained, is_of_hydra
from experiments.console import new_console, say, write_printed
from experiments.display import Display
from experiments.execution import Outcome, execute, worker_count
from experiments.fields import ConfigError
from experiments.files import write_text
from experiments.kernel_check import compared_with_torch
from experiments.record import write_json
from experiments.study import Member, Study, parse_study


@hydra.main(version_base="1.3", config_path=str(CONFIGURATION), config_name="config")
def main(config: DictConfig) -> None:
    """Check the configuration, and run it in a folder of its own."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    overrides = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        if distributed.count() > 1:
            raise ConfigError("-m is for one process, and torchrun starts several; leave it out")
        folder = run_folder.claim_next(folder)
        try:
            run_study(parse_study(config, overrides), folder, new_console(), config)
        except Exception as error:
            # The others run; the comparison lists this one.
            reason = str(error) if isinstance(error, ConfigError) else _described(error)
            failure = {"reason": reason, "traceback": traceback.format_exc()}
            write_json(folder / run_folder.FAILURE, failure)
            print(f"error: {folder.name}: {reason}", file=sys.stderr)
        return
    if not distributed.is_main():
        with interrupts.noticed() as is_asked_to_end:
            execute(parse_study(config, overrides), is_asked_to_end, _ignore, _ignore)
        return
    # SystemExit: of any other exception Hydra prints a line of its own.
    try:
        run_folder.claim(folder)
    except run_folder.FolderTakenError as error:
        raise SystemExit(f"error: {error}") from None
    try:
        study = parse_study(config, overrides)
    except BaseException as error:
        run_folder.release(folder)
        if isinstance(error, ConfigError):
            raise SystemExit(f"error: {error}") from None
        raise
    if not run_study(study, folder, new_console(), config):
        raise SystemExit(1)


def run_study(
    study: Study, folder: Path, console: Console, config: DictConfig | None = None
) -> bool:
    """Make the runs of a study that have no record, and leave what they show in ``folder``.

    Returns:
        Whether every run has a result.

    Raises:
        KeyboardInterrupt: asked to end; every run that was under way is saved.
    """
    command = shlex.join(["python", "-m", "experiments.run", *sys.argv[1:]])
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    view.save(study, folder, command)
    # Before any worker starts: this also builds the kernels, once.
    view.save(study, folder, command, compared_with_torch(study))
    runs = len(study.runs)
    how = f"{worker_count(study, runs)} at a time"
    if study.execution.launcher != "processes":
        how = f"as jobs ({study.execution.launcher})"
    say(console, f"{study.config.name}: {runs} runs, {how}")
    failures: dict[str, Outcome] = {}
    with interrupts.noticed() as is_asked_to_end, Display(study, console) as display:

        def on_outcome(member: Member, outcome: Outcome) -> None:
            display.outcome(member, outcome)
            if outcome.state != "done":
                failures[member.run.identity] = outcome

        execute(study, is_asked_to_end, display.progress, on_outcome)
        is_ended = is_asked_to_end()
    seen = view.load(folder).with_reasons(
        {identity: outcome.reason for identity, outcome in failures.items()}
    )
    problems = show(seen, folder, console, "Table, figures and configuration")
    if is_ended:
        raise KeyboardInterrupt
    if problems:
        say(
            console,
            f"error: all records are in {study.root / 'runs' / 'records'}, but not everything "
            f"could be printed and drawn: {'; '.join(problems)}",
        )
    return not seen.failures and not problems


def show(seen: view.View, folder: Path, console: Console, what: str) -> list[str]:
    """Print a view, and leave it in a folder as text and figures; return what went wrong.

    Args:
        seen: what is to be seen.
        folder: where files go.
        console: where it is printed.
        what: the folder holds.
    """
    page = shlex.join(["python", "-m", "experiments.report", str(folder)])
    return present(
        lambda: write_printed(folder / "report.txt", lambda to: tables.say_view(to, seen)),
        lambda: tables.say_view(console, seen),
        lambda: figures.draw(seen, folder),
        lambda: say(console, f"All figures on one page: {page}"),
        lambda: say(console, f"{what}: {folder}"),
    )


def _ignore(*_: object) -> None:
    """Tell nobody: the main process does."""


def present(*steps: Callable[[], Any]) -> list[str]:
    """Call every step, also after one that failed; return how those that failed did."""
    problems = []
    for step in steps:
        try:
            step()
        except Exception as error:
            problems.append(_described(error))
    return problems


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


class ComparisonCallback(Callback):
    """Looks at all studies of a sweep together, when the last one has ended."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write the comparison into the sweep's folder; end with status 1 if a run failed."""
        folder = Path(config.hydra.sweep.dir)
        # Hydra turns an exception of a callback into a warning, and reports success.
        try:
            is_good = compare(folder, new_console())
        except Exception:
            traceback.print_exc()
            is_good = False
        if not is_good:
            raise SystemExit(1)


def compare(folder: Path, console: Console) -> bool:
    """Print and draw what the studies below a folder show together.

    Returns:
        Whether every run has a result, and everything could be printed and drawn.
    """
    try:
        seen = view.load(folder)
    except view.ViewError as error:
        say(console, f"No comparison: {error}.")
        return False
    problems = show(seen, folder, console, "Comparison")
    for problem in problems:
        say(console, f"error: {problem}")
    return not seen.failures and not problems


def start() -> None:
    """Run what the command line says; what is wrong with it is said in one line."""
    # Without this Hydra would print such an error itself, and end the process.
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        with distributed.initialised():
            main()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if wants_traceback or not is_of_hydra(error):
            raise
        raise SystemExit(f"error: {explained(error)}") from None
    except KeyboardInterrupt:
        raise SystemExit(
            "\ninterrupted; what was done is saved, and the same command goes on from here"
        ) from None


if __name__ == "__main__":
    start()
