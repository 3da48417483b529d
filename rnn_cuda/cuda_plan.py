"""How a recurrence would run on a GPU: :func:`plan` describes it, :func:`plan_override` changes it.

The planner is a pure function of the problem and of the device's figures; it needs no GPU. Its cost
model uses published figures and assumptions, listed in ``docs/cuda.md``. This project has measured
none of them.

Shape legend: T time steps, B batch, I input size, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rnn_cuda import backend
from rnn_cuda.arguments import check_positive_int

__all__ = ["DEVICES", "DeviceFigures", "Plan", "plan", "plan_override"]


@dataclass(frozen=True)
class DeviceFigures:
    """What the planner has to know about a GPU.

    ``capability`` is the compute capability, ``max_cluster_size`` the largest cluster of blocks
    that it runs (0: none), ``shared_bytes_per_block`` what one block may opt in to.
    ``kernel_capability`` is the compute capability that the kernels it runs were compiled for, by
    default its own. It is an older one where the driver compiles PTX (``8.0+PTX``), and below 9.0
    there are no kernels for clusters.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes_per_block: int
    max_cluster_size: int
    l2_bytes: int
    kernel_capability: tuple[int, int] | None = None


_KIB, _MIB = 1024, 1024 * 1024

DEVICES: dict[str, DeviceFigures] = {
    "A100": DeviceFigures((8, 0), 108, 163 * _KIB, 0, 40 * _MIB),
    "RTX 4090": DeviceFigures((8, 9), 128, 99 * _KIB, 0, 72 * _MIB),
    "H100": DeviceFigures((9, 0), 132, 227 * _KIB, 16, 50 * _MIB),
    "H200": DeviceFigures((9, 0), 132, 227 * _KIB, 16, 50 * _MIB),
    "B200": DeviceFigures((10, 0), 148, 227 * _KIB, 16, 126 * _MIB),
    "RTX 5090": DeviceFigures((12, 0), 170, 99 * _KIB, 8, 96 * _MIB),
}
"""Figures of some cards, as published by their maker."""

_RESIDENCIES = {
    "one_sm": "in one multiprocessor, the states in its shared memory",
    "cluster": "in a cluster of {blocks} multiprocessors, which store states into one another",
    "grid": "in {blocks} multiprocessors of one cooperative launch, which exchange states "
    "through the L2 cache",
    "streamed": "in device memory: a matrix product and an epilogue for each time step",
}
_ARITHMETIC = {
    "fma": "fused multiply-adds",
    "tensor_core": "tensor cores, sums in float32",
    "tf32": "tensor cores in TF32, sums in float32",
}


@dataclass(frozen=True)
class Plan:
    """How one layer's recurrence runs on a GPU.

    Attributes:
        residency: where U stays for the whole sequence: ``"one_sm"``, ``"cluster"``, ``"grid"``,
            or ``"streamed"`` (nowhere).
        arithmetic: what multiplies: ``"fma"``, ``"tensor_core"`` or ``"tf32"``.
        fuse_input: whether ``W x_t`` is computed inside the kernel, not before it.
        blocks: blocks that share a batch tile, each with its own rows of U.
        columns: samples of a batch tile.
        engine_columns: samples that a warp multiplies at once.
        row_warps: warps of a block with different rows of U.
        depth_split: warps of a block that share rows, each with a part of the sum.
        shared_bytes: shared memory of a block.
        workspace_bytes: device memory beside inputs and outputs.
        step_us: estimated microseconds of a time step. Not measured.
        total_us: estimated microseconds of the whole sequence. Not measured.
        passes: how often the sequence is gone through, one part of the batch after the other.
        reason: why this residency, with what speaks against the others.
        geometry: tiles, words and rounds that follow, as the kernels name them.
        candidates: the best of each residency, or why there is none.

    """

    residency: str
    arithmetic: str
    fuse_input: bool
    blocks: int
    columns: int
    engine_columns: int
    row_warps: int
    depth_split: int
    shared_bytes: int
    workspace_bytes: int
    step_us: float
    total_us: float
    passes: int
    reason: str
    rows_per_tile: int
    geometry: Mapping[str, int]
    candidates: tuple[Mapping[str, Any], ...]

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.row_warps * self.depth_split

    def explain(self) -> str:
        """Return the plan in words, one fact a line."""
        lines = [f"U stays {_RESIDENCIES[self.residency].format(blocks=self.blocks)}."]
        if self.residency != "streamed":
            before = "inside the kernel" if self.fuse_input else "before it, as one product"
            tiles, blocks = self.geometry["batch_tiles"], self.blocks
            lines += [
                f"The batch is cut into {tiles} tile(s) of {self.columns} sample(s), which need "
                f"nothing of one another; {blocks} block(s) share a tile, in {self.passes} "
                "pass(es) over the sequence.",
                f"A block has {self.row_warps} x {self.depth_split} warps (rows x parts of the "
                f"sum), {self.shared_bytes / _KIB:.0f} KiB of shared memory, and multiplies by "
                f"{_ARITHMETIC[self.arithmetic]}.",
                f"The input is multiplied {before}.",
            ]
        lines.append(
            f"Estimated: {self.step_us:.2f} us a time step, {self.total_us / 1000:.3g} ms in all. "
            "The estimate rests on published figures; it was not measured."
        )
        for other in self.candidates:
            name = other["residency"]
            if name != self.residency:
                cost = other.get("total_us")
                why = other["why_not"] if cost is None else f"estimated {cost / 1000:.3g} ms in all"
                lines.append(f"Not {name}: {why}.")
        return "\n".join(lines)


