"""The process that runs one version of the package, when `benchmarks.versions` tells it to.

    python -m benchmarks.version_worker FOLDER THREADS

``rnn_cuda`` is FOLDER's; ``benchmarks`` is this checkout's, whichever version of the package runs.
Standard input has one request a line, standard output one answer: ``{"prepare": case, "results":
file}`` makes the case ready and writes what it comes to into a file, ``{"run": n}`` runs it so many
times, answered by the seconds that one call took.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import hold_to


def main() -> None:
    """Serve requests until there are no more."""
    folder, threads = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    hold_to(threads)
    # Too late for `benchmarks`, which FOLDER has as well; in time for `rnn_cuda`.
    sys.path.insert(0, str(folder))

    import torch

    import rnn_cuda
    from benchmarks.cases import Case

    torch.set_num_threads(threads)
    gc.disable()  # it would strike at random, in one version or the other
    if folder not in Path(rnn_cuda.__file__).parents:
        raise RuntimeError(f"rnn_cuda comes from {rnn_cuda.__file__} and not from {folder}")
    run: Callable[[], Any] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            run, results = _prepared(Case.from_json(request["prepare"]), threads)
            torch.save(results, request["results"])
            gc.collect()
            answer = None
        else:
            assert run is not None, "nothing has been prepared"
            start = time.perf_counter()
            for _ in range(request["run"]):
                run()
            answer = (time.perf_counter() - start) / request["run"]
        answers.write(json.dumps(answer) + "\n")


def _prepared(case: Any, threads: int) -> tuple[Callable[[], Any], list[Any]]:
    """Return what to run, and the tensors that it comes to."""
    from benchmarks.peers.ours import FusedRNNPeer
    from benchmarks.problems import Problem

    prepared = FusedRNNPeer(threads).prepare(Problem(case))
    return prepared.run, [t.detach().clone() for t in prepared.as_tensors(prepared.run())]


if __name__ == "__main__":
    main()
