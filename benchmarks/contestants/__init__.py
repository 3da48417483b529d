"""Everyone who can be timed, by name: a file each, which adds itself here."""

from __future__ import annotations

from benchmarks.contestants import (
    flashrnn,
    jax,
    keras,
    onnxruntime,
    ours,
    torch_loops,
    torch_modules,
)
from benchmarks.contestants.base import Contestant

CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant()
    for module in (torch_modules, ours, torch_loops, jax, onnxruntime, keras, flashrnn)
    for contestant in module.CONTESTANTS
}
