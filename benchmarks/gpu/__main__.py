"""The command line.

python -m benchmarks.gpu                    everything, in under nine minutes
python -m benchmarks.gpu --stage bench      one stage, or several by commas
python -m benchmarks.gpu --rehearsal        without a GPU: does the script itself run?
python -m benchmarks.gpu --render FILE      no measuring: the tables of a results.json
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, results
from benchmarks.gpu import report
from benchmarks.gpu.session import STAGES, TOTAL, Session, clear
from benchmarks.gpu.stages import Runner

RESULTS_FOLDER = machine.REPOSITORY / "benchmarks" / "results"
RUNS_FOLDER = machine.REPOSITORY / "runs" / "benchmarks-gpu"

LOG, MARKDOWN, PROFILE = "log.txt", "results.md", "profile.txt"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages, write what they found, print a short table last; return the exit status."""
    options = _parse(arguments)
    if options.render is not None:
        found = results.load(options.render)
        for table in report.all_tables(found):
            print(f"{report.plain(table)}\n")
        results.write_text(options.render.with_name(MARKDOWN), report.markdown(found))
        return 0
    work = RUNS_FOLDER / "work"
    work.mkdir(parents=True, exist_ok=True)
    if "bench" in options.stages:
        clear(work)
    log = work / LOG
    log.unlink(missing_ok=True)
    runner = Runner(options.seconds, log)
    device = "cpu" if options.rehearsal else "cuda"
    session = Session(runner, work, device, options.commit)
    found: dict[str, Any] = {
        "schema": results.SCHEMA,
        "kind": "gpu",
        "complete": False,
        "command": _command(options),
    }
    try:
        session.run(options.stages)
        found["complete"] = True
    except KeyboardInterrupt:
        print("interrupted")
    found |= session.results()
    folder = _folder(options, found["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    results.save(found, folder)
    found = results.load(folder / results.FILE)
    results.write_text(folder / MARKDOWN, report.markdown(found))
    for name in (LOG, PROFILE):
        if (work / name).is_file():
            shutil.copyfile(work / name, folder / name)
    print(f"\n{report.last_words(found)}\nwritten: {folder}")
    return 0 if found["passed"] and found["complete"] else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    stages = "; ".join(f"{name}: {what}" for name, what in STAGES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Build, check, test, sanitize, time and profile on a GPU, in one call.",
    )
    parser.add_argument(
        "--stage", default=",".join(STAGES), help=f"which, by commas (default: all). {stages}"
    )
    parser.add_argument(
        "--seconds", type=float, default=TOTAL, help=f"for everything (default: {TOTAL:.0f})"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the results (default: CARD-DATE in $OUT, or in benchmarks/results/)",
    )
    parser.add_argument("--commit", help="the commit, where the checkout has no history")
    parser.add_argument("--rehearsal", action="store_true", help="tiny problems on the CPU")
    parser.add_argument("--render", type=Path, help="no measuring: the tables of this file")
    options = parser.parse_args(arguments)
    options.stages = [name.strip() for name in options.stage.split(",") if name.strip()]
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown or not options.stages:
        what = f"unknown stage {unknown[0]!r}" if unknown else "no stage given"
        parser.error(f"{what}; choose from {', '.join(STAGES)}")
    if options.seconds <= 0:
        parser.error(f"--seconds takes a positive number, got {options.seconds:g}")
    if options.render is not None and not options.render.is_file():
        parser.error(f"--render: there is no file {options.render}")
    return options


def _folder(options: argparse.Namespace, about: dict[str, Any] | None) -> Path:
    """Return where results go; those of a part or of a rehearsal do not belong in the repository.

    Results that are there already stay: a number after the date tells runs apart.
    """
    if options.output is not None:
        return options.output
    from benchmarks.gpu.info import folder_name

    name = folder_name(about) if about else "no-card"
    if out := os.environ.get("OUT"):
        parent = Path(out)
    elif options.rehearsal or options.stages != list(STAGES) or about is None:
        parent = RUNS_FOLDER
    else:
        parent = RESULTS_FOLDER
    names = [name, *(f"{name}-{i}" for i in range(2, 1000))]
    return next(parent / n for n in names if not (parent / n / results.FILE).exists())


def _command(options: argparse.Namespace) -> str:
    """Return the command without its paths, which are the machine's own affair."""
    words = ["python -m benchmarks.gpu"]
    if options.stages != list(STAGES):
        words.append(f"--stage {','.join(options.stages)}")
    if options.seconds != TOTAL:
        words.append(f"--seconds {options.seconds:g}")
    return " ".join([*words, "--rehearsal"] if options.rehearsal else words)


if __name__ == "__main__":
    sys.exit(main())
