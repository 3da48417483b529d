"""Measure everything that is claimed about speed, accuracy and memory.

    python -m benchmarks.run                          # all of the CPU's suites, on an idle machine
    python -m benchmarks.run --suite gated gated_cell # some
    python -m benchmarks.run --quick                  # tiny sizes: does it run at all?
    python -m benchmarks.run --device cuda            # on a GPU; `benchmarks.gpu` does more

Writes ``results.json``, ``results.md`` and a figure into a folder of ``benchmarks/results/``. For
how numbers come about see `benchmarks.timing`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import contestants, machine, quality
from benchmarks.cases import SUITES, Case, cases_of
from benchmarks.contestants import CONTESTANTS
from benchmarks.measure import measure
from benchmarks.tables import duration, empty_results, load, number, ratio_of, render, save
from benchmarks.workers import Worker, WorkerError, ask_once, measure_all

RESULTS_FOLDER = machine.REPOSITORY / "benchmarks" / "results"
QUICK_FOLDER = machine.REPOSITORY / "runs" / "benchmarks-quick"

PATIENCE = 40.0
"""Seconds that a case may take on a GPU, where a kernel that waits forever hangs its process."""

LAST_SECONDS = 6.0
"""Kept for ending, where time is limited: a process that uses a GPU takes its time to go."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return the exit status: 1 on a GPU if FusedRNN itself is at fault."""
    options = _parse(arguments)
    about = machine.describe(options.device)
    folder = options.output or (
        QUICK_FOLDER if options.quick else RESULTS_FOLDER / machine.folder_name(about)
    )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _measure(options, about, folder)
    except WorkerError as error:
        print(f"{error}; see its output above")
        return 1
    render(folder)
    line, faults = verdict_of(load(folder))
    print(line)
    return 1 if faults and options.device == "cuda" else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    cores, suites = len(machine.usable_cores()), [*SUITES["cpu"], *SUITES["cuda"]]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--suite", nargs="+", choices=suites, help="default: those of the device")
    add(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        default=list(CONTESTANTS),
        help="whom to time; the first of a case, its unit, always is",
    )
    add(
        "--threads",
        nargs="+",
        type=int,
        choices=range(1, cores + 1),
        default=[1, 2][:cores],
        help="on a CPU, one process each; as many as there are cores (default: 1 2)",
    )
    add("--seconds", type=float, help="for the rounds of a case (default: 2; GPU: 0.5; quick: 0)")
    add("--limit", type=float, default=float("inf"), help="seconds for all timings")
    add("--quick", action="store_true", help="a tiny case of each kind")
    add("--output", type=Path, help="folder for the results")
    options = parser.parse_args(arguments)
    options.suite = options.suite or SUITES[options.device]
    # With the options, but for a path, which says nothing to others.
    words = list(sys.argv[1:] if arguments is None else arguments)
    at = words.index("--output") if "--output" in words else len(words)
    options.command = " ".join(["python -m benchmarks.run", *words[:at], *words[at + 2 :]])
    if options.device == "cuda":
        options.threads = options.threads[:1]  # of the host, which does not matter there
    if options.seconds is None:
        options.seconds = 0.0 if options.quick else 0.5 if options.device == "cuda" else 2.0
    return options


def _measure(options: argparse.Namespace, about: dict[str, Any], folder: Path) -> None:
    """Measure what the options ask for; results so far are on disk after each case."""
    end = time.monotonic() + options.limit - LAST_SECONDS
    results = empty_results(
        command=options.command,
        device=options.device,
        machine=about,
        quick=options.quick,
        # Compiles the kernels too, if need be, before anything is timed.
        **ask_once(options.threads[0], options.device, contestants.describe, options.device),
    )
    for result in _results(options, results, end):
        results["timings"].append(result)
        print(_progress(result), flush=True)
        save(results, folder)
    results["complete"] = True
    save(results, folder)


def _results(
    options: argparse.Namespace, results: dict[str, Any], end: float
) -> Iterator[dict[str, Any]]:
    """Yield the result of each case, at each number of threads."""
    names = [n for n in options.contestants if not results["contestants"][n]["missing"]]
    cases = cases_of(options.suite, quick=options.quick)
    timed = [case for case in cases if case.suite != "memory"]
    patience = PATIENCE if options.device == "cuda" else None
    results["unmeasured"] = len(timed) * len(options.threads)
    for threads in options.threads:
        for result in measure_all(
            *(timed, measure, names, options.seconds, options.device),
            lambda threads=threads: Worker(threads, options.device),
            end=end,
            patience=patience,
        ):
            results["unmeasured"] -= 1
            yield result
        for case in [case for case in cases if case.suite == "memory"]:
            peaks: dict[str, Any] = {}
            for name in [n for n in case.contestants if n in names]:
                try:
                    peaks[name] = {
                        "bytes": ask_once(threads, "cpu", quality.peak_bytes, case, name)
                    }
                except WorkerError as error:
                    peaks[name] = {"skipped": f"failed: {error}"}
            yield {"case": asdict(case), "threads": threads, "contestants": peaks}


def _progress(result: dict[str, Any]) -> str:
    """Return a line that says what was just measured, and who was left out."""
    words = [result["failed"]] if "failed" in result else []
    for name, entry in result.get("contestants", {}).items():
        if "seconds" in entry:
            ratio = number(entry.get("ratio", {}).get("median"))
            words.append(f"{name} {ratio} ({duration(entry['seconds']['median'])})")
        elif "bytes" in entry:
            words.append(f"{name} {number(entry['bytes'] / 2**20)} MiB")
        else:
            words.append(f"{name} {entry['skipped']}")
    name = Case.from_json(result["case"]).name
    return f"{name} {result.get('threads', '')}: {', '.join(words)}"


def verdict_of(results: dict[str, Any]) -> tuple[str, list[str]]:
    """Return a line on the timings, and the cases in which our layer itself is at fault."""
    faults, ratios = [], []
    for timing in results["timings"]:
        case = Case.from_json(timing["case"])
        why = timing.get("failed") or timing["contestants"].get(case.ours, {}).get("skipped")
        faults += [f"{case.name}: {why}"] if why else []
        ratios += filter(None, [ratio_of(timing, case.ours)])
    planned = len(results["timings"]) + results["unmeasured"]
    if planned and not ratios:
        return f"none of {planned} cases was timed", faults or ["nothing was timed"]
    mean = number(statistics.geometric_mean(ratios)) if ratios else "-"
    slower = sum(ratio < 1 for ratio in ratios)
    line = f"{len(ratios)} of {planned} cases, geometric mean {mean}, {slower} below 1"
    return "; wrong: ".join([line, *faults[:3]]), faults


if __name__ == "__main__":
    sys.exit(main())
