"""A floor under the time of a case, from rates measured on this machine.

What has to be done, at the speed at which this machine does each part by itself: the matrix
products of the very sizes that one thread meets, repeated on data in its cache; the bytes of the
sequences that have to be read and written; and where the hidden dimension is cut over threads, a
barrier per time step. Left out: the nonlinearity, touching new memory, and overlap of these parts,
which is why it is no law of nature: a kernel whose products beat ``torch.mm`` at these small sizes
may come below it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.native_rates import barrier_seconds, multiply_add_rate

CHUNK_ROWS = 256
"""Rows of the products over all time steps (input product and weight gradients), taken by chunks
small enough to stay in a core's cache."""

_SECONDS_PER_RATE = 0.02


def floor_of(case: Case, threads: int) -> dict[str, Any]:
    """Return the floor of one plain float32 layer, in seconds, with its parts.

    Args:
        case: mode "forward" or "train".
        threads: how many cores share the work.

    Returns:
        ``seconds`` and what it is made of: ``recurrent``, ``products`` (those that do not wait for
        the step before), ``bytes``, ``barriers``; ``cut`` says what the threads divide, "batch" or
        "hidden", whichever is faster. Only "batch" is possible where no barrier could be measured;
        then ``barrier`` says why. ``at_peak`` is the time of the products' multiply-adds alone, at
        the best rate of as many cores, which nothing in float32 can be faster than.
    """
    T, B, I, H = case.shape
    passes = 2 if case.mode == "train" else 1  # h U^T forward, dz U backward
    barrier, why = barrier_seconds(threads)
    with _one_thread():
        options = {"batch": (T * passes * product_seconds(math.ceil(B / threads), H, H), 0.0)}
        if threads > 1 and barrier is not None:
            step = product_seconds(B, H, math.ceil(H / threads))
            options["hidden"] = (T * passes * step, T * passes * barrier)
        cut = min(options, key=lambda name: sum(options[name]))
        recurrent, barriers = options[cut]

        rows = math.ceil(T * B / threads)
        chunk = min(rows, CHUNK_ROWS)
        one_chunk = product_seconds(chunk, I, H)  # W x
        if case.mode == "train":
            one_chunk += product_seconds(H, chunk, H) + product_seconds(H, chunk, I)  # dU, dW
            if case.wants_input_gradient:
                one_chunk += product_seconds(chunk, H, I)
        products = one_chunk * rows / chunk
        at_peak = _operations(case) / (threads * _peak_rate())
    # Sequences read or written: x, y; and y, dy, x (for dW), dx on the way back.
    features = I + H
    if case.mode == "train":
        features += 2 * H + I + (I if case.wants_input_gradient else 0)
    moved = 4 * T * B * features
    bytes_seconds = moved / copy_bandwidth(moved)
    return {
        "seconds": recurrent + products + bytes_seconds + barriers,
        "recurrent": recurrent,
        "products": products,
        "bytes": bytes_seconds,
        "barriers": barriers,
        "at_peak": at_peak,
        "cut": cut,
        "barrier": why or barrier,
    }


def _operations(case: Case) -> int:
    """Return the operations of all products of the case."""
    step_by_step, of_input = (2 * case.T * case.B * case.H * size for size in (case.H, case.I))
    if case.mode == "forward":
        return step_by_step + of_input
    # Each weight is used forward and has a gradient; U is used backward too, W if dx is wanted.
    return 3 * step_by_step + (3 if case.wants_input_gradient else 2) * of_input


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seconds_of(call: Callable[[], Any]) -> float:
    """Return the time of one call: the fastest of some samples, for this is to be a floor."""
    call()
    start = time.perf_counter()
    call()
    once = max(1e-7, time.perf_counter() - start)
    repeats = max(1, int(_SECONDS_PER_RATE / 5 / once))
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        samples.append((time.perf_counter() - start) / repeats)
    return min(samples)


@functools.cache
def product_seconds(m: int, k: int, n: int) -> float:
    """Return the time of an (m, k) x (k, n) product in float32 on one thread, without dispatch.

    A call through torch costs more than the arithmetic of the smallest products, so a product of
    1 x 1 matrices is taken off, as far as the arithmetic at the best rate seen allows.
    """
    seconds = _product_call_seconds(m, k, n)
    operations = 2 * m * k * n
    return max(seconds - _product_call_seconds(1, 1, 1), operations / _peak_rate())


@functools.cache
def _product_call_seconds(m: int, k: int, n: int) -> float:
    a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    seconds = _seconds_of(lambda: torch.mm(a, b, out=out))
    if m == 1:  # may be served better by the other routine
        row, vector = a[0].clone(), torch.empty(n)
        transposed = b.T.contiguous()
        seconds = min(seconds, _seconds_of(lambda: torch.mv(transposed, row, out=vector)))
    return seconds


@functools.cache
def _peak_rate() -> float:
    """Return operations per second of one core at its best, in registers or in a large product."""
    size = 768
    of_product = 2 * size**3 / _product_call_seconds(size, size, size)
    of_registers, _ = multiply_add_rate()
    return max(of_product, of_registers or 0.0)


def copy_bandwidth(size: int) -> float:
    """Return bytes read and written per second when copying so that ``size`` bytes move in all.

    All of torch's threads take part. Small copies stay in cache, as small problems do.
    """
    # A few sizes stand for all; nothing changes beyond what no cache holds.
    return _copy_bandwidth(2 ** min(28, max(14, round(math.log2(size)))))


@functools.cache
def _copy_bandwidth(size: int) -> float:
    source = torch.ones(size // 8)
    target: Tensor = torch.empty_like(source)
    return size / _seconds_of(lambda: target.copy_(source))
