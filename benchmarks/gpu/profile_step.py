"""Some training steps of the case that matters most, for a profiler to look at.

python -m benchmarks.gpu.profile_step DEVICE [--torch-profiler]
"""

from __future__ import annotations

import contextlib
import sys

import torch
from torch.profiler import profile

from benchmarks.cases import SUITES, cases_of
from benchmarks.contestants import CONTESTANTS
from benchmarks.problem import Problem


def main(device: str, *options: str) -> None:
    """Do the steps; with ``--torch-profiler`` print where their time went."""
    case = cases_of(SUITES["cuda"], quick=device == "cpu")[0]
    work = CONTESTANTS[case.ours].prepare(Problem(case, device))
    work.run()  # compiled, planned, allocated
    with profile() if options else contextlib.nullcontext() as recorded:
        for _ in range(3):
            work.run()
        if device != "cpu":
            torch.cuda.synchronize()
    if recorded is not None:
        order = f"self_{device}_time_total"
        print(recorded.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60))
    print(case.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
