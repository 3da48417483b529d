"""What the instruments cost, and what recording a backward pass adds to it.

    python -m benchmarks.instruments               # both tables of docs/instruments.md, one thread
    python -m benchmarks.instruments recording     # one of them
    python -m benchmarks.instruments functions

``recording``: backward passes without `rnn_cuda.instruments.GradientFlow`, with norms and with
vectors take turns; printed are the median of the ratios of their times, and the plain pass's time.
``functions``: the least of three runs, in seconds.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases import Shape
from benchmarks.tables import Table, duration, number, spread_of
from benchmarks.timing import median_of, seconds_by_clock
from rnn_cuda import FusedGRU, FusedLSTM, FusedRNN, instruments

FUSED = {"FusedRNN": FusedRNN, "FusedGRU": FusedGRU, "FusedLSTM": FusedLSTM}
KINDS = FUSED | {"nn.RNN": nn.RNN, "nn.GRU": nn.GRU, "nn.LSTM": nn.LSTM}

SHAPES: tuple[Shape, ...] = ((784, 64, 1, 128), (1000, 20, 10, 128), (256, 32, 256, 512))
WAYS = ("plain", "norms", "vectors")


def backward_seconds(module: nn.Module, x_TBI: Tensor, way: str) -> float:
    """Time one backward pass from every output, recorded in one of `WAYS`."""
    flow = instruments.GradientFlow(module, vectors=way == "vectors")
    with contextlib.nullcontext() if way == "plain" else flow:
        output_TBH, _ = module(x_TBI)
        loss = output_TBH.square().mean()
        start = time.perf_counter()
        loss.backward()
        return time.perf_counter() - start


def recording_table(shapes: tuple[Shape, ...] = SHAPES, rounds: int = 9) -> Table:
    """Return what recording adds, for every kind of layer; fused ones get five times the rounds."""
    rows = []
    for name, kind in KINDS.items():
        for T, B, I, H in shapes:
            torch.manual_seed(0)
            module, x_TBI = kind(I, H), torch.randn(T, B, I)
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for index in range(1 + rounds * (5 if name in FUSED else 1)):
                shift = index % len(WAYS)  # nobody always runs behind the same other
                for way in WAYS[shift:] + WAYS[:shift]:
                    times[way].append(backward_seconds(module, x_TBI, way))
            plain, *recorded = (times[way][1:] for way in WAYS)  # the first round is not counted
            ratios = ([a / b for a, b in zip(way, plain, strict=True)] for way in recorded)
            cells = duration(median_of(plain)["median"]), *map(spread_of, map(median_of, ratios))
            rows.append((name, f"{T}, {B}, {I}, {H}", *cells))
    title = "Time of a backward pass over that of one without recording"
    return Table(title, ("module", "T, B, I, H", *WAYS), rows)


FUNCTIONS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "10 Lyapunov exponents": lambda m, x: instruments.lyapunov_exponents(m, x, 10),
    "norm of dh_T/dh_t at every lag, 16 probes": lambda m, x: instruments.jacobian_norm(
        m, x, probes=16
    ),
    "gradient flossing, 4 exponents, with its backward pass": lambda m, x: (
        instruments.gradient_flossing(m, x, 4).backward()
    ),
    "all singular values at lags 10 and 100": lambda m, x: instruments.jacobian_singular_values(
        m, x, [10, 100]
    ),
}


def function_table() -> Table:
    """Return the seconds of each function on each kind of layer."""
    rows = []
    for name, function in FUNCTIONS.items():
        cells = []
        for kind in KINDS.values():
            torch.manual_seed(0)
            module, x_TBI = kind(8, 256), torch.randn(2000, 1, 8)
            once = functools.partial(function, module, x_TBI)
            cells.append(number(min(seconds_by_clock(once, 1) for _ in range(3))))
        rows.append((name, *cells))
    return Table("Seconds, T = 2000, B = 1, H = 256", ("", *KINDS), rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tables = {"recording": recording_table, "functions": function_table}
    for chosen in sys.argv[1:] or tables:
        print(f"{tables[chosen]()}\n", flush=True)
