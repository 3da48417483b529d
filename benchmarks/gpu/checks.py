"""The stages that ask whether the kernels are right: checker, sanitizers, tests."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.context import Context, SkippedError, StageError
from benchmarks.gpu.native import CHECKER, build_program, find_tool
from benchmarks.machine import REPOSITORY

PROBLEMS = 1500
"""Random problems that the checker solves; the judge on the host takes milliseconds for each."""

SMALL_PROBLEMS = 40
"""Of tiny size: for one residency, and under a sanitizer, which takes 10 to 100 times as long."""

_SANITIZER_OPTIONS = {
    # Between any two allocations, so that an overrun hits nothing that is allowed.
    "memcheck": ("--padding", "64"),
    "racecheck": ("--racecheck-report", "all"),
}

FOUND_SOMETHING = 9
"""Exit status of compute-sanitizer when it has something to report."""


def check(context: Context, residency: str | None = None, dtype: str | None = None) -> None:
    """Run the stand-alone checker, on everything or on a part."""
    context.need_gpu("the checker")
    program = build_program(CHECKER, context.work)
    _run([str(program), *checker_arguments(residency, dtype)])


def checker_arguments(
    residency: str | None = None, dtype: str | None = None, *, small: bool = False
) -> list[str]:
    """Return the checker's arguments; a part is checked on small problems."""
    small = small or residency is not None
    arguments = ["--problems", str(SMALL_PROBLEMS if small else PROBLEMS)]
    if residency is not None:
        arguments += ["--residency", residency]
    if dtype is not None:
        arguments += ["--dtype", dtype]
    return [*arguments, "--small"] if small else arguments


def sanitize(
    context: Context, tool: str, residency: str | None = None, dtype: str | None = None
) -> None:
    """Run the checker under one of compute-sanitizer's tools.

    Not pytest: torch's allocator hands out parts of large blocks, so that overruns go unseen.
    """
    context.need_gpu("compute-sanitizer")
    sanitizer = find_tool("compute-sanitizer")
    if sanitizer is None:
        raise SkippedError("there is no compute-sanitizer on this machine")
    program = build_program(CHECKER, context.work)
    _run(sanitizer_command(sanitizer, tool, str(program), residency, dtype))


def sanitizer_command(
    sanitizer: str,
    tool: str,
    program: str,
    residency: str | None = None,
    dtype: str | None = None,
) -> list[str]:
    """Return the command line."""
    return [
        *(sanitizer, "--tool", tool, "--error-exitcode", str(FOUND_SOMETHING)),
        *("--print-limit", "20", *_SANITIZER_OPTIONS.get(tool, ())),
        *(program, *checker_arguments(residency, dtype, small=True)),
    ]


def _run(command: Sequence[str]) -> None:
    """Run and print as it goes.

    Raises:
        SkippedError: the sanitizer does not work on this machine.
        StageError: the command failed; the message is what it was last to say of substance.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="")
        if line.strip(" =\n"):
            lines.append(line.strip(" =\n"))
    status = process.wait()
    verdict = verdict_of(lines)
    if any("Device not supported" in line for line in lines):
        raise SkippedError("compute-sanitizer: the device is not supported on this machine")
    if status != 0:
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        raise StageError(f"{how}: {verdict}")
    print(verdict)


def verdict_of(lines: Sequence[str]) -> str:
    """Return the line to show: the sanitizer's summary, else the last one."""
    for line in reversed(lines):
        if re.search(r"(ERROR|RACECHECK) SUMMARY", line):
            return line
    return lines[-1] if lines else "said nothing"


# ---- pytest --------------------------------------------------------------------------------------


def tests(context: Context) -> None:
    """Run the tests marked gpu; one that is skipped for want of a GPU is no success."""
    report = context.work / "tests.xml"
    report.unlink(missing_ok=True)
    files = gpu_test_files(REPOSITORY / "tests")
    if not files:
        raise StageError("there are no tests marked gpu")
    done = subprocess.run(pytest_command(files, report), cwd=REPOSITORY, check=False)
    print(judge_tests(report, done.returncode, rehearsal=context.rehearsal))


def pytest_command(files: Sequence[Path], report: Path) -> list[str]:
    """Return the command line.

    Files without a marked test are not even imported: they may need what is not installed here.
    """
    return [
        *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--maxfail", "10"),
        *("-p", "no:cacheprovider", "-o", "faulthandler_timeout=30"),  # says which test hangs
        *(f"--junitxml={report}", *map(str, files)),
    ]


def gpu_test_files(folder: Path) -> list[Path]:
    """Return the test files that mark a test with ``gpu``."""
    marked = re.compile(r"\bmark\.gpu\b")
    return [
        path
        for path in sorted(folder.glob("test_*.py"))
        if marked.search(path.read_text(encoding="utf-8"))
    ]


def judge_tests(report: Path, status: int, *, rehearsal: bool = False) -> str:
    """Return the line for the table.

    Raises:
        SkippedError: a rehearsal, and every test was skipped as it should be.
        StageError: a test failed, or none ran.
    """
    if not report.is_file():
        raise StageError(f"pytest ended with exit status {status} and without a report")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ET.parse(report).getroot().iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    bad = counts["failures"] + counts["errors"]
    passed = counts["tests"] - bad - counts["skipped"]
    words = f"{passed} passed, {bad} failed, {counts['skipped']} skipped"
    if rehearsal and status == 0 and passed == 0:
        raise SkippedError(f"{words}: they need a GPU")
    if status != 0 or bad or not passed:
        raise StageError(words)
    return words