def plan(
    time_steps: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    directions: int = 1,
    device: str | torch.device | DeviceFigures = "cuda",
    allow_tf32: bool | None = None,
    override: str | None = None,
) -> Plan:
    """Return how the CUDA kernels would run one layer of an Elman RNN; nothing runs.

    Args:
        time_steps: T.
        batch: B.
        input_size: I; 0 for a recurrence without an input product, such as a backward pass.
        hidden_size: H.
        dtype: float32, float64, bfloat16 or float16.
        directions: 1, or 2 for both directions of a bidirectional layer in one launch.
        device: a name in :data:`DEVICES`, a CUDA device of this machine, or figures.
        allow_tf32: whether float32 may be rounded to TF32; by default as torch's settings say
            (``torch.backends.cuda.matmul.fp32_precision``).
        override: fields to decide otherwise, as in RNN_CUDA_PLAN; by default what is in force.

    Raises:
        TypeError, ValueError: a size, the dtype or the device makes no sense, or the override is
            impossible here; the message names it.
        NativeBackendError: the planner, which is compiled with the kernels, is not available.

    """
    sizes = {"time_steps": time_steps, "batch": batch, "hidden_size": hidden_size}
    for name, value in sizes.items():
        check_positive_int(name, value)
    if input_size != 0:
        check_positive_int("input_size", input_size)
    if directions not in (1, 2):
        raise ValueError(f"directions: expected 1 or 2, got {directions!r}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    _need_library()
    figures = _figures(device)
    if allow_tf32 is None:
        allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    text = torch.ops.rnn_cuda.cuda_plan(
        str(dtype).removeprefix("torch."),
        [time_steps, batch, input_size, hidden_size],
        directions,
        allow_tf32,
        [
            *figures.capability,
            figures.multiprocessors,
            figures.shared_bytes_per_block,
            figures.max_cluster_size,
            figures.l2_bytes,
            *(figures.kernel_capability or figures.capability),
        ],
        override,
    )
    values = json.loads(text)
    values["candidates"] = tuple(values["candidates"])
    return Plan(**values)


def _need_library() -> None:
    emulated = backend.requested() == "emulated"
    if problem := backend.load_library(emulated=emulated):
        raise backend.NativeBackendError(f"Plans are made by the compiled library, but {problem}")


def _figures(device: str | torch.device | DeviceFigures) -> DeviceFigures:
    if isinstance(device, DeviceFigures):
        return device
    if isinstance(device, str) and device in DEVICES:
        return DEVICES[device]
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device: expected one of {', '.join(DEVICES)}, a CUDA device or DeviceFigures, "
            f"got {device!r}"
        ) from error
    if backend.has_operator("cuda_device_figures"):
        figures = torch.ops.rnn_cuda.cuda_device_figures(chosen.index or 0)
        major, minor, *others, kernel_major, kernel_minor = figures
        kernels = (kernel_major, kernel_minor)
        return DeviceFigures((major, minor), *others, kernel_capability=kernels)
    raise ValueError(
        f"device: this library has no CUDA kernels to ask {chosen} for its figures; "
        f"expected one of {', '.join(DEVICES)}, or DeviceFigures"
    )


@contextmanager
def plan_override(text: str = "", **values: int | str) -> Iterator[None]:
    """Decide fields of every plan inside a ``with`` block, in the whole process; blocks nest.

    ``plan_override("residency=cluster,blocks=4")`` and
    ``plan_override(residency="cluster", blocks=4)`` are the same. Fields: residency (one_sm,
    cluster, grid, streamed), arithmetic (fma, tensor_core, tf32), fuse_input (0, 1), blocks,
    columns, engine_columns, row_warps, depth_split; see :class:`Plan`. What is not decided is
    planned. The environment variable RNN_CUDA_PLAN does the same for a process.

    A recurrence for which this is impossible raises ValueError, which names the field.

    Raises:
        ValueError: there is no such field, or no such value of it.
        NativeBackendError: the planner, which is compiled with the kernels, is not available.

    """
    _need_library()
    parts = [text] if text else []
    parts += [f"{name}={int(v) if isinstance(v, bool) else v}" for name, v in values.items()]
    exchange = torch.ops.rnn_cuda.exchange_plan_override
    previous = exchange(",".join(parts))
    try:
        yield
    finally:
        exchange(previous)
