"""The total adjoint a_t = dL/dh_t of a recurrence and its norm, in plain PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from rnn_cuda.neighbours import StepNeighbours, add_at, rows_of, take
from rnn_cuda.reference import compute_dtype


def total_adjoint(
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


@dataclasses.dataclass(frozen=True)
class RecurrentCall:
    """One call of a multi-layer recurrent module, as its recurrence got it.

    What hooks, subclasses and wrappers do outside of the recurrence is not in it. T time steps, B
    batch, I input size, P size of the state h, H hidden size, L layers, D directions; N rows of a
    packed sequence.

    Attributes:
        module: the module.
        kind: ``"lstm"``, ``"gru"``, or the nonlinearity of an Elman RNN.
        input: ``(T, B, I)`` or packed ``(N, I)``.
        h0: ``(L * D, B, P)`` or None for zeros; `c0` likewise, ``(L * D, B, H)``.
        weights: of each layer and direction, in torch's order.
        bidirectional, has_biases: as in torch.
        training: whether the module was in training mode.
        dropout: the probability of dropping what passes between layers; zero in eval mode.
        batch_sizes: of a packed sequence, else None.
        unsorted_indices: the caller's order of its samples, None if that of the rows.
        random_state: of the CPU's generator before the call, if there is dropout.
        autocast_dtype: what the recurrence itself casts to, or None.

    """

    module: nn.Module
    kind: str
    input: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: list[list[Tensor]]
    bidirectional: bool
    has_biases: bool
    training: bool
    dropout: float = 0.0
    batch_sizes: Tensor | None = None
    unsorted_indices: Tensor | None = None
    random_state: Tensor | None = None
    autocast_dtype: torch.dtype | None = None

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def num_layers(self) -> int:
        return len(self.weights) // self.directions

    @property
    def layer_names(self) -> list[str]:
        """Layers and directions in the order of ``h_n``: ``l0``, ``l0_reverse``, ``l1``, .."""
        suffixes = ("", "_reverse")[: self.directions]
        return [f"l{layer}{suffix}" for layer in range(self.num_layers) for suffix in suffixes]


class Recorder(Protocol):
    """Is shown every call of a recurrent module of this package."""

    def record(
        self, call: RecurrentCall, results: tuple[Tensor, ...], outputs: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return ``results`` (output and h_n), or tensors of the same values in their place.

        ``outputs`` are those of each layer, as the recurrence returned them.
        """
        ...


recorders: list[Recorder] = []
"""Who records now. While there is one, a layer's node is one that takes sinks."""


class AdjointSink(Protocol):
    """Takes the adjoints of one layer, once in each backward pass through it."""

    vectors: bool
    """Whether it wants the adjoints themselves, besides their norms."""

    def __call__(self, norms: Tensor, adjoints: Tensor | None) -> None:
        """Take norms, ``(D, T, B)`` or ``(D, N)``, and if wanted vectors, ``(.., D * H)``."""


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
