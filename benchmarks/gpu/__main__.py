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
from benchmarks.report import FILE, empty_results, load, render, save, unused

RESULTS_FOLDER = REPOSITORY / "benchmarks" / "results"
RUNS_FOLDER = REPOSITORY / "runs" / "benchmarks-gpu"

TOTAL = 530.0
"""Seconds for all stages: nine minutes, less what starting and reporting take."""

STAGES = {
    "info": "card, driver, versions, commit",
    "extension": "the kernels as PyTorch loads them",
    "programs": "the stand-alone checker and the floor's empty kernel",
    "check": "the stand-alone checker: every kernel against float64",
    "tests": "pytest of the tests marked gpu, on the kernels or not at all",
    "flashrnn": "that package's kernels, compiled before they are timed",
    "bench": "against torch.nn.RNN on cuDNN, and FlashRNN if installed",
    "floor": "an empty kernel with the same exchange; the card's rates",
    "memcheck": "compute-sanitizer on the checker",
    "synccheck": "the same",
    "initcheck": "the same",
    "racecheck": "the same; it reports hazards in mbarrier code that are none",
    "profile": "one training step under ncu, nsys or torch's profiler",
}
"""In the order in which they run. What one leaves behind is needed by those below it at most."""

SANITIZERS = ("memcheck", "synccheck", "initcheck", "racecheck")
RESIDENCIES = ("one_sm", "cluster", "grid", "streamed")
DTYPES = ("float32", "bfloat16", "float16", "float64")

PROBLEMS, SMALL_PROBLEMS = 1500, 40
"""Random problems for the checker, and tiny ones for a part of it or under a sanitizer."""

EXPLAINING = 90.0
"""Seconds at most that go into saying why the checker failed, before the run goes on."""


def stage_of(name: str, work: Path, device: str = "cuda", commit: str | None = None) -> Stage:
    """Return a stage by name; ``check:grid:float32`` is a part of ``check``."""
    kind, *part = name.split(":")
    python, native = (sys.executable, "-m"), {"RNN_CUDA_BACKEND": "native"}
    on_gpu = device == "cuda"
    if not on_gpu:
        native = {}  # the stand-in has no kernel to fall back from
    needs_gpu = "" if on_gpu else "it needs a GPU"
    if kind == "info":
        words = [*python, "benchmarks.machine", device, "--write", str(work / "info.json")]
        return Stage(name, ((*words, *(["--commit", commit] if commit else [])),), 30.0)
    if kind == "extension":
        program = "import torch; from rnn_cuda import backend; "
        program += f"print('native:', backend.use_native({device!r}, torch.float32))"
        command = (sys.executable, "-c", program)
        return Stage(name, (command,), 120.0, needs=("info",), environment=native)
    if kind == "programs":
        commands = ((*python, "benchmarks.gpu.build", str(work)),) if on_gpu else ()
        return Stage(name, commands, 100.0, needs=("info",), why_not=needs_gpu)
    if kind == "check":
        command = (str(work / "checker"), *_checked(part))
        limit = 15.0 if part else 45.0
        commands = (command,) if on_gpu else ()
        return Stage(name, commands, limit, not part, ("programs",), why_not=needs_gpu)
    if kind == "tests":
        # A file without a marked test is not even imported: it may need what is not installed.
        command = (
            *python,
            "pytest",
            "-q",
            "-m",
            "gpu",
            "--maxfail",
            "10",
            "-p",
            "no:cacheprovider",
        )
        command += ("-o", "faulthandler_timeout=30", *map(str, gpu_test_files()))
        options: dict[str, Any] = {"needs": ("extension",), "environment": native}
        if on_gpu:  # that all were skipped is a failure
            return Stage(name, (command,), 70.0, must_say=r"\d+ passed", **options)
        return Stage(name, (command,), 70.0, cannot_run=r"\d+ skipped", **options)
    if kind == "flashrnn":
        sizes = [case.H for case in cases_of(["flashrnn"])]
        program = f"from benchmarks.contestants.flashrnn import prebuild; prebuild({sizes})"
        commands = ((sys.executable, "-c", program),)
        why_not = needs_gpu or CONTESTANTS["flashrnn"].missing(device) or ""
        return Stage(name, () if why_not else commands, 60.0, False, ("info",), why_not=why_not)
    if kind == "bench":
        command = (*python, "benchmarks.run", "--limit", SECONDS, "--output", str(work / "bench"))
        command += ("--suite", ",".join(SUITES["cuda"]), "--device", device)
        command += () if on_gpu else ("--quick", "--threads", "1")
        return Stage(name, (command,), 135.0, needs=("extension",), environment=native)
    if kind == "floor":
        commands = ((*python, "benchmarks.gpu.floor", str(work)),) if on_gpu else ()
        needs = ("programs", "info")
        return Stage(name, commands, 25.0, False, needs, why_not=needs_gpu)
    if kind in SANITIZERS:
        tool = find_tool("compute-sanitizer") if on_gpu else None
        command = (str(tool), "--tool", kind, "--error-exitcode", "9", "--print-limit", "20")
        # Between any two allocations, so that an overrun hits nothing that is allowed. Not pytest:
        # torch's allocator hands out parts of large blocks.
        command += ("--padding", "64") if kind == "memcheck" else ()
        command += ("--racecheck-report", "all") if kind == "racecheck" else ()
        command += (str(work / "checker"), *_checked(part, small=True))
        return Stage(
            name,
            (command,) if tool else (),
            {"memcheck": 45.0, "racecheck": 40.0}.get(kind, 30.0),
            required=kind != "racecheck" and not part,
            needs=("programs",),
            cannot_run="Device not supported",
            why_not=needs_gpu or "there is no compute-sanitizer on this machine",
        )
    if kind == "profile":
        step = (*python, "benchmarks.gpu.profile_step", device)
        commands = (*_profilers(work, step), (*step, "--torch-profiler"))
        options = {"must_not_say": "==ERROR==|No kernels", "environment": native}
        return Stage(
            name, commands if on_gpu else commands[-1:], 40.0, False, ("extension",), **options
        )
    raise ValueError(f"there is no stage {name!r}")


