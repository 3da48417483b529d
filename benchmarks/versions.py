"""Two versions of this package in turn: what a change did to its speed, and to its bits.

    python -m benchmarks.versions OLD                 # a commit, against what lies here
    python -m benchmarks.versions OLD NEW --shapes 150,32,2,128 784,64,1,128 --modes train

Each version runs in a process of its own, from a copy of its commit, with its kernels compiled (and
kept in the usual cache). The processes are bound to the same cores and take turns, A B A B; the
ratio is the old version's time over the new one's, the median over rounds with its confidence
interval of 95 %. Two processes differ by a few percent even with the same code, for example by
where their memory lies. A version against itself shows how much.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import TABLE_SHAPES, Case
from benchmarks.contestants.ours import Module
from benchmarks.machine import REPOSITORY, git, usable_cores
from benchmarks.problem import Problem, relative_error
from benchmarks.tables import Table, duration, number, spread_of
from benchmarks.timing import Work, geometric_mean, interleave, seconds_by_clock, summarise
from benchmarks.workers import Worker, WorkerError

HERE = "."
"""Names what lies in this folder, committed or not."""

MODES = ("forward", "train")


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


# ---- in the process of a version -----------------------------------------------------------------

_prepared: list[Work] = []


def prepare(case: Case) -> list[torch.Tensor]:
    """Make FusedRNN ready for :func:`run`; return its results."""
    gc.enable()
    _prepared[:] = [Module().prepare(Problem(case))]
    results = [t.detach().clone() for t in _prepared[0].as_tensors(_prepared[0].run())]
    gc.collect()
    gc.disable()  # a collection would disturb one of the versions at random
    return results


def run(repeats: int) -> float:
    """Do what was prepared so many times; return the seconds of one."""
    return seconds_by_clock(_prepared[0].run, repeats)


# ---- in this one ---------------------------------------------------------------------------------


def compare(workers: dict[str, Worker], case: Case, threads: int, seconds: float) -> dict[str, Any]:
    """Return times and ratio of a case, and how far apart its results are.

    Args:
        workers: ``old`` and ``new``, each with its version of the package.
        case: what to run.
        threads: how many threads they have, for the record.
        seconds: for the rounds.

    Raises:
        WorkerError: a version ended before it was done; the message says which, how, and where.
    """
    results, works = {}, {}
    for name, worker in workers.items():
        try:
            results[name] = worker.ask("versions.prepare", case)
        except WorkerError as error:
            raise WorkerError(f"{_place(case, threads)}, {name}: {error}") from error
        # Each is a runtime of its own: the other's threads get time to go to sleep.
        works[name] = Work(lambda n=1, w=worker: w.ask("versions.run", n), runtime=name)
    try:
        samples, _ = interleave(works, seconds, lambda run, repeats: run(repeats))
    except WorkerError as error:
        raise WorkerError(f"{_place(case, threads)}: {error}") from error
    pairs = list(zip(results["old"], results["new"], strict=True))
    return {
        "case": case.as_json(),
        "threads": threads,
        "rounds": len(samples["new"]),
        "same_bits": all(same_bits(*pair) for pair in pairs),
        "apart": largest([relative_error(*pair) for pair in pairs]),
        **summarise(samples, "old"),
    }


def _place(case: Case, threads: int) -> str:
    return f"({case.shape_text}) {case.mode} {threads}t"


def largest(errors: Sequence[float]) -> float:
    """Return the largest error, NaN if one of them is."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of floats have the same bits; the sign of a zero counts."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(words), b.contiguous().view(words))


def table_of(results: Sequence[dict[str, Any]], old: str, new: str) -> Table:
    """Return the results for people."""
    rows = []
    for each in results:
        case = Case.from_json(each["case"])
        rows.append(
            (
                *(case.shape_text, case.mode, case.dtype, str(each["threads"])),
                *(duration(each[name]["seconds"]["median"]) for name in ("old", "new")),
                spread_of(each["new"]["ratio"]),
                "the same" if each["same_bits"] else f"apart by {number(each['apart'], 2)}",
            )
        )
    mean = geometric_mean([each["new"]["ratio"]["median"] for each in results])
    names = ["what is here" if revision == HERE else revision for revision in (new, old)]
    columns = ("T, B, I, H", "mode", "dtype", "threads", "old", "new", "ratio", "bits of results")
    note = f"Ratio: the old version's time over the new one's; geometric mean {number(mean)}."
    note += " Apart: the largest norm-wise difference of the output or a gradient."
    return Table(" against ".join(names), columns, rows, note)


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
    cases = [
        Case("versions", *shape, mode, dtype=options.dtype)
        for shape in options.shapes
        for mode in options.modes
    ]
    results: list[dict[str, Any]] = []
    try:
        for result in _compared(options, cases):
            results.append(result)
            place = _place(Case.from_json(result["case"]), result["threads"])
            print(f"{place}: {number(result['new']['ratio']['median'])}", flush=True)
    except WorkerError as error:
        print(f"{error}; see its output above")
        return 1
    finally:  # what there is until then
        if results:
            print(table_of(results, options.old, options.new).text())
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _compared(options: argparse.Namespace, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Yield the result of each case, at each number of threads."""
    with folder_of(options.old) as old_folder, folder_of(options.new) as new_folder:
        for threads in options.threads:
            with (
                contextlib.closing(Worker(threads, folder=old_folder)) as old,
                contextlib.closing(Worker(threads, folder=new_folder)) as new,
            ):
                for case in cases:
                    yield compare({"old": old, "new": new}, case, threads, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
