"""What `rnn_cuda.instruments.GradientFlow` adds to a backward pass.

    python -m benchmarks.recording                # one thread, some minutes
    python -m benchmarks.recording --threads 2

Backward passes without recording, with norms and with vectors take turns; printed are medians over
the rounds of the ratio of their times, and of the plain pass's time.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.timing import Quartiles
from rnn_cuda import FusedRNN
from rnn_cuda.instruments import GradientFlow

MODULES = (FusedRNN, nn.RNN, nn.LSTM, nn.GRU)
SHAPES = ((784, 64, 1, 128), (1000, 20, 10, 128), (256, 32, 256, 512))  # T, B, I, H
WAYS = ("plain", "norms", "vectors")


def backward_seconds(module: nn.Module, x_TBI: Tensor, way: str) -> float:
    """Time one backward pass from every output, recorded in one of `WAYS`."""
    flow = GradientFlow(module, vectors=way == "vectors")
    with contextlib.nullcontext() if way == "plain" else flow:
        output_TBH, _ = module(x_TBI)
        loss = output_TBH.square().mean()
        start = time.perf_counter()
        loss.backward()
        return time.perf_counter() - start


def measure(module: nn.Module, x_TBI: Tensor, rounds: int) -> Iterator[dict[str, float]]:
    """Yield the seconds of each way, round by round."""
    for way in WAYS:
        backward_seconds(module, x_TBI, way)
    for number in range(rounds):
        shift = number % len(WAYS)  # nobody always runs behind the same other
        seconds = {w: backward_seconds(module, x_TBI, w) for w in WAYS[shift:] + WAYS[:shift]}
        yield seconds


def main(arguments: list[str] | None = None) -> None:
    """Measure every module on every shape and print the table."""
    parser = argparse.ArgumentParser(description="What GradientFlow adds to a backward pass.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="of torch's modules; FusedRNN: 5 x")
    parser.add_argument("--shape", type=int, nargs=4, metavar=("T", "B", "I", "H"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table = Table("module", "T, B, I, H", "plain, ms", "norms", "vectors")
    for kind in MODULES:
        for T, B, I, H in [options.shape] if options.shape else SHAPES:
            torch.manual_seed(0)
            module, x_TBI = kind(I, H), torch.randn(T, B, I)
            rounds = options.rounds * (5 if kind is FusedRNN else 1)
            times = list(measure(module, x_TBI, rounds))
            ratios = {
                way: Quartiles.of([seconds[way] / seconds["plain"] for seconds in times])
                for way in WAYS[1:]
            }
            plain = Quartiles.of([seconds["plain"] for seconds in times]).median
            table.add_row(
                kind.__name__,
                f"{T}, {B}, {I}, {H}",
                f"{plain * 1e3:.1f}",
                *(f"{r.median:.3f} ({r.q1:.3f} to {r.q3:.3f})" for r in ratios.values()),
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
