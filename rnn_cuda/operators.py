"""What PyTorch has to know about the native operators besides their kernels.

The schemas and the CPU kernels are registered by ``csrc/operators.cpp``; once that library is
loaded, :func:`register` adds for each operator a fake kernel (shapes without data, for
``torch.compile`` and ``torch.export``), a rule for ``torch.vmap``, and its FLOP count. The
operators themselves know no autograd: ``rnn_cuda.functional`` differentiates them.

Shape legend: T time steps, B batch, I input size, H hidden size, N = sum(batch_sizes) packed rows,
V the dimension added by vmap. Sequences are (T, B, features), or (N, features) with batch_sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Per operator: where its sequences, its (B, H) states and its weights stand among the arguments.
# elman_forward(input, h0, weight_ih, weight_hh, bias, nonlinearity, reverse, batch_sizes)
# elman_backward(grad_output, grad_h_n, output, weight_hh, nonlinearity, reverse, batch_sizes)
# linear_recurrence(d, g, m, y0, reverse, batch_sizes)
_ARGUMENTS: dict[str, dict[str, tuple[int, ...]]] = {
    "elman_forward": {"sequences": (0,), "states": (1,), "weights": (2, 3, 4), "sizes": (7,)},
    "elman_backward": {"sequences": (0, 2), "states": (1,), "weights": (3,), "sizes": (6,)},
    "linear_recurrence": {"sequences": (0, 1), "states": (3,), "weights": (2,), "sizes": (5,)},
}


@functools.cache
def register() -> None:
    """Register everything below; to be called once, after the native library has been loaded."""
    for name, positions in _ARGUMENTS.items():
        qualified = f"rnn_cuda::{name}"
        torch.library.register_fake(qualified, globals()[f"_{name}_fake"])
        torch.library.register_vmap(qualified, functools.partial(_vmap_rule, name, positions))
        register_flop_formula(getattr(torch.ops.rnn_cuda, name))(globals()[f"_{name}_flops"])


# ---- fake kernels --------------------------------------------------------------------------------


def _elman_forward_fake(
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    hidden = weight_hh.shape[0]
    if batch_sizes is None:
        batch = input.shape[1]
    elif h0 is not None:
        batch = h0.shape[0]
    else:  # batch_sizes[0], which a fake tensor does not know
        batch = torch.library.get_ctx().new_dynamic_size()
    return input.new_empty(*input.shape[:-1], hidden), input.new_empty(batch, hidden)


def _elman_backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor,
    weight_hh: Tensor,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: Tensor | None,
) -> Tensor:
    return output.new_empty(output.shape)


def _linear_recurrence_fake(
    d: Tensor,
    g: Tensor,
    m: Tensor,
    y0: Tensor | None,
    reverse: bool,
    batch_sizes: Tensor | None,
) -> Tensor:
    return g.new_empty(g.shape)


# ---- vmap ----------------------------------------------------------------------------------------


def _vmap_rule(
    name: str,
    positions: dict[str, tuple[int, ...]],
    info: Any,
    in_dims: Sequence[int | None],
    *args: Any,
) -> tuple[Any, Any]:
    """Fold V into the batch where the weights are shared and no sample is packed, else loop."""
    op = getattr(torch.ops.rnn_cuda, name)
    shared_weights = all(in_dims[i] is None for i in positions["weights"])
    if shared_weights and args[positions["sizes"][0]] is None:
        outputs = _call_folded(op, positions, info.batch_size, in_dims, args)
    else:
        outputs = _call_in_turn(op, info.batch_size, in_dims, args)
    return outputs, (0, 0) if isinstance(outputs, tuple) else 0


def _call_folded(
    op: Callable[..., Any],
    positions: dict[str, tuple[int, ...]],
    size: int,
    in_dims: Sequence[int | None],
    args: Sequence[Any],
) -> Any:
    folded = list(args)
    for i in (*positions["sequences"], *positions["states"]):
        if args[i] is None:
            continue
        batch_dim = args[i].ndim - 2 - (in_dims[i] is not None)  # of (T, B, .) or (B, .)
        per_sample = _unbatched_first(args[i], in_dims[i], size).movedim(0, batch_dim)
        folded[i] = per_sample.flatten(batch_dim, batch_dim + 1)

    def unfold(out: Tensor) -> Tensor:
        batch_dim = out.ndim - 2
        return out.unflatten(batch_dim, (size, -1)).movedim(batch_dim, 0)

    outputs = op(*folded)
    return tuple(map(unfold, outputs)) if isinstance(outputs, tuple) else unfold(outputs)


def _call_in_turn(
    op: Callable[..., Any], size: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> Any:
    def nth(i: int) -> list[Any]:
        return [
            a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)
        ]

    outputs = [op(*nth(i)) for i in range(size)]
    if isinstance(outputs[0], tuple):
        return tuple(torch.stack(each) for each in zip(*outputs, strict=True))
    return torch.stack(outputs)


def _unbatched_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


# ---- FLOP counts: two per multiply-add of a matrix product, as torch counts them -----------------


def _rows(sequence_shape: Sequence[int]) -> int:
    rows = 1
    for size in sequence_shape[:-1]:
        rows *= size
    return rows


def _elman_forward_flops(
    input: Sequence[int], h0: Any, weight_ih: Sequence[int], *_: Any, **__: Any
) -> int:
    hidden, features = weight_ih
    return 2 * _rows(input) * hidden * (hidden + features)


def _elman_backward_flops(
    grad_output: Any, grad_h_n: Any, output: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * _rows(output) * output[-1] ** 2


def _linear_recurrence_flops(d: Any, g: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * _rows(g) * g[-1] ** 2
