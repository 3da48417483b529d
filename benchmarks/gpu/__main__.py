"""The command line, and the stages of a run in their order.

python -m benchmarks.gpu                    everything, in under nine minutes
python -m benchmarks.gpu --stage bench      one stage, or several by commas
python -m benchmarks.gpu --rehearsal        without a GPU: does the script itself run?
python -m benchmarks.gpu --render FILE      no measuring: the tables of a results.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import SUITES, cases_of
from benchmarks.contestants import CONTESTANTS
from benchmarks.gpu.build import find_tool
from benchmarks.gpu.stages import SECONDS, Runner, Stage
from benchmarks.machine import REPOSITORY, folder_name
from benchmarks.report import FILE, command_line, empty_results, load, render, save, unused

RESULTS_FOLDER = REPOSITORY / "benchmarks" / "results"
RUNS_FOLDER = REPOSITORY / "runs" / "benchmarks-gpu"

TOTAL = 530.0
"""Seconds for all stages: nine minutes, less what starting and reporting take."""

SANITIZERS = ("memcheck", "synccheck", "initcheck", "racecheck")
STAGES = ("info", "extension", "programs", "check", "tests", "flashrnn", "bench", "floor")
STAGES += (*SANITIZERS, "profile")
"""In the order in which they run: what matters most comes first."""

RESIDENCIES = ("one_sm", "cluster", "grid", "streamed")
DTYPES = ("float32", "bfloat16", "float16", "float64")

PROBLEMS, SMALL_PROBLEMS = 1500, 40
"""Random problems for the checker, and tiny ones for a part of it or under a sanitizer."""

EXPLAINING = 90.0
"""Seconds at most that go into saying why the checker failed, before the run goes on."""


def stage_of(name: str, work: Path, device: str = "cuda", commit: str | None = None) -> Stage:
    """Return a stage by name; ``check:grid:float32`` is a part of ``check``."""
    kind, *part = name.split(":")
    python = (sys.executable, "-m")
    info, bench, checker = (str(work / name) for name in ("info.json", "bench", "checker"))
    on_card, why_not = device == "cuda", ""
    required = kind not in ("flashrnn", "floor", "racecheck", "profile") and not part
    options: dict[str, Any] = {}
    commands: list[Sequence[str]] = []
    if kind == "info":
        limit, needs = 30.0, ()
        commands = [[*python, "benchmarks.machine", device, "--write", info]]
        commands[0] += ["--commit", commit] if commit else []
    elif kind == "extension":
        limit, needs = 120.0, ("info",)
        program = f"print('native:', backend.use_native({device!r}, torch.float32))"
        commands = [[*python[:1], "-c", f"import torch; from rnn_cuda import backend; {program}"]]
    elif kind == "programs":
        limit, needs = 100.0, ("info",)
        commands = [[*python, "benchmarks.gpu.build", str(work)]] if on_card else []
    elif kind == "check":
        limit, needs = 15.0 if part else 45.0, ("programs",)
        commands = [[checker, *_checked(part)]] if on_card else []
    elif kind == "tests":
        limit, needs = 70.0, ("extension",)
        # A file without a marked test is not even imported: it may need what is not installed.
        command = [*python, "pytest", "-q", "-m", "gpu", "--maxfail", "10", "-p"]
        command += ["no:cacheprovider", "-o", "faulthandler_timeout=30"]
        commands = [[*command, *map(str, gpu_test_files())]]
        # On a card, that all were skipped is a failure.
        options = {"must_print": r"\d+ passed"} if on_card else {"cannot_run": r"\d+ skipped"}
    elif kind == "flashrnn":
        limit, needs = 60.0, ("info",)
        sizes = [case.H for case in cases_of(["flashrnn"])]
        program = f"from benchmarks.contestants.flashrnn import prebuild; prebuild({sizes})"
        why_not = CONTESTANTS["flashrnn"].missing(device) or ""
        commands = [] if why_not else [[*python[:1], "-c", program]]
    elif kind == "bench":
        limit, needs = 135.0, ("extension",)
        command = [*python, "benchmarks.run", "--limit", SECONDS, "--output", bench]
        command += ["--suite", ",".join(SUITES["cuda"]), "--device", device]
        commands = [command + ([] if on_card else ["--quick", "--threads", "1"])]
    elif kind == "floor":
        limit, needs = 25.0, ("info", "programs")
        commands = [[*python, "benchmarks.gpu.floor", str(work)]] if on_card else []
    elif kind in SANITIZERS:
        limit, needs = {"memcheck": 45.0, "racecheck": 40.0}.get(kind, 30.0), ("programs",)
        if on_card and (tool := find_tool("compute-sanitizer")):
            command = [tool, "--tool", kind, "--error-exitcode", "9", "--print-limit", "20"]
            # Between any two allocations, so that an overrun hits nothing that is allowed.
            command += ["--padding", "64"] if kind == "memcheck" else []
            command += ["--racecheck-report", "all"] if kind == "racecheck" else []
            commands = [[*command, checker, *_checked(part, small=True)]]
        why_not = "there is no compute-sanitizer here" if on_card else ""
        options = {"cannot_run": "Device not supported"}
    else:
        limit, needs = 40.0, ("extension",)
        step = [*python, "benchmarks.gpu.profile_step", device]
        commands = [*(_profilers(work, step) if on_card else []), [*step, "--torch-profiler"]]
        options = {"must_not_print": "==ERROR==|No kernels"}
    # No fallback may pass for a kernel. The stand-in has none to fall back from.
    options["environment"] = {"RNN_CUDA_BACKEND": "native"} if on_card else {}
    options["why_not"] = why_not or "it needs a GPU"
    return Stage(name, tuple(map(tuple, commands)), limit, required, needs, **options)


def _checked(part: Sequence[str], *, small: bool = False) -> list[str]:
    """Return the checker's arguments for everything, or for a residency and a dtype."""
    small = small or bool(part)
    words = ["--problems", str(SMALL_PROBLEMS if small else PROBLEMS)]
    for option, value in zip(("--residency", "--dtype"), part, strict=False):
        words += [option, value]
    return [*words, "--small"] if small else words


