"""A call of a recurrent module, as those who record its gradients are shown it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from rnn_cuda.cells import Cell


@dataclasses.dataclass(frozen=True)
class RecurrentCall:
    """One call of a multi-layer recurrent module, as its recurrence got it.

    What hooks, subclasses and wrappers do outside of the recurrence is not in it. T time steps, B
    batch, I input size, P size of the state h, H hidden size, L layers, D directions; N rows of a
    packed sequence.

    Attributes:
        module: the module.
        cell: that of all its layers.
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
        taps: of each layer, where the recurrence takes any.

    """

    module: nn.Module
    cell: Cell
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
    taps: Sequence[Tap] | None = None

    @property
    def directions(self) -> int:
        """D."""
        return 2 if self.bidirectional else 1

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.weights) // self.directions

    @property
    def layer_names(self) -> list[str]:
        """Layers and directions in the order of ``h_n``: ``l0``, ``l0_reverse``, ``l1``, .."""
        suffixes = ("", "_reverse")[: self.directions]
        return [f"l{layer}{suffix}" for layer in range(self.num_layers) for suffix in suffixes]


class Recorder(Protocol):
    """Is shown every call of a recurrent module of this package."""

    def record(self, call: RecurrentCall, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return ``results`` (output and h_n), or tensors of the same values in their place."""
        ...


recorders: list[Recorder] = []
"""Who records now. While there is one, every layer of a module gets a `Tap`."""


class AdjointSink(Protocol):
    """Takes the adjoints of one layer, once in each backward pass through it."""

    vectors: bool
    """Whether it wants the adjoints themselves, besides their norms."""

    def __call__(self, norms: Sequence[Tensor], adjoints: Sequence[Tensor] | None) -> None:
        """Take norms, ``(D, T, B)`` or ``(D, N)``, and if wanted vectors, ``(.., D * H)``.

        One of each for dL/dh_t; of a cell with c then also for dL/dc_t, and for dL/dc_t with h_t
        held fixed.
        """


class Tap:
    """An argument of a layer: lets its backward pass tell `sinks` the adjoints.

    The layer attaches it if it has a node that does so. Sinks may be added after the call.
    """

    def __init__(self) -> None:
        self.is_attached = False
        self.sinks: list[AdjointSink] = []


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
