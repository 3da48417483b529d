"""Two versions of this package in turn: what a change did to its speed, and to its bits.

    python -m benchmarks.versions OLD                 # a commit, against what lies here
    python -m benchmarks.versions OLD NEW --shapes 150,32,2,128 784,64,1,128 --modes train

Each version runs in a process of its own, from a copy of its commit, with its kernels compiled (and
kept in the usual cache). The processes are bound to the same cores and take turns, A B A B; the
ratio is the old version's time over the new one's, the median over rounds. Differences between two
processes that have nothing to do with the code, such as where their memory lies, come to a few
percent: a version against itself shows how many.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.cases import TABLE_SHAPES, Case
from benchmarks.machine import REPOSITORY, git, thread_environment, usable_cores
from benchmarks.problems import relative_error
from benchmarks.reading import Table, milliseconds, number, shape_text
from benchmarks.report import print_table
from benchmarks.timing import Contestant, geometric_mean, interleave, summarise
from benchmarks.workers import WorkerError, ending

HERE = "."
"""Names what lies in this folder, committed or not."""

MODES = ("forward", "train")


class Version:
    """One version of the package, in a process that runs cases when told to."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.version_worker", str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                "RNN_CUDA_BACKEND": "native",  # not the reference, should its kernels not compile
                **os.environ,
                **thread_environment(threads),
            },
            cwd=REPOSITORY,
            text=True,
            bufsize=1,
        )

    def prepare(self, case: Case, results: Path) -> list[torch.Tensor]:
        """Make a case ready; return what it comes to."""
        self._ask({"prepare": case.as_json(), "results": str(results)})
        return torch.load(results)

    def run(self, repeats: int = 1) -> float:
        """Run the case so many times; return the seconds of one call."""
        return self._ask({"run": repeats})

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # of what it did not live to read
                pipe.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
        answer = self._process.stdout.readline()
        if not answer:
            raise WorkerError(f"the process of {self.name} ended with {ending(self._process)}")
        return json.loads(answer)


@contextlib.contextmanager
def folder_of(revision: str) -> Iterator[Path]:
    """A folder with the files of a commit; this repository itself for `HERE`."""
    if revision == HERE:
        yield REPOSITORY
        return
    command = ["git", "-C", str(REPOSITORY), "archive", "--format=zip", revision]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory(prefix="rnn_cuda-") as folder:
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            files.extractall(folder)
        yield Path(folder)


def compare(old: Version, new: Version, case: Case, threads: int, seconds: float) -> dict[str, Any]:
    """Return times and ratio of a case, and how far apart its results are.

    Raises:
        WorkerError: a version ended before it was done; the message says which, how, and where.
    """
    versions = {"old": old, "new": new}
    contestants = {name: Contestant(v.run, runtime=name) for name, v in versions.items()}
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = [v.prepare(case, Path(folder) / name) for name, v in versions.items()]
        samples, _ = interleave(contestants, seconds, lambda run, repeats: run(repeats))
    except WorkerError as error:
        raise WorkerError(f"{_place(case, threads)}: {error}") from error
    return {
        "case": case.as_json(),
        "threads": threads,
        "rounds": len(samples["new"]),
        "same_bits": all(same_bits(*pair) for pair in zip(*results, strict=True)),
        "apart": largest([relative_error(*pair) for pair in zip(*results, strict=True)]),
        **summarise(samples, "old"),
    }


def _place(case: Case, threads: int) -> str:
    return f"({shape_text(case)}) {case.mode} {threads}t"


def largest(errors: Sequence[float]) -> float:
    """Return the largest error, NaN if one of them is."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of floats have the same bits; the sign of a zero counts."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(words), b.contiguous().view(words))


def table_of(found: Sequence[dict[str, Any]], old: str, new: str) -> Table:
    """Return the results for people."""
    rows = []
    for each in found:
        case, ratio = Case.from_json(each["case"]), each["new"]["ratio"]
        rows.append(
            (
                *(shape_text(case), case.mode, case.dtype, str(each["threads"])),
                *(milliseconds(each[name]["seconds"]["median"]) for name in ("old", "new")),
                f"{number(ratio['median'])} ({number(ratio['q1'])} to {number(ratio['q3'])})",
                "the same" if each["same_bits"] else f"apart by {number(each['apart'], 2)}",
            )
        )
    mean = geometric_mean([each["new"]["ratio"]["median"] for each in found])
    return Table(
        f"{_words(new)} against {_words(old)}",
        (
            *("T, B, I, H", "mode", "dtype", "threads", "old, ms", "new, ms"),
            *("ratio (quartiles)", "bits of results"),
        ),
        rows,
        "Ratio: the old version's time over the new one's, median over rounds; geometric mean "
        f"{number(mean)}. Apart: the largest norm-wise difference of the output or a gradient.",
    )


def _words(revision: str) -> str:
    return "what is here" if revision == HERE else revision


def shape(text: str) -> tuple[int, ...]:
    """Return the sizes in ``T,B,I,H``; ValueError if it is not that."""
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError
    return sizes


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.versions", description="Time two versions of FusedRNN in turn."
    )
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", nargs="?", default=HERE, help="another one (default: what is here)")
    parser.add_argument(
        *("--shapes", "-s"),
        nargs="+",
        type=shape,
        default=TABLE_SHAPES,
        metavar="T,B,I,H",
        help="default: the nine of the benchmark's table",
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    cores = len(usable_cores())
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2][:cores])
    parser.add_argument("--seconds", type=float, default=2.0, help="for the rounds of each case")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    if not all(1 <= threads <= cores for threads in options.threads):
        parser.error(f"--threads takes numbers from 1 to {cores}, the cores there are")
    for name in ("old", "new"):
        revision = getattr(options, name)
        known = revision == HERE or git("rev-parse", "--verify", f"{revision}^{{commit}}")
        if not known:
            parser.error(f"{name}: there is no commit {revision!r}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Time both versions and print how they compare; return the exit status."""
    options = _parse(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    cases = [
        Case("versions", *shape, mode, dtype=options.dtype)
        for shape in options.shapes
        for mode in options.modes
    ]
    found: list[dict[str, Any]] = []
    try:
        for result in _compared(options, cases):
            found.append(result)
            ratio = result["new"]["ratio"]["median"]
            place = _place(Case.from_json(result["case"]), result["threads"])
            console.print(f"{place}: {number(ratio)}", style="dim")
    except WorkerError as error:
        console.print(f"[bold red]{error}[/]; its own words are above")
        return 1
    finally:  # what there is until then
        if found:
            print_table(table_of(found, options.old, options.new), console)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _compared(options: argparse.Namespace, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Yield the result of each case, at each number of threads."""
    with folder_of(options.old) as old_folder, folder_of(options.new) as new_folder:
        for threads in options.threads:
            with (
                contextlib.closing(Version(options.old, old_folder, threads)) as old,
                contextlib.closing(Version(options.new, new_folder, threads)) as new,
            ):
                for case in cases:
                    yield compare(old, new, case, threads, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
