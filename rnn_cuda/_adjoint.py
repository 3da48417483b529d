"""The total adjoint a_t = dL/dh_t of a recurrence and its norm, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from rnn_cuda.neighbours import StepNeighbours, add_at, rows_of, take
from rnn_cuda.reference import compute_dtype


def adjoint_from_delta(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    delta: Tensor,
    weight_hh: Tensor,
    neighbours: StepNeighbours,
) -> Tensor:
    """a_t = g_t + U^T delta_{t+1} of an Elman layer, with delta_t = dL/dz_t and dL/dh_n at the end.

    Shaped as delta, in compute precision.
    """
    wide = compute_dtype(delta.dtype)
    delta_rows, weight = rows_of(delta).to(wide), weight_hh.to(wide)
    direct = torch.zeros_like(delta_rows) if grad_output is None else rows_of(grad_output).to(wide)
    adjoint = add_at(direct, neighbours.previous, take(delta_rows, neighbours.current) @ weight)
    if grad_h_n is not None:
        adjoint = add_at(adjoint, neighbours.last, grad_h_n.to(wide))
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
