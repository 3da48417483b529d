"""Time on a device: events on its stream, and work captured in a CUDA graph.

Rounds, medians and ratios are those of `benchmarks.timing`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UP_CALLS = 3
"""Before a capture, as torch asks: libraries set themselves up in the first calls."""


def seconds_by_events(run: Callable[[], Any], repeats: int) -> float:
    """Return seconds per call, from events recorded around the calls in the current stream.

    Where Python is slower than the device, that is the time Python takes, as a user would see it.
    """
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end) / repeats


def seconds_by_clock(run: Callable[[], Any], repeats: int) -> float:
    """Return seconds per call by this process's clock: the stand-in on a machine without a GPU."""
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


class Graph:
    """Work captured in a CUDA graph."""

    def __init__(self, work: Callable[[], Sequence[Tensor]]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = work()
        # What the capture computed with was never run; a replay that did nothing would show.
        for result in self._results:
            if result.is_floating_point():
                result.detach().fill_(float("nan"))

    def replay(self) -> Sequence[Tensor]:
        """Queue the work again; return the tensors that it writes."""
        self._graph.replay()
        return self._results