def _profilers(work: Path, step: Sequence[str]) -> list[list[str]]:
    """Return the profilers found here, the one that says most first, with their commands."""
    commands = []
    if ncu := find_tool("ncu"):
        # The card's clocks are as they are: others may share it.
        options = ["--clock-control", "none", "--set", "basic", "--section", "WarpStateStats"]
        options += ["--section", "MemoryWorkloadAnalysis", "-k", "regex:walk_kernel|step_kernel"]
        commands.append([ncu, *options, "-c", "2", *step])
    if nsys := find_tool("nsys"):
        options = ["--trace", "cuda", "--stats", "true", "--force-overwrite", "true"]
        commands.append([nsys, "profile", *options, "-o", str(work / "nsys"), *step])
    return commands


def gpu_test_files(folder: Path = REPOSITORY / "tests") -> list[Path]:
    """Return the test files that mark a test with ``gpu``."""
    marked = re.compile(r"\bmark\.gpu\b")
    return [p for p in sorted(folder.rglob("test_*.py")) if marked.search(p.read_text("utf-8"))]


# ---- a run ---------------------------------------------------------------------------------------


def run_stages(
    runner: Runner, names: Sequence[str], work: Path, device: str, commit: str | None = None
) -> None:
    """Run stages in order. A failed one takes with it only those that need what it makes."""
    for name in names:
        outcome = runner.run(stage_of(name, work, device, commit))
        if name == "check" and outcome.status == "failed":
            explain(runner, work)


def explain(runner: Runner, work: Path) -> None:
    """Say which kernels are wrong: each residency, then dtypes of a bad one, then sanitizers.

    A failure that shows in no part is left to the sanitizers of the whole, which come later.
    """
    end = runner.elapsed + EXPLAINING

    def fails(*words: str) -> bool:
        if runner.elapsed > end:
            return False
        return runner.run(stage_of(":".join(words), work)).status == "failed"

    bad = [residency for residency in RESIDENCIES if fails("check", residency)]
    # Persistent kernels have no float64.
    dtypes = DTYPES if bad[:1] == ["streamed"] else DTYPES[:3]
    places = [(r, d) for r in bad[:1] for d in dtypes if fails("check", r, d)]
    for place in places[:1] or [(r,) for r in bad[:1]]:
        for tool in SANITIZERS[:2]:
            fails(tool, *place)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages, write what they found, print a short table last; return the exit status."""
    options = _parse(arguments)
    if options.render is not None:
        render(load(options.render), options.render.parent)
        return 0
    work = RUNS_FOLDER / "work"
    work.mkdir(parents=True, exist_ok=True)
    # What an earlier run left of results goes; what it compiled stays.
    for name in ("log.txt", "info.json", "floor.json", f"bench/{FILE}"):
        (work / name).unlink(missing_ok=True)
    runner = Runner(options.seconds, work)
    device, complete = "cpu" if options.rehearsal else "cuda", True
    try:
        run_stages(runner, options.stages, work, device, options.commit)
    except KeyboardInterrupt:
        print("interrupted")
        complete = False
    results = collected(work, runner, complete, device)
    results["command"] = command_line("benchmarks.gpu", arguments)
    folder = _folder(options, results["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    save(results, folder)
    for name in ("log.txt", "profile.txt"):
        if (work / name).is_file():
            shutil.copyfile(work / name, folder / name)
    print()
    render(load(folder / FILE), folder)
    print(f"{'PASSED' if runner.passed else 'FAILED'} in {runner.elapsed:.0f} s")
    return 0 if runner.passed and complete else 1


def collected(work: Path, runner: Runner, complete: bool, device: str) -> dict[str, Any]:
    """Return everything that the stages found."""
    results = empty_results(
        machine={"cpu": "no card"},
        contestants={},
        backend="native",
        device=device,
        quick=device == "cpu",
    )
    files = {path.stem: json.loads(path.read_text("utf-8")) for path in work.glob("*.json")}
    if (work / "bench" / FILE).is_file():
        results |= load(work / "bench" / FILE)
    results |= {"machine": files.get("info", results["machine"]), "floor": files.get("floor")}
    stages = [outcome.as_json() for outcome in runner.outcomes.values()]
    return results | {"complete": complete, "passed": runner.passed, "stages": stages}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Build, check, test, sanitize, time and profile on a GPU, in one call.",
    )
    parser.add_argument(
        "--stage", default=",".join(STAGES), help="which, by commas (default: %(default)s)"
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


def _folder(options: argparse.Namespace, about: dict[str, Any]) -> Path:
    """Return where results go; those of a part or a rehearsal do not belong in the repository."""
    if options.output is not None:
        return options.output
    whole = options.stages == list(STAGES) and not options.rehearsal and "card" in about
    parent = Path(os.environ.get("OUT") or (RESULTS_FOLDER if whole else RUNS_FOLDER))
    return unused(parent / (folder_name(about) if "date" in about else "no-card"))


if __name__ == "__main__":
    sys.exit(main())
