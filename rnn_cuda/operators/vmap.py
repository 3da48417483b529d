"""How ``torch.vmap`` maps an operator.

Shape legend: T time steps, B batch, N = sum(batch_sizes) packed rows, D directions, V the dimension
added by vmap. Sequences are (T, B, features), or (N, features) with batch_sizes; states are
(B, features) or (D, B, features).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def check_size(info: Any) -> int:
    """Return V, as ``torch.library.register_vmap`` gives it.

    Raises:
        ValueError: V is 0.

    """
    if info.batch_size == 0:
        raise ValueError("vmap: expected a mapped dimension of size 1 or more, got 0")
    return info.batch_size


def fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Fold V into the batch: (.., B, features) becomes (.., B * V, features), packed rows too."""
    with_v = tensor.unsqueeze(-2) if dim is None else tensor.movedim(dim, -2)
    return with_v.expand(*with_v.shape[:-2], size, -1).flatten(-3, -2)


def unfold(tensor: Tensor, size: int) -> Tensor:
    """Undo `fold`; V comes first."""
    return tensor.unflatten(-2, (tensor.shape[-2] // size, size)).movedim(-2, 0)


def call_in_turn(
    call: Callable[..., Any], size: int, in_dims: Sequence[Any], args: Sequence[Any]
) -> Any:
    """Call an operator for each of V; ``in_dims`` is nested as ``args``."""

    def nth(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(dim, list | tuple):
            return [nth(a, d, i) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, i)

    outputs = [
        call(*(nth(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs)
    return [torch.stack(each) for each in zip(*outputs, strict=True)]
