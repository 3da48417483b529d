"""What PyTorch has to know about the native operators besides their kernels.

The schemas and the CPU kernels are registered by ``csrc/operators.cpp``; once that library is
loaded, :func:`register` adds for each operator a fake kernel (shapes without data, for
``torch.compile`` and ``torch.export``), its derivative, a rule for ``torch.vmap``, and its FLOP
count.

Shape legend: T time steps, B batch, I input size, H hidden size, N = sum(batch_sizes) packed rows.
Sequences are (T, B, features), or (N, features) with batch_sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.flop_counter import register_flop_formula

from rnn_cuda._autograd import ElmanBackward, ElmanRNN, LinearRecurrence
from rnn_cuda._vmap import vmap_rule

_FUNCTIONS = (ElmanRNN, ElmanBackward, LinearRecurrence)

_library = torch.library.Library("rnn_cuda", "IMPL")


@functools.cache
def register() -> None:
    """Register everything below; to be called once, after the native library has been loaded."""
    for function in _FUNCTIONS:
        name = function.operator
        operator, qualified = getattr(torch.ops.rnn_cuda, name), f"rnn_cuda::{name}"
        torch.library.register_fake(qualified, globals()[f"_{name}_fake"])
        _library.impl(name, function.kernel, "Autograd")
        torch.library.register_vmap(qualified, functools.partial(vmap_rule, name, operator))
        register_flop_formula(operator)(globals()[f"_{name}_flops"])


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
    elif not is_fake(batch_sizes):  # on the meta device
        batch = int(batch_sizes[0])
    else:
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
