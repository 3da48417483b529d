"""Everyone who can be timed, by name: a file each, which adds itself here."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.contestants import (
    flashrnn,
    jax,
    onnxruntime,
    ours,
    torch_loops,
    torch_modules,
)
from benchmarks.contestants.base import Contestant

CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for module in (torch_modules, ours, torch_loops, jax, onnxruntime, flashrnn)
    for contestant in module.CONTESTANTS
}


def describe(device: str) -> dict[str, Any]:
    """Return who can run here, and on which backend our own operators do."""
    from rnn_cuda import backend

    contestants = {}
    for name, contestant in CONTESTANTS.items():
        missing = contestant.missing(device)
        version = None if missing else contestant.version()
        contestants[name] = {"title": contestant.title, "missing": missing, "version": version}
    native = backend.use_native(device, torch.float32)
    words = "native" if native else f"reference ({backend.describe()['why_not_native']})"
    kernels = backend.describe()["library_key"]  # a hash of their sources, among other things
    return {"contestants": contestants, "backend": words, "kernels": kernels}
