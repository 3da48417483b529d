"""Measure everything that is claimed about speed, accuracy and memory.

    python -m benchmarks.run                          # all of the CPU's suites, on an idle machine
    python -m benchmarks.run --suite table,memory     # some
    python -m benchmarks.run --quick                  # tiny sizes: does it run at all?
    python -m benchmarks.run --device cuda            # on a GPU; `benchmarks.gpu` does more
    python -m benchmarks.run --render FOLDER/results.json

Writes ``results.json``, ``results.md`` and a figure into a folder of ``benchmarks/results/``. For
how numbers come about see `benchmarks.timing`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.cases import BASELINE, SUITES, TITLES, Case, cases_of
from benchmarks.contestants import CONTESTANTS
from benchmarks.quality import accuracy_cases
from benchmarks.report import FILE, command_line, empty_results, load, render, save, unused
from benchmarks.tables import duration, number, ratio_of
from benchmarks.timing import geometric_mean
from benchmarks.workers import PATIENCE, Worker, WorkerError, ask_once, measure_all

RESULTS_FOLDER = machine.REPOSITORY / "benchmarks" / "results"
QUICK_FOLDER = machine.REPOSITORY / "runs" / "benchmarks-quick"

LAST_SECONDS = 6.0
"""Kept for ending, where time is limited: a process that uses a GPU takes its time to go."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or render what was measured; return the exit status."""
    options = _parse(arguments)
    if options.render is not None:
        render(load(options.render), options.render.parent, options.page)
        return 0
    try:
        results, folder = _measure(options, arguments)
    except WorkerError as error:
        print(f"{error}; see its output above")
        return 1
    render(results, folder, options.page)
    line, faults = verdict_of(results)
    print(line)
    return 1 if faults and options.device == "cuda" else 0


# ---- options -------------------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    cores, names = len(machine.usable_cores()), [*SUITES["cpu"], *SUITES["cuda"]]
    suites = "; ".join(f"{name}: {TITLES[name]}" for name in names)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="Measure speed, accuracy and memory."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--suite",
        help=f"which, by commas (default: those of the device). {suites}".replace("%", "%%"),
    )
    parser.add_argument(
        "--contestants",
        default=",".join(CONTESTANTS),
        help=f"whom to time of {', '.join(CONTESTANTS)}; {BASELINE}, the unit, always is",
    )
    parser.add_argument(
        "--threads", default="1,2", help="on a CPU, one process each (default: 1,2)"
    )
    parser.add_argument(
        "--seconds", type=float, help="for the rounds of each case (default: 2; quick: 0.02)"
    )
    parser.add_argument("--limit", type=float, help="seconds for all timings")
    parser.add_argument("--quick", action="store_true", help="a few tiny cases of each suite")
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--render", type=Path, help="no measuring: tables and figures of this file")
    parser.add_argument(
        "--page", type=Path, help="also write the tables here, with links to the figures"
    )
    options = parser.parse_args(arguments)
    options.suites = _chosen(
        parser, "suite", options.suite or ",".join(SUITES[options.device]), names
    )
    options.contestants = _chosen(parser, "contestant", options.contestants, list(CONTESTANTS))
    try:
        threads = sorted({int(count) for count in options.threads.split(",")})
    except ValueError:
        parser.error(f"--threads takes whole numbers and commas, got {options.threads!r}")
    if threads[0] < 1:
        parser.error(f"--threads takes positive numbers, got {threads[0]}")
    options.threads = [count for count in threads if count <= cores]
    if options.device == "cuda":
        options.threads = options.threads[:1]  # of the host, which does not matter there
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


# ---- measuring -----------------------------------------------------------------------------------


def _measure(
    options: argparse.Namespace, arguments: Sequence[str] | None
) -> tuple[dict[str, Any], Path]:
    """Measure what the options ask for; results so far are on disk after each case."""
    end = None if options.limit is None else time.monotonic() + options.limit - LAST_SECONDS
    about = machine.describe(options.device)
    folder = options.output or (
        QUICK_FOLDER if options.quick else unused(RESULTS_FOLDER / machine.folder_name(about))
    )
    folder.mkdir(parents=True, exist_ok=True)
    results = empty_results(
        command=command_line("benchmarks.run", arguments),
        device=options.device,
        machine=about,
        suites=options.suites,
        threads=options.threads,
        seconds=options.seconds,
        quick=options.quick,
        # Compiles the kernels too, if need be, before anything is timed.
        **ask_once(options.threads[0], options.device, "contestants.describe", options.device),
    )
    for kind, result in _results(options, results, end):
        results[kind].append(result)
        print(_progress(kind, result), flush=True)
        save(results, folder)
    results["complete"] = True
    save(results, folder)
    # What the file holds, so that rendering it again gives the same tables to the last digit.
    return load(folder / FILE), folder


