"""The plans that FusedRNN's kernels run a case with, as JSON-ready values."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.cases import GpuCase

FIELDS = ("residency", "arithmetic", "fuse_input", "blocks", "columns", "engine_columns")
FIELDS += ("row_warps", "depth_split")
"""Of `rnn_cuda.cuda_plan.Plan`: what decides how a recurrence runs."""


def plans_of(case: GpuCase, device: str) -> dict[str, dict[str, Any]] | str:
    """Return the plan of each pass of a case's last layer, or why there is none.

    A training step has two: ``forward``, and ``backward``, which has no input product.
    """
    if device == "cpu":
        return "no plan: not on a GPU"
    try:
        from rnn_cuda.cuda_plan import plan
    except ImportError as error:
        return f"no plan: {error}"
    c = case.case
    passes = {"forward": c.I if c.num_layers == 1 else c.H * (2 if c.bidirectional else 1)}
    if c.mode == "train":
        passes["backward"] = 0
    found = {}
    for name, input_size in passes.items():
        try:
            chosen = plan(
                c.T,
                c.B,
                input_size,
                c.H,
                dtype=getattr(torch, c.dtype),
                directions=2 if c.bidirectional else 1,
                device=device,
                allow_tf32=case.tf32,
            )
        except (RuntimeError, ValueError) as error:
            return f"no plan: {str(error).partition(chr(10))[0][:200]}"
        found[name] = {field: getattr(chosen, field) for field in FIELDS}
        found[name]["batch_tiles"] = chosen.geometry["batch_tiles"]
    return found


def words(plans: dict[str, dict[str, Any]] | str | None) -> str:
    """Return the plans in a word or two, such as ``cluster 8, fused``."""
    if not isinstance(plans, dict):
        return "-"
    parts = []
    for plan in plans.values():
        blocks = f" {plan['blocks']}" if plan["residency"] in ("cluster", "grid") else ""
        parts.append(f"{plan['residency']}{blocks}")
    return parts[0] if len(set(parts)) == 1 else " / ".join(parts)
