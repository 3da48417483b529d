"""How ``torch.vmap`` maps the native operators.

Shape legend: T time steps, B batch, N = sum(batch_sizes) packed rows, V the dimension added by
vmap. Sequences are (T, B, features), or (N, features) with batch_sizes; states are (B, features).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Positions of the weights among the arguments of each operator; batch_sizes always comes last.
# elman_forward(input, h0, weight_ih, weight_hh, bias, nonlinearity, reverse, batch_sizes)
# elman_backward(grad_output, grad_h_n, output, weight_hh, nonlinearity, reverse, batch_sizes)
# linear_recurrence(d, g, m, y0, reverse, batch_sizes)
_WEIGHTS = {"elman_forward": (2, 3, 4), "elman_backward": (3,), "linear_recurrence": (2,)}


def vmap_rule(
    name: str,
    call: Callable[..., Any],
    info: Any,
    in_dims: Sequence[int | None],
    *args: Any,
) -> tuple[Any, Any]:
    """Map an operator over V.

    Args:
        name: the operator's name, which tells its arguments apart.
        call: the operator, to be called once for all V where they share the weights, else V times.
        info: as ``torch.library.register_vmap`` gives it; ``info.batch_size`` is V.
        in_dims: where each argument has V, None where it has not.
        args: the arguments.

    Returns:
        The outputs, V first, and their dimensions of V (all 0).

    Raises:
        ValueError: V is 0.

    """
    if info.batch_size == 0:
        raise ValueError("vmap: expected a mapped dimension of size 1 or more, got 0")
    if all(in_dims[i] is None for i in _WEIGHTS[name]):
        outputs = _call_folded(call, _WEIGHTS[name], info.batch_size, in_dims, args)
    else:
        outputs = _call_in_turn(call, info.batch_size, in_dims, args)
    return outputs, (0, 0) if isinstance(outputs, tuple) else 0


def _call_folded(
    call: Callable[..., Any],
    weights: tuple[int, ...],
    size: int,
    in_dims: Sequence[int | None],
    args: Sequence[Any],
) -> Any:
    """Fold V into the batch: (.., B, features) becomes (.., B * V, features), packed rows too."""

    def fold(tensor: Tensor, dim: int | None) -> Tensor:
        with_v = tensor.unsqueeze(-2) if dim is None else tensor.movedim(dim, -2)
        return with_v.expand(*with_v.shape[:-2], size, -1).flatten(-3, -2)

    def unfold(out: Tensor) -> Tensor:
        return out.unflatten(-2, (out.shape[-2] // size, size)).movedim(-2, 0)

    *args, batch_sizes = args
    folded = [
        fold(arg, in_dims[i]) if isinstance(arg, Tensor) and i not in weights else arg
        for i, arg in enumerate(args)
    ]
    outputs = call(*folded, None if batch_sizes is None else batch_sizes * size)
    return tuple(map(unfold, outputs)) if isinstance(outputs, tuple) else unfold(outputs)


def _call_in_turn(
    call: Callable[..., Any], size: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> Any:
    def nth(i: int) -> list[Any]:
        return [
            a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)
        ]

    outputs = [call(*nth(i)) for i in range(size)]
    if isinstance(outputs[0], tuple):
        return tuple(torch.stack(each) for each in zip(*outputs, strict=True))
    return torch.stack(outputs)