def _results(
    options: argparse.Namespace, results: dict[str, Any], end: float | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the list a result belongs in, and the result."""
    names = [n for n in options.contestants if not results["contestants"][n]["missing"]]
    cases = cases_of(options.suites, quick=options.quick)
    points = [case for case in cases if case.suite in ("memory", "hvp")]
    cases = [case for case in cases if case.suite != "memory"]
    patience = PATIENCE if options.device == "cuda" else None
    for threads in options.threads if cases else []:
        left = {case.name: None for case in cases}

        def start(threads: int = threads) -> Worker:
            return Worker(threads, options.device)

        measured = measure_all(
            cases, names, options.seconds, options.device, start, end=end, patience=patience
        )
        for result in measured:
            left.pop(Case.from_json(result["case"]).name, None)
            results["unmeasured"] = list(left)
            if options.device == "cpu":
                result.setdefault("threads", threads)
            yield "timings", result
        results["unmeasured"] = list(left)
    if "accuracy" in options.suites:
        with contextlib.closing(Worker(options.threads[-1])) as worker:
            for case in accuracy_cases(quick=options.quick):
                yield "accuracy", worker.ask("quality.errors_of", case)
    for threads in options.threads if points else []:
        for case in points:
            for name in [n for n in case.contestants if n in names]:
                point = {"case": case.as_json(), "contestant": name, "threads": threads}
                try:
                    point["bytes"] = ask_once(threads, "cpu", "quality.peak_bytes", case, name)
                except WorkerError as error:
                    point["skipped"] = f"failed: {error}"
                yield "memory", point


def _progress(kind: str, result: dict[str, Any]) -> str:
    """Return a line that says what was just measured."""
    if kind == "accuracy":
        return f"accuracy {result['case']['name']}: {'passed' if result['passed'] else 'FAILED'}"
    start = f"{Case.from_json(result['case']).name} {result.get('threads', '')}".strip()
    if kind == "memory":
        size = f"{result['bytes'] / 2**20:.1f} MiB" if "bytes" in result else result["skipped"]
        return f"{start} memory {result['contestant']}: {size}"
    if "failed" in result:
        return f"{start}: {result['failed']}"
    words = []
    for launch in ("contestants", "graphed"):
        for name, entry in result.get(launch, {}).items():
            if "seconds" in entry:
                ratio = number(entry.get("ratio", {}).get("median"))
                words.append(f"{name} {ratio} ({duration(entry['seconds']['median'])})")
            elif str(entry["skipped"]).startswith(("failed", "computes")):
                words.append(f"{name} {entry['skipped']}")
    return f"{start}: {', '.join(words)}"


def verdict_of(results: dict[str, Any]) -> tuple[str, list[str]]:
    """Return a line on the timings, and the cases in which FusedRNN itself is at fault.

    A capture in a graph that fails is FusedRNN's fault only where torch.nn.RNN can be captured.
    """
    faults, ratios = [], []
    for timing in results["timings"]:
        case = Case.from_json(timing["case"])
        if "failed" in timing:
            faults.append(f"{case.name}: {timing['failed']}")
            continue
        for launch in ("contestants", "graphed"):
            entry = timing.get(launch, {}).get(case.ours, {})
            comparable = "seconds" in timing.get(launch, {}).get(case.baseline, {})
            if "skipped" in entry and (launch == "contestants" or comparable):
                faults.append(f"{case.name}: {entry['skipped']}")
        ratios += filter(None, [ratio_of(timing, case.ours)])
    planned = len(results["timings"]) + len(results["unmeasured"])
    if planned and not ratios:
        return f"none of {planned} cases was timed", faults or ["nothing was timed"]
    mean = number(geometric_mean(ratios)) if ratios else "-"
    slower = sum(ratio < 1 for ratio in ratios)
    line = f"{len(results['timings'])} of {planned} cases, geometric mean {mean}, {slower} below 1"
    return "; ".join([line, *(["wrong: " + "; ".join(faults[:3])] if faults else [])]), faults


if __name__ == "__main__":
    sys.exit(main())
