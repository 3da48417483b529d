"""The process that measures: held to a number of cores before anything else is imported.

    python -m benchmarks.worker < job.json

The job names threads, seconds, and cases; results go to standard output, one JSON object per line,
as they come. What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO


def main() -> None:
    """Do the job on standard input."""
    job = json.load(sys.stdin)
    # Only results may come through the pipe, whoever else in this process prints.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    from benchmarks.machine import hold_to

    hold_to(job["threads"])

    import torch

    torch.set_num_threads(job["threads"])
    torch.set_num_interop_threads(1)
    if job["kind"] == "peers":
        _write(results, _peers(job["threads"]))
    elif job["kind"] == "timings":
        _timings(job, results)
    else:
        _accuracy(job, results)


def _peers(threads: int) -> dict[str, Any]:
    """Return who can run here, and on which backend our own operators do."""
    import torch

    from benchmarks.peers import PEERS, make_peers
    from rnn_cuda import backend

    found = {}
    for name, peer in make_peers(PEERS, threads).items():
        missing = peer.missing()
        found[name] = {
            "title": peer.title,
            "missing": missing,
            "version": None if missing else peer.version(),
        }
    native = backend.use_native("cpu", torch.float32)
    why_not = backend.describe()["why_not_native"]
    return {"peers": found, "backend": "native" if native else f"reference ({why_not})"}


def _timings(job: dict[str, Any], results: TextIO) -> None:
    from benchmarks.cases import Case
    from benchmarks.measure import measure
    from benchmarks.peers import make_peers

    for index, fields in enumerate(job["cases"]):
        case = Case.from_json(fields)
        _write(results, {"started": index})
        wanted = [n for n in case.contestants if n in job["peers"] or n == case.baseline]
        contestants = make_peers(wanted, job["threads"])
        _write(results, {"index": index, **measure(case, contestants, job["seconds"])})


def _accuracy(job: dict[str, Any], results: TextIO) -> None:
    from benchmarks.accuracy import AccuracyCase, errors

    for index, fields in enumerate(job["cases"]):
        _write(results, {"started": index})
        _write(results, {"index": index, **errors(AccuracyCase(**fields))})


def _write(results: TextIO, value: Any) -> None:
    results.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    main()
