"""Uses a trained model: ``python -m experiments.use RUN ...``.

RUN is a run's folder, or one of a study or sweep: then its first run at the longest horizon. What
else there is to say depends on the task: ``python -m experiments.use RUN --help``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.checkpoint import CHECKPOINT, CheckpointError
from experiments.fields import ConfigError
from experiments.report.reading import ReportError, gather
from experiments.train import load_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.use RUN",  # argparse would show it last
        description="Use a trained model. RUN is a run's folder, or a study's.",
    )
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0].startswith("-"):
        parser.epilog = "Arguments follow from the task of RUN: RUN --help."
        parser.print_help()
        return 0 if words[:1] in (["--help"], ["-h"]) else 2
    try:
        run, model = load_run(_chosen(Path(words[0])))
        run.task.add_arguments(parser)
        options = parser.parse_args(words[1:])
        run.task.use(model.eval(), options, run.horizon)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ConfigError, CheckpointError, ReportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _chosen(folder: Path) -> Path:
    """Return the folder of the run that a folder stands for.

    Raises:
        ReportError: it stands for none that was trained.
    """
    try:
        found = gather([folder])
    except ReportError as error:
        raise ReportError(f"RUN must be a run's folder, or a study's: {error}") from error
    entries = [each for each in found.entries if (each.folder / CHECKPOINT).exists()]
    if not entries:
        reasons = "".join(f"; {name}: {reason}" for name, reason in found.problems.items())
        raise ReportError(f"RUN must have a run that was trained; {folder} has none{reasons}")
    return max(entries, key=lambda entry: entry.horizon).folder


if __name__ == "__main__":
    sys.exit(main())
