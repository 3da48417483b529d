"""What a recurrent matrix by itself says about the gradients that pass through it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rnn_cuda.arguments import check_tensor
from rnn_cuda.cells import cell_named
from rnn_cuda.trajectory import WIDE

_BLOCKS = sorted({cell_named(name).blocks for name in ("elman.tanh", "gru", "lstm")})


class RecurrentSpectrum(NamedTuple):
    """Each of shape ``(..., G)``, one entry a gate, float64."""

    spectral_radius: Tensor
    largest_singular_value: Tensor
    smallest_singular_value: Tensor
    orthogonality_error: Tensor


@torch.no_grad()
def recurrent_spectrum(weight_hh: Tensor) -> RecurrentSpectrum:
    r"""Return spectral radius, extreme singular values and distance from orthogonality of U.

    Per gate: max |lambda_i(U)|, max and min sigma_i(U), and the Frobenius norm of U^T U - I. An
    Elman RNN's adjoint shrinks by at most sigma_max max f' a step, and vanishes for certain where
    that is below 1 (Pascanu, Mikolov and Bengio, 2013).

    Args:
        weight_hh: ``(..., G * H, H)``, as a module holds it: G is 1 for an Elman RNN, 3 for a GRU
            (reset, update, new), 4 for an LSTM (input, forget, cell, output). Leading dimensions
            are the user's, for instance training steps.

    Returns:
        A tuple of float64 tensors of shape ``(..., G)``; G = 1 too for an Elman RNN.

    Raises:
        TypeError: ``weight_hh`` is not a tensor.
        ValueError: its shape is another (that of an LSTM with projections, for instance, whose
            blocks are not square), or an entry is not finite.

    Cost: O(G H^3) operations, O(G H^2) memory.

    """
    check_tensor("weight_hh", weight_hh)
    shape = weight_hh.shape
    if len(shape) < 2 or 0 in shape or shape[-2] not in [g * shape[-1] for g in _BLOCKS]:
        raise ValueError(
            "weight_hh: expected shape (..., G * H, H) with G = 1, 3 or 4 square blocks, "
            f"got {tuple(shape)}"
        )
    if not bool(weight_hh.isfinite().all()):
        raise ValueError("weight_hh: expected finite entries, got an infinity or NaN")
    u = weight_hh.to(WIDE).unflatten(-2, (-1, shape[-1]))
    singular_values = torch.linalg.svdvals(u)
    identity = torch.eye(shape[-1], dtype=WIDE, device=u.device)
    return RecurrentSpectrum(
        spectral_radius=torch.linalg.eigvals(u).abs().amax(-1),
        largest_singular_value=singular_values[..., 0],
        smallest_singular_value=singular_values[..., -1],
        orthogonality_error=torch.linalg.matrix_norm(u.mT @ u - identity),
    )
