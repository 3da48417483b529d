"""What the instruments cost, and what recording a backward pass adds to it.

    python -m benchmarks.instruments               # both tables of docs/instruments.md, one thread
    python -m benchmarks.instruments recording     # one of them
    python -m benchmarks.instruments functions

``recording``: backward passes without `rnn_cuda.instruments.GradientFlow`, with norms and with
vectors take turns; printed are the median of the ratios of their times, and the plain pass's time.
``functions``: the least of three runs, in seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.tables import Table, duration, number, spread_of
from benchmarks.timing import median_of
from rnn_cuda import FusedRNN, instruments

KINDS = {"FusedRNN": FusedRNN, "nn.RNN": nn.RNN, "nn.GRU": nn.GRU, "nn.LSTM": nn.LSTM}

# ---- recording -----------------------------------------------------------------------------------

SHAPES = ((784, 64, 1, 128), (1000, 20, 10, 128), (256, 32, 256, 512))  # T, B, I, H
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


def recording_rounds(module: nn.Module, x_TBI: Tensor, rounds: int) -> Iterator[dict[str, float]]:
    """Yield the seconds of each way, round by round."""
    for way in WAYS:
        backward_seconds(module, x_TBI, way)
    for index in range(rounds):
        shift = index % len(WAYS)  # nobody always runs behind the same other
        yield {way: backward_seconds(module, x_TBI, way) for way in WAYS[shift:] + WAYS[:shift]}


def recording_table(
    shapes: tuple[tuple[int, int, int, int], ...] = SHAPES, rounds: int = 9
) -> Table:
    """Return what recording adds, for every kind of layer; FusedRNN gets five times the rounds."""
    rows = []
    for name, kind in KINDS.items():
        for T, B, I, H in shapes:
            torch.manual_seed(0)
            several = rounds * (5 if kind is FusedRNN else 1)
            times = list(recording_rounds(kind(I, H), torch.randn(T, B, I), several))
            ratios = [median_of([t[way] / t["plain"] for t in times]) for way in WAYS[1:]]
            plain = duration(median_of([t["plain"] for t in times])["median"])
            rows.append((name, f"{T}, {B}, {I}, {H}", plain, *map(spread_of, ratios)))
    title = "Time of a backward pass over that of one without recording"
    return Table(title, ("module", "T, B, I, H", *WAYS), rows)


# ---- functions -----------------------------------------------------------------------------------

LENGTH, WIDTH = 2000, 256
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

    def seconds(function: Callable[[nn.Module, Tensor], object], kind: type[nn.Module]) -> float:
        torch.manual_seed(0)
        module, x_TBI = kind(8, WIDTH), torch.randn(LENGTH, 1, 8)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            function(module, x_TBI)
            times.append(time.perf_counter() - start)
        return min(times)

    rows = [
        (name, *(number(seconds(function, kind)) for kind in KINDS.values()))
        for name, function in FUNCTIONS.items()
    ]
    title = f"Seconds, T = {LENGTH}, B = 1, H = {WIDTH}"
    return Table(title, ("", *KINDS), rows)


def main() -> None:
    """Print the tables."""
    tables = {"recording": recording_table, "functions": function_table}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instruments")
    parser.add_argument("which", nargs="*", choices=tables, default=list(tables))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.which:
        print(f"{tables[name]().text()}\n", flush=True)


if __name__ == "__main__":
    main()
