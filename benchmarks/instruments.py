"""What the instruments cost: ``python -m benchmarks.instruments`` prints the table of the docs.

One thread, float32 layers on a sequence of random numbers; the least of three runs, in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from rnn_cuda import FusedRNN, instruments

KINDS = {"FusedRNN": FusedRNN, "nn.RNN": nn.RNN, "nn.GRU": nn.GRU, "nn.LSTM": nn.LSTM}
T, H, I = 2000, 256, 8

MEASUREMENTS: dict[str, Callable[[nn.Module, torch.Tensor], object]] = {
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


def seconds(measure: Callable[[nn.Module, torch.Tensor], object], kind: str) -> float:
    """Return the least of three runs."""
    torch.manual_seed(0)
    module, x = KINDS[kind](I, H), torch.randn(T, 1, I)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        measure(module, x)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print a row per measurement and a column per kind of layer."""
    torch.set_num_threads(1)
    print(f"| T = {T}, B = 1, H = {H} | {' | '.join(KINDS)} |")
    print("|---|" + "---|" * len(KINDS))
    for name, measure in MEASUREMENTS.items():
        print(f"| {name} | {' | '.join(f'{seconds(measure, kind):.2f}' for kind in KINDS)} |")


if __name__ == "__main__":
    main()