def _checked(part: Sequence[str], *, small: bool = False) -> list[str]:
    """Return the checker's arguments for everything, or for a residency and a dtype."""
    small = small or bool(part)
    words = ["--problems", str(SMALL_PROBLEMS if small else PROBLEMS)]
    for option, value in zip(("--residency", "--dtype"), part, strict=False):
        words += [option, value]
    return [*words, "--small"] if small else words


def _profilers(work: Path, step: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return the profilers found here, the one that says most first, with their commands."""
    commands = []
    if ncu := find_tool("ncu"):
        # The card's clocks are as they are: others may share it.
        options = ("--clock-control", "none", "--set", "basic", "--section", "WarpStateStats")
        options += ("--section", "MemoryWorkloadAnalysis", "-k", "regex:walk_kernel|step_kernel")
        commands.append((ncu, *options, "-c", "2", *step))
    if nsys := find_tool("nsys"):
        options = ("--trace", "cuda", "--stats", "true", "--force-overwrite", "true")
        commands.append((nsys, "profile", *options, "-o", str(work / "nsys"), *step))
    return tuple(commands)


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
    found = collected(work, runner, complete, device)
    found["command"] = _command(options)
    folder = _folder(options, found["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    save(found, folder)
    for name in ("log.txt", "profile.txt"):
        if (work / name).is_file():
            shutil.copyfile(work / name, folder / name)
    print()
    render(load(folder / FILE), folder)
    print(f"{'PASSED' if runner.passed else 'FAILED'} in {runner.elapsed:.0f} s")
    return 0 if runner.passed and complete else 1


def collected(work: Path, runner: Runner, complete: bool, device: str) -> dict[str, Any]:
    """Return everything that the stages found."""
    found = empty_results(
        machine={"cpu": "no card"},
        contestants={},
        backend="native",
        device=device,
        quick=device == "cpu",
    )
    results = {path.stem: json.loads(path.read_text("utf-8")) for path in work.glob("*.json")}
    if (work / "bench" / FILE).is_file():
        found |= load(work / "bench" / FILE)
    found |= {"machine": results.get("info", found["machine"]), "floor": results.get("floor")}
    stages = [outcome.as_json() for outcome in runner.outcomes.values()]
    return found | {"complete": complete, "passed": runner.passed, "stages": stages}


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


def _folder(options: argparse.Namespace, about: dict[str, Any]) -> Path:
    """Return where results go; those of a part or a rehearsal do not belong in the repository."""
    if options.output is not None:
        return options.output
    whole = options.stages == list(STAGES) and not options.rehearsal and "card" in about
    parent = Path(os.environ.get("OUT") or (RESULTS_FOLDER if whole else RUNS_FOLDER))
    return unused(parent / (folder_name(about) if "date" in about else "no-card"))


def _command(options: argparse.Namespace) -> str:
    """Return the command without its paths, which say nothing to others."""
    words = ["python -m benchmarks.gpu"]
    if options.stages != list(STAGES):
        words.append(f"--stage {','.join(options.stages)}")
    if options.seconds != TOTAL:
        words.append(f"--seconds {options.seconds:g}")
    return " ".join([*words, "--rehearsal"] if options.rehearsal else words)


if __name__ == "__main__":
    sys.exit(main())
