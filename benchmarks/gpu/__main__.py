"""Everything that needs a GPU, in one call: build, check, test, time, sanitize and profile.

    python -m benchmarks.gpu                    # everything, in under nine minutes
    python -m benchmarks.gpu --stage bench      # one stage, or several
    python -m benchmarks.gpu --rehearsal        # without a GPU: does the script itself run?

Stages are child processes, each with a time limit of its own inside the limit of the whole run.
docs/cuda-on-a-gpu.md says what they do and how to read the results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import SUITES
from benchmarks.gpu.build import find_tool
from benchmarks.machine import REPOSITORY, folder_name
from benchmarks.tables import FILE, empty_results, load, render, save

RESULTS_FOLDER = REPOSITORY / "benchmarks" / "results"
RUNS_FOLDER = REPOSITORY / "runs" / "benchmarks-gpu"

TOTAL = 530.0
"""Seconds for all stages: nine minutes, less what starting and reporting take."""

SECONDS = "{seconds}"
"""In a command: the limit that it is run under."""

SHORTEST = 8.0
"""Seconds without which no stage is started."""

GRACE = 3.0
"""Seconds between asking a stage to end and ending it."""


@dataclass(frozen=True)
class Stage:
    """A command, and what follows from how it ends."""

    command: Sequence[str]
    limit: float
    """Seconds; less where less is left."""

    needs: Sequence[str] = ()
    """Stages that must have passed, if they are part of the run."""

    required: bool = True
    """Whether the run fails with it."""

    must_print: str = ""
    """A pattern without which the output is that of a failure."""


def stages(work: Path, device: str) -> dict[str, Stage]:
    """Return all stages in the order in which they run: what matters most comes first."""
    python, module = [sys.executable], [sys.executable, "-m"]
    on_card = device == "cuda"
    extension = "import torch; from rnn_cuda import backend; "
    extension += f"print('native:', backend.use_native({device!r}, torch.float32))"
    flashrnn = "from benchmarks.contestants.flashrnn import prebuild; prebuild()"
    # A file without a marked test is not even imported: it may need what is not installed.
    tests = ["pytest", "-q", "-m", "gpu", "--maxfail", "10", "-p", "no:cacheprovider"]
    tests += ["-o", "faulthandler_timeout=30", *map(str, gpu_test_files())]
    bench = ["benchmarks.run", "--suite", *SUITES["cuda"], "--device", device, "--limit", SECONDS]
    bench += ["--output", str(work / "bench"), *([] if on_card else ["--quick", "--threads", "1"])]
    profile = ["benchmarks.gpu.profile_step", device]
    checker = str(work / "checker")
    sanitizer = [find_tool("compute-sanitizer"), "--error-exitcode", "9", "--print-limit", "20"]
    small = [checker, "--problems", "40", "--small"]
    # Nothing is allowed between any two allocations, so that an overrun hits that.
    memcheck = [*sanitizer, "--tool", "memcheck", "--padding", "64", *small]
    racecheck = [*sanitizer, "--tool", "racecheck", "--racecheck-report", "all", *small]
    # The card's clocks are as they are: others may share it.
    ncu = [find_tool("ncu"), "--clock-control", "none", "--set", "basic", "-c", "2"]
    ncu += ["--section", "WarpStateStats", "--section", "MemoryWorkloadAnalysis"]
    ncu += ["-k", "regex:walk_kernel|step_kernel"]
    everything = {
        "info": Stage([*module, "benchmarks.machine", device], 30),
        "extension": Stage([*python, "-c", extension], 120, ["info"]),
        "programs": Stage([*module, "benchmarks.gpu.build", str(work)], 100, ["info"]),
        **{
            f"check {residency}": Stage(
                [checker, "--problems", "400", "--residency", residency], 15, ["programs"]
            )
            for residency in ("one_sm", "cluster", "grid", "streamed")
        },
        # On a card, that all were skipped is a failure.
        "tests": Stage(
            [*module, *tests], 70, ["extension"], must_print=r"\d+ passed" if on_card else ""
        ),
        "flashrnn": Stage([*python, "-c", flashrnn], 60, ["info"], required=False),
        "bench": Stage([*module, *bench], 135, ["extension"]),
        "floor": Stage(
            [*module, "benchmarks.gpu.floor", str(work)], 25, ["programs"], required=False
        ),
        "memcheck": Stage(memcheck, 45, ["programs"]),
        "synccheck": Stage([*sanitizer, "--tool", "synccheck", *small], 30, ["programs"]),
        "initcheck": Stage([*sanitizer, "--tool", "initcheck", *small], 30, ["programs"]),
        # It reports hazards in mbarrier code that are not real.
        "racecheck": Stage(racecheck, 40, ["programs"], required=False),
        "profile": Stage(
            [*module, *profile, "--torch-profiler"], 40, ["extension"], required=False
        ),
        "ncu": Stage([*ncu, *module, *profile], 40, ["extension"], required=False),
    }
    rehearsed = ("info", "extension", "tests", "bench", "profile")
    return {name: everything[name] for name in everything if on_card or name in rehearsed}


def gpu_test_files(folder: Path = REPOSITORY / "tests") -> list[Path]:
    """Return the test files that mark a test with ``gpu``."""
    marked = re.compile(r"\bmark\.gpu\b")
    return [p for p in sorted(folder.rglob("test_*.py")) if marked.search(p.read_text("utf-8"))]


# ---- running -------------------------------------------------------------------------------------


def run_stages(
    chosen: Mapping[str, Stage], work: Path, seconds: float, outcomes: list[dict[str, Any]]
) -> None:
    """Run stages in order. A failed one takes with it only those that need what it makes.

    Args:
        chosen: stages by name.
        work: a folder for their output.
        seconds: for all of them.
        outcomes: gets ``name``, ``status`` ("passed", "failed" or "skipped"), ``seconds``, ``note``
            (its last line or why it did not run) and ``required`` of each as it ends.
    """
    end = time.monotonic() + seconds
    for name, stage in chosen.items():
        begin = time.monotonic()
        limit = min(stage.limit, end - begin)
        bad = [o for o in outcomes if o["name"] in stage.needs and o["status"] != "passed"]
        if bad:
            status, note = "skipped", f"{bad[0]['name']} {bad[0]['status']}"
        elif limit < min(SHORTEST, stage.limit):
            # A required stage that was not reached leaves open what it was to show.
            status, note = "failed" if stage.required else "skipped", "no time left"
        else:
            print(f"{name} (at most {limit:.0f} s) ...", flush=True)
            status, note = run_stage(name, stage, work, limit)
        taken = round(time.monotonic() - begin, 1)
        outcomes.append(
            {"name": name, "status": status, "seconds": taken, "note": note}
            | {"required": stage.required}
        )
        print(f"{name:12} {status:8} {taken:4.0f} s  {note}", flush=True)


def run_stage(name: str, stage: Stage, work: Path, limit: float) -> tuple[str, str]:
    """Run a stage; return how it ended. Its output goes into ``NAME.txt`` and the log."""
    command = [word.replace(SECONDS, f"{limit:.0f}") for word in stage.command]
    if shutil.which(command[0]) is None:
        return "skipped", f"there is no {command[0]} here"
    output = work / f"{name}.txt"
    with output.open("wb") as stream:
        how = _ended(command, stream, limit)
    text = output.read_bytes()[-(4 << 20) :].decode(errors="replace")
    with (work / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"=== {name}: {' '.join(command)}\n{text}\n=== {how or 'done'}\n")
    lines = [line.strip(" =") for line in text.splitlines() if line.strip(" =")] or ["no output"]
    # A sanitizer's summary is not its last word.
    summary = [line for line in lines if re.search(r"(ERROR|RACECHECK) SUMMARY", line)]
    note = (summary or lines)[-1][:200]
    if "Device not supported" in text:  # a tool that does not work on this machine
        return "skipped", note
    if how is None and not re.search(stage.must_print, text):
        how = f"nothing like {stage.must_print!r} in its output"
    if how is None:
        return "passed", note
    print("\n".join(f"    {line}" for line in lines[-15:]))
    return "failed", f"{how}; last line: {note}"


def _ended(command: Sequence[str], stream: Any, limit: float) -> str | None:
    """Return how the command ended, None if well; no child of its own survives."""
    # No fallback may pass for a kernel.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "RNN_CUDA_BACKEND": "native"}
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": stream, "env": environment}
    process = subprocess.Popen(command, stderr=subprocess.STDOUT, start_new_session=True, **options)
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return f"ended after {limit:.0f} s"
    finally:
        # What it started may outlive it, and hold the device.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    status = process.returncode
    return None if status == 0 else f"signal {-status}" if status < 0 else f"exit status {status}"


# ---- a run ---------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages, write what they found, print a short table last; return the exit status."""
    work = RUNS_FOLDER / "work"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    add = parser.add_argument
    add("--stage", nargs="+", choices=stages(work, "cuda"), help="which (default: all)")
    add("--seconds", type=float, default=TOTAL, help="for everything (default: %(default)s)")
    add("--output", type=Path, help="default: CARD-DATE in $OUT, or in benchmarks/results/")
    add("--rehearsal", action="store_true", help="tiny problems on the CPU")
    options = parser.parse_args(arguments)
    device = "cpu" if options.rehearsal else "cuda"
    chosen = stages(work, device)
    if options.stage:
        chosen = {name: chosen[name] for name in chosen if name in options.stage}

    # What an earlier run left of results goes; what it compiled stays.
    work.mkdir(parents=True, exist_ok=True)
    for path in (*work.glob("*.txt"), work / "floor.json", work / "bench" / FILE):
        path.unlink(missing_ok=True)
    outcomes: list[dict[str, Any]] = []
    with contextlib.suppress(KeyboardInterrupt):
        run_stages(chosen, work, options.seconds, outcomes)
    failed = any(o["required"] and o["status"] == "failed" for o in outcomes)
    complete = 0 < len(outcomes) == len(chosen)
    passed = complete and not failed
    results = results_in(work, device) | {"stages": outcomes, "complete": complete}

    whole = options.stage is None and not options.rehearsal and "card" in results["machine"]
    parent = Path(os.environ.get("OUT") or (RESULTS_FOLDER if whole else RUNS_FOLDER))
    folder = options.output or parent / folder_name(results["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    save(results, folder)
    for name in ("log.txt", "profile.txt", "ncu.txt"):
        if (work / name).is_file():
            shutil.copyfile(work / name, folder / name)
    print()
    render(folder, short=True)
    print("PASSED" if passed else "FAILED")
    return 0 if passed else 1


def results_in(work: Path, device: str) -> dict[str, Any]:
    """Return everything that the stages left in the folder."""
    results = empty_results(contestants={}, backend="native", device=device, quick=device == "cpu")
    if (work / "bench" / FILE).is_file():
        results |= load(work / "bench")
    info, floor = work / "info.txt", work / "floor.json"
    results["machine"] = {"cpu": "no card", "date": ""}
    with contextlib.suppress(OSError, ValueError, IndexError):
        results["machine"] = json.loads(info.read_text().splitlines()[-2])
    with contextlib.suppress(OSError):
        results["floor"] = json.loads(floor.read_text())
    return results | {"command": "python -m benchmarks.gpu"}


if __name__ == "__main__":
    sys.exit(main())
