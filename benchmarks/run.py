"""Measure everything that is claimed about speed, accuracy and memory on the CPU.

    python -m benchmarks.run                          # all suites, on an idle machine
    python -m benchmarks.run --suite table,memory     # some
    python -m benchmarks.run --quick                  # tiny sizes: does it run at all?
    python -m benchmarks.run --render FOLDER/results.json

Writes ``results.json``, ``results.md`` and two figures into a folder of ``benchmarks/results/``.
How the numbers come about stands in `benchmarks.timing` and `benchmarks.floor`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import accuracy, figures, machine, memory, report, results
from benchmarks.cases import BASELINE, SUITES, TIMED_SUITES, timed_cases
from benchmarks.peers import PEERS
from benchmarks.workers import WorkerError, ask, run_cases

RESULTS_FOLDER = machine.REPOSITORY / "benchmarks" / "results"
QUICK_FOLDER = machine.REPOSITORY / "runs" / "benchmarks-quick"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or render what was measured; return the exit status."""
    options = _parse(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file or a pipe: no reason to break lines at 80
    if options.render is not None:
        found = results.load(options.render)
        _render(found, options.render.parent, options.page, console)
        return 0
    try:
        found, folder = _measure(options, console)
    except WorkerError as error:
        console.print(f"[bold red]{error}[/]; its own words are above")
        return 1
    _render(found, folder, options.page, console)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    cores = len(machine.usable_cores())
    suites = "; ".join(f"{name}: {what}" for name, what in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="Measure speed, accuracy and memory."
    )
    parser.add_argument(
        "--suite", default=",".join(SUITES), help=f"which, by commas (default: all). {suites}"
    )
    parser.add_argument(
        "--peers",
        default=",".join(PEERS),
        help=f"whom to time of {', '.join(PEERS)}; {BASELINE}, the unit, always is",
    )
    parser.add_argument(
        "--threads", default="1,2", help="numbers of threads, one process each (default: 1,2)"
    )
    parser.add_argument(
        "--seconds", type=float, help="for the rounds of each case (default: 2; quick: 0.02)"
    )
    parser.add_argument("--quick", action="store_true", help="a few tiny cases of each suite")
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--render", type=Path, help="no measuring: tables and figures of this file")
    parser.add_argument(
        "--page", type=Path, help="also write the tables here, with links to the figures"
    )
    options = parser.parse_args(arguments)
    options.suites = _chosen(parser, "suite", options.suite, list(SUITES))
    options.peers = _chosen(parser, "peer", options.peers, list(PEERS))
    if BASELINE not in options.peers:
        options.peers.insert(0, BASELINE)
    try:
        threads = sorted({int(number) for number in options.threads.split(",")})
    except ValueError:
        parser.error(f"--threads takes whole numbers and commas, got {options.threads!r}")
    if threads[0] < 1:
        parser.error(f"--threads takes positive numbers, got {threads[0]}")
    options.threads = [number for number in threads if number <= cores]
    if not options.threads:
        parser.error(f"--threads: this process may run on {cores} core(s) only")
    if options.seconds is None:
        options.seconds = 0.02 if options.quick else 2.0
    if options.render is not None and not options.render.is_file():
        parser.error(f"--render: there is no file {options.render}")
    return options


def _chosen(
    parser: argparse.ArgumentParser, kind: str, listed: str, choices: Sequence[str]
) -> list[str]:
    names = [name.strip() for name in listed.split(",") if name.strip()]
    unknown = [name for name in names if name not in choices]
    if unknown or not names:
        what = f"unknown {kind} {unknown[0]!r}" if unknown else f"no {kind} given"
        parser.error(f"{what}; choose from {', '.join(choices)}")
    return names


def _measure(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], Path]:
    """Measure what the options ask for; results so far are on disk after each suite."""
    about = machine.describe()
    folder = options.output or (
        QUICK_FOLDER if options.quick else _unused(RESULTS_FOLDER / machine.folder_name(about))
    )
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"{about['cpu']}, {about['cores']} core(s), {about['cpu_capability']}")
    # Compiles the kernels too, if need be, before anything is timed.
    found: dict[str, Any] = {
        "schema": results.SCHEMA,
        "complete": False,
        "command": _command(options),
        "machine": about,
        "suites": options.suites,
        "threads": options.threads,
        "seconds": options.seconds,
        "quick": options.quick,
        **ask({"kind": "peers", "threads": options.threads[0]}),
        "timings": [],
        "accuracy": [],
        "memory": [],
    }
    if found["backend"] != "native":
        console.print(f"[bold red]FusedRNN runs on the {found['backend']}[/]")
    for name in options.peers:
        if reason := found["peers"][name]["missing"]:
            console.print(f"  {found['peers'][name]['title']}: {reason}", style="dim")
    for kind, result in _everything(options, found):
        found[kind].append(result)
        console.print(
            report.progress_line(kind, result), highlight=False, markup=False, soft_wrap=True
        )
        results.save(found, folder)
    found["complete"] = True
    results.save(found, folder)
    # What the file holds, so that rendering it again gives the same tables to the last digit.
    return results.load(folder / results.FILE), folder


def _everything(
    options: argparse.Namespace, found: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the list a result belongs in, and the result."""
    available = [name for name in options.peers if not found["peers"][name]["missing"]]
    cases = [
        case
        for suite in options.suites
        if suite in TIMED_SUITES
        for case in timed_cases(suite, quick=options.quick)
    ]
    for threads in options.threads if cases else []:
        job = {"kind": "timings", "threads": threads, "seconds": options.seconds}
        job["peers"] = available
        for result in run_cases(job, [case.as_json() for case in cases]):
            yield "timings", result
    if "accuracy" in options.suites:
        job = {"kind": "accuracy", "threads": options.threads[-1]}
        several = accuracy.accuracy_cases(quick=options.quick)
        for result in run_cases(job, [case.as_json() for case in several]):
            yield "accuracy", result
    points = memory.training_cases(quick=options.quick) if "memory" in options.suites else []
    if "hvp" in options.suites:
        points.append(memory.hvp_case(quick=options.quick))
    for threads in options.threads:
        for case in points:
            for name in case.contestants:
                if name in available:
                    yield "memory", memory.peak_of(case, name, threads)


def _render(found: dict[str, Any], folder: Path, page: Path | None, console: Console) -> None:
    report.print_report(found, console)
    drawn = figures.draw(found, folder)
    results.write_text(folder / "results.md", report.markdown(found, drawn))
    if page is not None:
        folder_from_page = Path(os.path.relpath(folder, page.parent)).as_posix()
        page.parent.mkdir(parents=True, exist_ok=True)
        links = [f"{folder_from_page}/{name}" for name in drawn]
        results.write_text(page, report.markdown(found, links))
    console.print(f"written: {folder}")


def _command(options: argparse.Namespace) -> str:
    """Return the command without its paths, which are the machine's own affair."""
    words = ["python -m benchmarks.run"]
    if options.suites != list(SUITES):
        words.append(f"--suite {','.join(options.suites)}")
    if set(options.peers) != set(PEERS):
        words.append(f"--peers {','.join(options.peers)}")
    words.append(f"--threads {','.join(map(str, options.threads))} --seconds {options.seconds:g}")
    return " ".join([*words, "--quick"] if options.quick else words)


def _unused(folder: Path) -> Path:
    """Return the folder, or one with a number after it if results are there already."""
    names = [folder, *(folder.with_name(f"{folder.name}-{i}") for i in range(2, 1000))]
    return next(name for name in names if not (name / results.FILE).exists())


if __name__ == "__main__":
    sys.exit(main())
