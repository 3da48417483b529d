"""Everything that needs a GPU, in one call: build, check, test, time, sanitize and profile.

    python -m benchmarks.gpu                    # everything, in under nine minutes
    python -m benchmarks.gpu --stage bench      # one stage, or several
    python -m benchmarks.gpu --rehearsal        # without a GPU: does the script itself run?

Stages are commands, each with a time limit of its own inside the limit of the whole run. What
they print is in NAME.txt beside the results. docs/cuda-on-a-gpu.md says how to read them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine
from benchmarks.cases import SUITES
from benchmarks.gpu.build import find_tool
from benchmarks.run import RESULTS_FOLDER

TOTAL = 530.0
"""Seconds for all stages: nine minutes, less what starting and reporting take."""


@dataclass(frozen=True)
class Stage:
    """A command, and what follows from how it ends."""

    command: Sequence[str]
    limit: float
    """Seconds; less where less is left."""

    required: bool = True
    """Whether the run fails with it."""

    must_print: str = ""
    """A pattern without which the output is that of a failure."""


def stages(folder: Path, device: str) -> dict[str, Stage]:
    """Return all stages in the order in which they run: what matters most comes first."""
    python, module = [sys.executable, "-c"], [sys.executable, "-m"]
    on_card = device == "cuda"
    extension = "import torch; from rnn_cuda import backend; "
    extension += f"print('native:', backend.use_native({device!r}, torch.float32))"
    flashrnn = "from benchmarks.contestants.flashrnn import prebuild; prebuild()"
    # A file without a marked test is not even imported: it may need what is not installed.
    tests = ["pytest", "-q", "-m", "gpu", "--maxfail", "10", "-p", "no:cacheprovider"]
    tests += ["-o", "faulthandler_timeout=30", *map(str, gpu_test_files())]
    bench = ["benchmarks.run", "--suite", *SUITES["cuda"], "--device", device, "--limit", "130"]
    bench += ["--output", str(folder), *([] if on_card else ["--quick", "--threads", "1"])]
    profile = [*module, "benchmarks.gpu.profile_step", device]
    objects = folder.parent / "checker"  # the next run continues a build that was cut short
    checker = [str(objects / "checker"), "--problems"]
    # Nothing is allowed between any two allocations, so that an overrun hits that. The last tool
    # reports hazards in mbarrier code that are not real.
    tools = {"memcheck": ["--padding", "64"], "synccheck": [], "initcheck": []}
    tools["racecheck"] = ["--racecheck-report", "all"]
    sanitizer = [find_tool("compute-sanitizer"), "--error-exitcode", "9", "--print-limit", "20"]
    # The card's clocks are as they are: others may share it.
    ncu = [find_tool("ncu"), "--clock-control", "none", "--set", "basic", "-c", "2"]
    ncu += ["--section", "WarpStateStats", "--section", "MemoryWorkloadAnalysis"]
    ncu += ["-k", "regex:walk_kernel|step_kernel"]
    must_print = r"\d+ passed" if on_card else ""  # on a card, that all were skipped is a failure
    everything = {
        "extension": Stage([*python, extension], 120),
        "checker": Stage([*module, "benchmarks.gpu.build", str(objects)], 100),
        **{
            f"check {residency}": Stage([*checker, "400", "--residency", residency], 15)
            for residency in ("one_sm", "cluster", "grid", "streamed")
        },
        "tests": Stage([*module, *tests], 70, must_print=must_print),
        "flashrnn": Stage([*python, flashrnn], 60, required=False),
        "bench": Stage([*module, *bench], 135),
        **{
            name: Stage(
                [*sanitizer, "--tool", name, *more, *checker, "40", "--small"],
                *(40, name != "racecheck"),
            )
            for name, more in tools.items()
        },
        "profile": Stage([*profile, "--torch-profiler"], 40, required=False),
        "ncu": Stage([*ncu, *profile], 40, required=False),
    }
    rehearsed = ("extension", "tests", "bench", "profile")
    return {name: everything[name] for name in everything if on_card or name in rehearsed}


def gpu_test_files(folder: Path = machine.REPOSITORY / "tests") -> list[Path]:
    """Return the test files that mark a test with ``gpu``."""
    marked = re.compile(r"\bmark\.gpu\b")
    return [p for p in sorted(folder.rglob("test_*.py")) if marked.search(p.read_text("utf-8"))]


def run_stage(name: str, stage: Stage, folder: Path, seconds: float) -> tuple[str, str]:
    """Run a stage in at most so many seconds; return how it ended, and why or its last line.

    It ended "passed", "failed" or "skipped". At its limit it ends with all that it started.
    """
    limit = min(stage.limit, seconds)
    if limit < stage.limit / 4:
        # A required stage that was not reached leaves open what it was to show.
        return "failed" if stage.required else "skipped", "no time left"
    if shutil.which(stage.command[0]) is None:
        return "skipped", f"there is no {stage.command[0]} here"
    # No fallback may pass for a kernel.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "RNN_CUDA_BACKEND": "native"}
    command = ["timeout", "--signal=KILL", str(limit), *stage.command]  # the whole process group
    output = folder / f"{name}.txt"
    with output.open("wb") as stream:
        status = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment
        ).returncode
    text = output.read_text(errors="replace")
    lines = [line.strip(" =") for line in text.splitlines() if line.strip(" =")] or ["no output"]
    # A sanitizer's summary is not its last word.
    summary = [line for line in lines if re.search(r"(ERROR|RACECHECK) SUMMARY", line)]
    note = (summary or lines)[-1][:200]
    if "Device not supported" in text:  # a tool that does not work on this machine
        return "skipped", note
    if status == 0 and re.search(stage.must_print, text):
        return "passed", note
    print("\n".join(f"    {line}" for line in lines[-15:]))
    how = {0: f"nothing like {stage.must_print!r}", -9: f"killed, if not before at {limit:.0f} s"}
    return "failed", f"{how.get(status, f'exit status {status}')}; last line: {note}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages, print a line for each last; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    add = parser.add_argument
    add("--stage", nargs="+", choices=stages(Path(), "cuda"), help="which (default: all)")
    add("--seconds", type=float, default=TOTAL, help="for everything (default: %(default)s)")
    add("--output", type=Path, help="default: CARD-DATE in $OUT, or in benchmarks/results/")
    add("--rehearsal", action="store_true", help="tiny problems on the CPU")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    device = "cpu" if options.rehearsal else "cuda"
    about = machine.describe(device)
    parent = machine.REPOSITORY / "runs" if options.rehearsal else RESULTS_FOLDER
    folder = options.output or Path(os.environ.get("OUT") or parent) / machine.folder_name(about)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {
        name: stage
        for name, stage in stages(folder, device).items()
        if name in (options.stage or [name])
    }
    lines, failed = [], False
    for name, stage in chosen.items():
        print(f"{name} ...", flush=True)
        begin = time.monotonic()
        status, note = run_stage(name, stage, folder, end - begin)
        lines.append(f"{name:14} {status:8} {time.monotonic() - begin:4.0f} s  {note}")
        print(lines[-1], flush=True)
        failed |= stage.required and status == "failed"
    lines.append("FAILED" if failed else "PASSED")
    (folder / "stages.txt").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
