"""The total adjoint a_t = dL/dh_t of a recurrence and its norm, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rnn_cuda._links import Links, add_at, rows_of, take
from rnn_cuda.reference import compute_dtype


def total_adjoint(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    delta: Tensor,
    weight_hh: Tensor,
    links: Links,
) -> Tensor:
    """a_t = g_t + U^T delta_{t+1} of an Elman layer, with delta_t = dL/dz_t and dL/dh_n at the end.

    Shaped as delta, in compute precision.
    """
    wide = compute_dtype(delta.dtype)
    delta_rows, weight = rows_of(delta).to(wide), weight_hh.to(wide)
    direct = torch.zeros_like(delta_rows) if grad_output is None else rows_of(grad_output).to(wide)
    adjoint = add_at(direct, links.previous, take(delta_rows, links.current) @ weight)
    if grad_h_n is not None:
        adjoint = add_at(adjoint, links.last, grad_h_n.to(wide))
    return adjoint.view(delta.shape)


def row_norms(rows: Tensor) -> Tensor:
    """Euclidean norms over the last dimension, in float64.

    They reach down to where the values themselves vanish. Squares of narrower types cannot vanish
    in float64; those of float64, in units of a row's largest value, are of no consequence if they
    do.
    """
    if rows.dtype != torch.float64:
        return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    unit = rows.detach().abs().amax(-1)
    unit = torch.where((unit == 0) | unit.isinf(), 1.0, unit)
    return unit * torch.linalg.vector_norm(rows / unit.unsqueeze(-1), dim=-1)


class AdjointSink(Protocol):
    """Takes the adjoints of one layer and direction, once in each backward pass through it."""

    vectors: bool
    """Whether it wants the adjoints themselves, besides their norms."""

    def __call__(self, norm: Tensor, adjoint: Tensor | None) -> None:
        """Take norms, ``(T, B)`` or packed ``(N,)``, and if wanted vectors, ``(..., H)``."""


def check_recordable(grads: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError where what a backward pass gets are not ordinary tensors."""
    # As by is_grads_batched.
    is_mapped = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
    if torch._C._are_functorch_transforms_active() or any(
        is_mapped(grad) for grad in grads if grad is not None
    ):
        raise RuntimeError(
            "GradientFlow records ordinary backward passes; this one is mapped, by torch.func.vmap "
            "or is_grads_batched=True"
        )


def report(
    sinks: Sequence[AdjointSink],
    norm: Tensor,
    grads: Sequence[Tensor | None],
    output: Tensor,
    weight_hh: Tensor,
    options: Sequence[Any],
    batch: int,
) -> None:
    """Tell the sinks of a backward pass, given what it got and the norms that it computed."""
    adjoint = None
    if any(sink.vectors for sink in sinks):
        with torch.no_grad():
            delta = torch.ops.rnn_cuda.elman_backward(*grads, output, weight_hh, *options)
            _, reverse, batch_sizes = options
            links = Links.of(output, reverse, batch_sizes, batch)
            adjoint = total_adjoint(grads[0], grads[1], delta, weight_hh, links)
    for sink in sinks:
        sink(norm.detach(), adjoint if sink.vectors else None)
