"""What PyTorch has to know about the native operators besides their kernels.

The schemas are registered by ``csrc/operators.cpp``, the kernels by the file of that name in each
device's folder; once that library is loaded, :func:`register` adds for each operator a fake kernel
(shapes without data, for ``torch.compile`` and ``torch.export``), its derivative, a rule for
``torch.vmap``, and its FLOP count.

Shape legend: T time steps, B batch, I input size, H hidden size, N = sum(batch_sizes) packed rows.
Sequences are (T, B, features), or (N, features) with batch_sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.flop_counter import register_flop_formula

from rnn_cuda import _expanded_weights
from rnn_cuda._autograd import ElmanBackward, ElmanGradients, ElmanRNN, LinearRecurrence
from rnn_cuda._autograd_pair import ElmanGradientsPair, ElmanRNNPair, arguments_of_each
from rnn_cuda._dynamo import untraced
from rnn_cuda._vmap import vmap_rule
from rnn_cuda.reference import compute_dtype

_COMPOSED = (ElmanGradients, ElmanRNNPair, ElmanGradientsPair)
"""Those whose parts are mapped one by one."""

_FUNCTIONS = (ElmanRNN, ElmanBackward, LinearRecurrence, *_COMPOSED)

_library = torch.library.Library("rnn_cuda", "IMPL")


@functools.cache
def register() -> None:
    """Register everything below; to be called once, after the native library has been loaded.

    Whatever PyTorch is to call while a model runs goes through `untraced`.
    """
    for function in _FUNCTIONS:
        name = function.operator
        operator, qualified = getattr(torch.ops.rnn_cuda, name), f"rnn_cuda::{name}"
        torch.library.register_fake(qualified, untraced(globals()[f"_{name}_fake"]))
        _library.impl(name, untraced(function.kernel), "Autograd")
        if function in _COMPOSED:
            _library.impl(name, untraced(function.composition), "FuncTorchBatched")
        else:
            mapped = functools.partial(untraced(vmap_rule), name, operator)
            torch.library.register_vmap(qualified, mapped)
        register_flop_formula(operator, get_raw=True)(globals()[f"_{name}_flops"])
    _expanded_weights.register()


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
    batch = _batch_or_new(input, [h0], batch_sizes)
    return input.new_empty(*input.shape[:-1], hidden), input.new_empty(batch, hidden)


def _elman_forward_pair_fake(
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    h0_reverse: Tensor | None,
    weight_ih_reverse: Tensor,
    weight_hh_reverse: Tensor,
    bias_reverse: Tensor | None,
    nonlinearity: str,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    hidden = weight_hh.shape[0]
    batch = _batch_or_new(input, [h0, h0_reverse], batch_sizes)
    shapes = [(*input.shape[:-1], hidden), (batch, hidden)]
    return tuple(input.new_empty(shape) for shape in 2 * shapes)


def _batch(
    sequence: Tensor, states: Sequence[Tensor | None], batch_sizes: Tensor | None
) -> int | None:
    """B, or None where it stands in batch_sizes alone and they have no data."""
    if batch_sizes is None:
        return sequence.shape[1]
    for state in states:
        if state is not None:
            return state.shape[0]
    return None if is_fake(batch_sizes) else int(batch_sizes[0])  # these have data on "meta" too


def _batch_or_new(
    sequence: Tensor, states: Sequence[Tensor | None], batch_sizes: Tensor | None
) -> int:
    batch = _batch(sequence, states, batch_sizes)
    return torch.library.get_ctx().new_dynamic_size() if batch is None else batch


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


def _elman_gradients_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    output: Tensor,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    batch = _batch_or_new(input, [grad_h_n, h0], batch_sizes) if wanted[1] else 0
    return _gradients_fake(input, weight_ih, batch, wanted)


def _elman_gradients_pair_fake(
    input: Tensor,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    output: Tensor,
    grad_output_reverse: Tensor | None,
    grad_h_n_reverse: Tensor | None,
    h0_reverse: Tensor | None,
    weight_ih_reverse: Tensor,
    weight_hh_reverse: Tensor,
    output_reverse: Tensor,
    nonlinearity: str,
    batch_sizes: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    states = [grad_h_n, grad_h_n_reverse, h0, h0_reverse]
    batch = _batch_or_new(input, states, batch_sizes) if wanted[1] or wanted[6] else 0
    _, *of_reverse = _gradients_fake(input, weight_ih_reverse, batch, [False, *wanted[6:]])
    return *_gradients_fake(input, weight_ih, batch, wanted[:6]), *of_reverse


def _gradients_fake(
    input: Tensor, weight_ih: Tensor, batch: int, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    hidden = weight_ih.shape[0]
    weights = (weight_ih.shape, (hidden, hidden), (hidden,))
    shapes = (input.shape, (batch, hidden), *weights, input.shape[:-1])
    dtypes = (*[input.dtype] * 4, compute_dtype(input.dtype), torch.float64)
    return tuple(
        input.new_empty(shape if w else (0,), dtype=dtype)
        for shape, dtype, w in zip(shapes, dtypes, wanted, strict=True)
    )


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


def _rows(sequence: Tensor) -> int:
    return math.prod(sequence.shape[:-1])


def _elman_forward_flops(input: Tensor, h0: Any, weight_ih: Tensor, *_: Any, **__: Any) -> int:
    hidden, features = weight_ih.shape
    return 2 * _rows(input) * hidden * (hidden + features)


def _elman_forward_pair_flops(input: Tensor, h0: Any, weight_ih: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _elman_forward_flops(input, h0, weight_ih)


def _elman_backward_flops(
    grad_output: Any, grad_h_n: Any, output: Tensor, *_: Any, **__: Any
) -> int:
    return 2 * _rows(output) * output.shape[-1] ** 2


def _elman_gradients_flops(
    grad_output: Any,
    grad_h_n: Tensor | None,
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    output: Tensor,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: Tensor | None,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    hidden, features = weight_ih.shape
    rows = _rows(output)
    batch = _batch(input, [grad_h_n, h0], batch_sizes)
    if batch is None:
        batch = int(cast(Tensor, batch_sizes)[0])
    wants_input, wants_h0, wants_ih, wants_hh, _bias, _norm = wanted
    with_previous = rows - batch if h0 is None else rows
    recurrent = rows + wants_h0 * batch + wants_hh * with_previous
    return 2 * hidden * (recurrent * hidden + (wants_input + wants_ih) * rows * features)


def _elman_gradients_pair_flops(*args: Any, **_: Any) -> int:
    return sum(_elman_gradients_flops(*each) for each in arguments_of_each(*args))


def _linear_recurrence_flops(d: Any, g: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _rows(g) * g.shape[-1] ** 2
