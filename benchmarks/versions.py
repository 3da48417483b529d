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
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.cases import GATED, TABLE_SHAPES, Case
from benchmarks.machine import REPOSITORY, git, usable_cores
from benchmarks.problem import relative_error
from benchmarks.tables import Table, duration, number, spread_of
from benchmarks.timing import Work, interleave, summarise
from benchmarks.workers import Worker, WorkerError

HERE = "."
"""Names what lies in this folder, committed or not."""


@contextlib.contextmanager
def folder_of(revision: str) -> Iterator[Path]:
    """A folder with the files of a commit; this repository itself for `HERE`."""
    if revision == HERE:
        yield REPOSITORY
        return
    with tempfile.TemporaryDirectory(prefix="rnn_cuda-") as folder:
        archive = ["git", "-C", str(REPOSITORY), "archive", revision]
        files = subprocess.run(archive, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=files, check=True)
        yield Path(folder)


def compare(workers: dict[str, Worker], case: Case, threads: int, seconds: float) -> dict[str, Any]:
    """Return times and ratio of a case, and how far apart its results are.

    Args:
        workers: ``old`` and ``new``, each with its version of the package.
        case: what to run.
        threads: how many threads they have, for the record.
        seconds: for the rounds.

    Raises:
        WorkerError: a version ended before it was done; the message says how.
    """
    results, works = {}, {}
    for name, worker in workers.items():
        results[name] = worker.ask(measure.prepare, case)
        # Each is a runtime of its own: the other's threads get time to go to sleep.
        works[name] = Work(lambda n=1, w=worker: w.ask(measure.run_prepared, n), runtime=name)
    samples = interleave(works, seconds, lambda run, repeats: run(repeats))
    pairs = list(zip(results["old"], results["new"], strict=True))
    return {
        "case": asdict(case),
        "threads": threads,
        "same_bits": all(same_bits(*pair) for pair in pairs),
        "apart": largest([relative_error(*pair) for pair in pairs]),
        **summarise(samples, "old"),
    }


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
                *(str(case.shape), case.mode, case.dtype, str(each["threads"])),
                *(duration(each[name]["seconds"]["median"]) for name in ("old", "new")),
                spread_of(each["new"]["ratio"]),
                "the same" if each["same_bits"] else f"apart by {number(each['apart'], 2)}",
            )
        )
    mean = statistics.geometric_mean(each["new"]["ratio"]["median"] for each in results)
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versions")
    add = parser.add_argument
    add("old", help="a commit")
    add("new", nargs="?", default=HERE, help="another one (default: what is here)")
    add("--shapes", nargs="+", type=shape, metavar="T,B,I,H", default=TABLE_SHAPES)
    add("--modes", nargs="+", choices=("forward", "train"), default=("forward", "train"))
    add("--cell", default="elman", choices=("elman", "gru", "lstm"))
    add("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    cores = len(usable_cores())
    add("--threads", nargs="+", type=int, choices=range(1, cores + 1), default=[1, 2][:cores])
    add("--seconds", type=float, default=2.0, help="for the rounds of each case")
    add("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    for revision in (options.old, options.new):
        if revision != HERE and not git("rev-parse", "--verify", f"{revision}^{{commit}}"):
            parser.error(f"there is no commit {revision!r}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Time both versions and print how they compare; return the exit status."""
    options = _parse(arguments)
    results: list[dict[str, Any]] = []
    layer = next((each for each in GATED if each["cell"] == options.cell), {})
    place = ""
    try:
        with folder_of(options.old) as old_folder, folder_of(options.new) as new_folder:
            for threads in options.threads:
                with (
                    Worker(threads, folder=old_folder) as old,
                    Worker(threads, folder=new_folder) as new,
                ):
                    for sizes, mode in itertools.product(options.shapes, options.modes):
                        case = Case("versions", *sizes, mode, dtype=options.dtype, **layer)
                        place = f"{case.shape} {mode} {threads}t: "
                        workers = {"old": old, "new": new}
                        results.append(compare(workers, case, threads, options.seconds))
                        ratio = number(results[-1]["new"]["ratio"]["median"])
                        print(f"{place}{ratio}", flush=True)
    except WorkerError as error:
        print(f"{place}{error}; see its output above")
        return 1
    finally:  # what there is until then
        if results:
            print(table_of(results, options.old, options.new))
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
