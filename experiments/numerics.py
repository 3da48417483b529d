"""What a run's numbers depend on beside its values: precision, threads, random state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from experiments.config import DATA_STREAM, RunConfig


@contextmanager
def autocast(run: RunConfig) -> Iterator[None]:
    """Compute in bfloat16 where ``precision`` says so."""
    if run.precision != "bfloat16":
        yield
        return
    before = torch.backends.mkldnn.enabled
    # oneDNN has no bfloat16 LSTM for a CPU without such instructions, and torch asks it all the
    # same.
    torch.backends.mkldnn.enabled = before and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    try:
        with torch.autocast(torch.device(run.device).type, torch.bfloat16):
            yield
    finally:
        torch.backends.mkldnn.enabled = before


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads: their number can change the rounding of a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def own_random_state(run: RunConfig) -> Iterator[None]:
    """Seed every generator for a run (dropout draws from torch's), and put them back after it."""
    before = random_state(run)
    seed = 2 * DATA_STREAM + run.seed
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        set_random_state(run, before)


def random_state(run: RunConfig) -> dict[str, Any]:
    """Return the state of every generator, for a checkpoint."""
    # Their many integers as tensors, which torch.save writes a hundred times as fast.
    python_version, python_state, python_gauss = random.getstate()
    numpy_name, numpy_state, *numpy_rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in cuda_devices(run)],
        "python": (python_version, torch.tensor(python_state), python_gauss),
        "numpy": (numpy_name, torch.from_numpy(numpy_state.astype(np.int64)), *numpy_rest),
    }


def set_random_state(run: RunConfig, state: dict[str, Any]) -> None:
    """Put every generator into a state that `random_state` gave."""
    torch.set_rng_state(state["torch"])
    for device, value in zip(cuda_devices(run), state["cuda"], strict=True):
        torch.cuda.set_rng_state(value, device)
    version, python_state, gauss = state["python"]
    random.setstate((version, tuple(python_state.tolist()), gauss))
    name, numpy_state, *rest = state["numpy"]
    np.random.set_state((name, numpy_state.numpy().astype(np.uint32), *rest))


def cuda_devices(run: RunConfig) -> list[int]:
    """Return the number of the GPU that a run is on, if it is on one."""
    device = torch.device(run.device)
    if device.type != "cuda":
        return []
    return [torch.cuda.current_device() if device.index is None else device.index]
