"""Differentiable recurrences: the Elman RNN, and the linear recurrence that is its derivative.

    P1  elman_rnn          h_t = f(W x_t + b_ih + U h_{t-1} + b_hh)
    P2  linear_recurrence  y_t = d_t * (g_t + M y_{t-1})

`bidirectional_elman_rnn` is P1 in both directions of time. Each has derivatives of any order, in
both modes, without Python per time step, because all of them can be had from P1 and P2; see
``docs/differentiation.md``.

Shape legend: T time steps, B batch, I input size, H hidden size, N = sum(batch_sizes) packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnn_cuda import _expanded_weights, backend, reference
from rnn_cuda.arguments import (
    check_both_distributed,
    check_dense,
    check_dtype_of,
    is_distributed,
)
from rnn_cuda.cells.elman import NONLINEARITIES
from rnn_cuda.operators.function import plain_eager_mode
from rnn_cuda.operators.layer_forward import LayerForward
from rnn_cuda.operators.linear_recurrence import LinearRecurrence
from rnn_cuda.recording import Tap
from rnn_cuda.reference import DTYPES, REAL_DTYPES

__all__ = ["NONLINEARITIES", "bidirectional_elman_rnn", "elman_rnn", "linear_recurrence"]

_Direction = tuple[Any, Any, Any, Any, Any]  # h0, weight_ih, weight_hh, bias_ih, bias_hh


def elman_rnn(
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one layer and direction of an Elman RNN over a sequence (Elman, 1990).

    ``h_t = f(W x_t + b_ih + U h_{t-1} + b_hh)``, W = ``weight_ih``, U = ``weight_hh``.

    All time steps are one native call; so is the recurrent part of the backward pass. Half
    precisions accumulate in float32 and round h_t once per step.

    Args:
        input: ``(T, B, I)``; ``(T, I)`` for one sequence without a batch; or, with ``batch_sizes``,
            the ``(N, I)`` data of a PackedSequence. Any strides.
        h0: initial state ``(B, H)``, ``(H,)`` without a batch; None for zeros.
        weight_ih: ``(H, I)``.
        weight_hh: ``(H, H)``.
        bias_ih: ``(H,)`` or None.
        bias_hh: ``(H,)`` or None.
        nonlinearity: f, one of ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"identity"``.
        reverse: run from the last time step to the first (the backward direction of a
            bidirectional layer).
        batch_sizes: ``batch_sizes`` of a PackedSequence: ``(T,)``, int64, on the CPU, not
            increasing; entry t counts the samples that have step t.

    Returns:
        output: every h_t, ``(T, B, H)``, ``(T, H)`` or ``(N, H)``.
        h_n: each sample's state after the last step visited, ``(B, H)`` or ``(H,)``.

    Raises:
        TypeError: an argument is not a tensor (or, where allowed, None).
        ValueError: a shape, dtype, device or name does not fit; the message says which, what was
            expected and what was given.

    """
    _check_tensor("input", input)
    _check_str("nonlinearity", nonlinearity)
    _check_bool("reverse", reverse)
    direction = (h0, weight_ih, weight_hh, bias_ih, bias_hh)
    options: Any = {"nonlinearity": nonlinearity, "batch_sizes": batch_sizes}
    if batch_sizes is None and input.ndim == 2:
        check_layer(input, (direction,), **options)
        batch_of_one = input.unsqueeze(1), _unsqueezed(h0)
        output, h_n = elman_rnn(*batch_of_one, *direction[1:], reverse=reverse, **options)
        return output.squeeze(1), h_n.squeeze(0)
    if not isinstance(h0, Tensor | None):
        check_layer(input, (direction,), **options)
    order = "reverse" if reverse else "forward"
    output, h_n = layer(input, _unsqueezed(h0), [direction[1:]], direction=order, **options)
    return output, h_n.squeeze(0)


def bidirectional_elman_rnn(
    input: Tensor,
    forward: Sequence[Tensor | None],
    reverse: Sequence[Tensor | None],
    *,
    nonlinearity: str = "tanh",
    batch_sizes: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Run one layer of an Elman RNN over a sequence in both directions of time, in one native call.

    It computes what two calls of :func:`elman_rnn` do, ``elman_rnn(input, *forward)`` and
    ``elman_rnn(input, *reverse, reverse=True)`` (Schuster and Paliwal, 1997). With the CUDA kernels
    both are one launch, as is their backward pass, wherever U stays on the chip (``docs/cuda.md``).

    Args:
        input: as in :func:`elman_rnn`.
        forward: ``(h0, weight_ih, weight_hh, bias_ih, bias_hh)`` of the direction from the first
            time step to the last, as in :func:`elman_rnn`; ``h0`` and the biases may be None, and
            the biases may be left out.
        reverse: the same of the other direction, with the same H.
        nonlinearity: as in :func:`elman_rnn`; so is batch_sizes.
        batch_sizes: those of a PackedSequence, or None.

    Returns:
        ``(output, h_n)`` of each direction, as :func:`elman_rnn` returns them. The outputs are
        views of one tensor, the output of ``torch.nn.RNN``, in which they lie side by side.

    Raises:
        TypeError, ValueError: as in :func:`elman_rnn`; tensors of ``reverse`` are named
            ``weight_ih_reverse`` and so on.

    """
    _check_tensor("input", input)
    _check_str("nonlinearity", nonlinearity)
    first, second = _direction("forward", forward), _direction("reverse", reverse)
    options: Any = {"nonlinearity": nonlinearity, "batch_sizes": batch_sizes}
    if batch_sizes is None and input.ndim == 2:
        check_layer(input, (first, second), **options)
        of_batch = bidirectional_elman_rnn(
            input.unsqueeze(1),
            (_unsqueezed(first[0]), *first[1:]),
            (_unsqueezed(second[0]), *second[1:]),
            **options,
        )
        (output, h_n), (output_reverse, h_n_reverse) = of_batch
        return (
            (output.squeeze(1), h_n.squeeze(0)),
            (output_reverse.squeeze(1), h_n_reverse.squeeze(0)),
        )
    starts = (first[0], second[0])
    checked = (input, (first, second), nonlinearity, batch_sizes)
    if (first[0] is None) != (second[0] is None):
        check_layer(*checked)  # the error would name the zeros
    h0 = call_then_check(_stacked, starts, check_layer, checked)
    output, h_n = layer(input, h0, [first[1:], second[1:]], direction="both", **options)
    outputs = output.chunk(2, -1)
    return (outputs[0], h_n[0]), (outputs[1], h_n[1])


def linear_recurrence(
    d: Tensor,
    g: Tensor,
    m: Tensor,
    y0: Tensor | None = None,
    *,
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
) -> Tensor:
    """Run the modulated linear recurrence ``y_t = d_t * (g_t + M y_{t-1})``.

    It is the derivative of an Elman RNN, in either mode, and its own; as such it computes adjoints,
    tangents and products of Jacobians without leaving the kernel.

    Args:
        d: elementwise modulation, ``(T, B, H)``, or ``(N, H)`` with ``batch_sizes``.
        g: driving term, of the shape of ``d``.
        m: M, ``(H, H)``; a transposed view costs nothing.
        y0: state before the first step, ``(B, H)``; None for zeros.
        reverse: run from the last time step to the first; then ``y_{t-1}`` above is ``y_{t+1}``.
        batch_sizes: as in :func:`elman_rnn`.

    Returns:
        Every y_t, of the shape of ``g``.

    Raises:
        TypeError, ValueError: as in :func:`elman_rnn`.

    """
    _check_tensor("d", d)
    _check_tensor("g", g)
    _check_tensor("m", m)
    hidden = _check_square("m", m)
    _check_bool("reverse", reverse)
    batch = _check_sequence("g", g, hidden, batch_sizes)
    kind = (g.dtype, g.device)
    _check_like(kind, d, "d", g.shape)
    _check_kind(kind, m, "m")
    _check_like(kind, y0, "y0", (batch, hidden))
    if not is_distributed(g) and backend.use_native(g.device.type, g.dtype):
        operator = torch.ops.rnn_cuda.linear_recurrence
        call = LinearRecurrence.call if plain_eager_mode() else operator
        return call(d, g, m, y0, reverse, batch_sizes)
    return reference.linear_recurrence(d, g, m, y0, reverse=reverse, batch_sizes=batch_sizes)


# ---- layers --------------------------------------------------------------------------------------


def layer(
    input: Tensor,
    h0: Tensor | None,
    weights: Sequence[Sequence[Tensor | None]],
    *,
    nonlinearity: str,
    direction: str = "forward",
    batch_sizes: Tensor | None = None,
    tap: Tap | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one layer of an Elman RNN in the directions of time that it has.

    Args:
        input: ``(T, B, I)``, or packed ``(N, I)`` with ``batch_sizes``.
        h0: ``(D, B, H)`` or None.
        weights: of each direction weight_ih, weight_hh and biases, or None in the place of a bias.
        nonlinearity: as in :func:`elman_rnn`.
        direction: ``"forward"``, ``"reverse"`` or ``"both"``.
        batch_sizes: as in :func:`elman_rnn`.
        tap: for the node of the layer, if it has one that takes it: on native kernels, in eager
            code, where there is something to differentiate.

    Returns:
        The states of both directions side by side, ``(T, B, D * H)`` or ``(N, D * H)``, and the
        final ones ``(D, B, H)``.

    """
    flat = [weight for its in weights for weight in its if weight is not None]
    if len(weights) == 2:
        flat = _with_equal_biases(flat, weights)
    states = [] if h0 is None else [h0]
    arguments: Any = (input, states, flat, f"elman.{nonlinearity}", direction, batch_sizes)
    checked = (input, h0, weights, nonlinearity, batch_sizes)
    if tap is None and runs_as_one_node(input, input.device.type):
        output, h_n = call_then_check(
            torch.ops.rnn_cuda.layer, arguments, check_stacked_layer, checked
        )
        return output, h_n
    check_stacked_layer(*checked)
    if plain_layer := _plain_layer(input, flat):
        options: Any = {"nonlinearity": nonlinearity, "batch_sizes": batch_sizes}
        return reference.join_directions(
            plain_layer(
                *(input, None if h0 is None else h0[d], *its),
                reverse=direction == "reverse" or d == 1,
                **options,
            )
            for d, its in enumerate(weights)
        )
    if tap is not None and plain_eager_mode():
        output, h_n = LayerForward.call(*arguments, tap=tap)
    else:
        output, h_n = torch.ops.rnn_cuda.layer_forward(*arguments)
    return output, h_n


def _with_equal_biases(
    flat: list[Tensor], weights: Sequence[Sequence[Tensor | None]]
) -> list[Tensor]:
    """Give both directions as many biases, with zeros for those that one lacks."""
    count = sum(weight is not None for weight in weights[0])
    first, second = flat[:count], flat[count:]
    for its, other in ((first, second), (second, first)):
        its += [torch.zeros_like(bias) for bias in other[len(its) :]]
    return first + second


def check_stacked_layer(
    input: Tensor,
    h0: Tensor | None,
    weights: Sequence[Sequence[Tensor | None]],
    nonlinearity: str,
    batch_sizes: Tensor | None,
) -> None:
    """Check the arguments of `layer`."""
    directions: Any = [
        (None if h0 is None else h0[d], *its, None, None)[:5] for d, its in enumerate(weights)
    ]
    check_layer(input, directions, nonlinearity, batch_sizes)


def runs_as_one_node(input: Tensor, device_type: str) -> bool:
    """Whether a layer over ``input`` is to run as one native node of autograd's graph.

    See ``csrc/layer_node.h``. Only tensors with data do: one of a tracer, or on the device "meta",
    would not get to the checks of the native code. ``device_type`` is ``input.device.type``.
    """
    dtype = input.dtype
    return (
        type(input) in (Tensor, torch.nn.Parameter)
        and device_type != "meta"
        and dtype in REAL_DTYPES
        and plain_eager_mode()
        and backend.use_native(device_type, dtype)
    )


def _plain_layer(input: Tensor, tensors: Sequence[Tensor | None]) -> Callable[..., Any] | None:
    """Return what runs a direction in plain PyTorch, or None: the kernels run the layer."""
    if _expanded_weights.are_among(tensors):
        return _expanded_weights.elman_rnn
    if is_distributed(input):  # which PyTorch's own operators know how to distribute
        backend.run_on_reference("there are no kernels for DTensors")
        return reference.elman_rnn
    if not backend.use_native(input.device.type, input.dtype):
        return reference.elman_rnn
    return None


def call_then_check(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    check: Callable[..., None],
    checked: tuple[Any, ...],
) -> Any:
    """Call ``function``; if it raises, raise what ``check`` has to say, else what it raised.

    After the fact, as the checks in Python take as long as a small layer. The operators have them
    too, before they compute anything; these say better what is wrong.
    """
    try:
        return function(*arguments)
    except Exception as error:
        refusal = error
    try:
        check(*checked)
        raise refusal
    finally:
        del refusal  # its traceback holds this frame, and with it the tensors


# ---- checks --------------------------------------------------------------------------------------

_Kind = tuple[torch.dtype, torch.device]  # the sequence's, which every other tensor shares


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _check_str(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def _direction(name: str, tensors: object) -> _Direction:
    if not isinstance(tensors, tuple | list):
        raise TypeError(f"{name}: expected a tuple of tensors, got {type(tensors).__name__}")
    if not 3 <= len(tensors) <= 5:
        raise ValueError(
            f"{name}: expected (h0, weight_ih, weight_hh) and up to two biases, "
            f"got {len(tensors)} items"
        )
    h0, weight_ih, weight_hh, bias_ih, bias_hh = (*tensors, None, None)[:5]
    return h0, weight_ih, weight_hh, bias_ih, bias_hh


def _stacked(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return the initial states of two directions as one tensor, ``(2, B, H)``."""
    if first is None and second is None:
        return None
    first = torch.zeros_like(second) if first is None else first  # pyright: ignore
    second = torch.zeros_like(first) if second is None else second
    if first.dtype != second.dtype:  # torch would convert one of them
        raise TypeError(f"h0_reverse: expected {first.dtype} as h0 has, got {second.dtype}")
    return torch.stack((first, second))


def _unsqueezed(h0: Tensor | None) -> Tensor | None:
    return None if h0 is None else h0.unsqueeze(0)


_NAMES = ("h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
_NAMES_OF_EACH = (_NAMES, tuple(f"{name}_reverse" for name in _NAMES))


def check_layer(
    input: Tensor,
    directions: Sequence[_Direction],
    nonlinearity: str,
    batch_sizes: Tensor | None,
) -> None:
    """Check the arguments of a layer that has one direction, or a second one in reverse."""
    _check_tensor("input", input)
    for names, direction in zip(_NAMES_OF_EACH, directions, strict=False):
        _check_tensor(names[1], direction[1])
        _check_tensor(names[2], direction[2])
    check_dense("input", input)
    distributed = is_distributed(input)
    for names, direction in zip(_NAMES_OF_EACH, directions, strict=False):
        for name, tensor in zip(names, direction, strict=True):
            if isinstance(tensor, Tensor):
                check_dense(name, tensor)
                check_both_distributed(name, tensor, distributed, "input")
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(
            f"nonlinearity: expected one of {', '.join(NONLINEARITIES)}; got {nonlinearity!r}"
        )
    _, weight_ih, weight_hh, *_ = directions[0]
    hidden = _check_square("weight_hh", weight_hh)
    features = _check_weight_ih(weight_ih, hidden)
    kind = (input.dtype, input.device)
    if batch_sizes is None and input.ndim == 2:
        _check_sequence("input", input.unsqueeze(1), features, None, DTYPES)
        state = (hidden,)
    else:
        batch = _check_sequence("input", input, features, batch_sizes, DTYPES)
        for h0, *_ in directions:
            if batch is None and isinstance(h0, Tensor):
                batch = h0.shape[0]
        state = (batch, hidden)
    shapes = (state, (hidden, features), (hidden, hidden), (hidden,), (hidden,))
    for names, direction in zip(_NAMES_OF_EACH, directions, strict=False):
        for tensor, name, shape in zip(direction, names, shapes, strict=True):
            _check_like(kind, tensor, name, shape)


def _check_square(name: str, matrix: Tensor) -> int:
    """Check a recurrent matrix; return H."""
    shape = matrix.shape
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"{name}: expected shape (H, H) with H > 0, got {tuple(shape)}")
    return shape[0]


def _check_weight_ih(weight_ih: Tensor, hidden: int) -> int:
    """Check the shape of ``weight_ih``; return I."""
    shape = weight_ih.shape
    if len(shape) != 2 or shape[0] != hidden:
        raise ValueError(
            f"weight_ih: expected shape (H, I) with H = {hidden} as in weight_hh, "
            f"got {tuple(shape)}"
        )
    return shape[1]


def _check_sequence(
    name: str,
    sequence: Tensor,
    features: int,
    batch_sizes: Tensor | None,
    dtypes: tuple[torch.dtype, ...] = REAL_DTYPES,
) -> int | None:
    """Check a sequence and its batch_sizes; return the batch size B where it is known."""
    check_dtype_of(name, sequence, dtypes)
    shape = sequence.shape
    if len(shape) != (3 if batch_sizes is None else 2) or shape[-1] != features:
        expected = (
            f"(T, B, {features})" if batch_sizes is None else f"(N, {features}) with batch_sizes"
        )
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(shape)}")
    if batch_sizes is not None:
        return _check_batch_sizes(batch_sizes, name, shape[0])
    if shape[0] == 0:
        raise ValueError(f"{name}: expected at least one time step, got {tuple(shape)}")
    return shape[1]


def _check_batch_sizes(batch_sizes: Tensor, name: str, rows: int) -> int | None:
    """Check the batch_sizes of ``rows`` packed rows; return B, or None while tracing."""
    _check_tensor("batch_sizes", batch_sizes)
    if batch_sizes.device.type != "cpu" or batch_sizes.dtype != torch.int64:
        raise ValueError(
            "batch_sizes: expected an int64 tensor on the CPU, "
            f"got {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if torch.compiler.is_compiling():
        # No look at values while tracing: the operator checks them each time it runs.
        return None
    sizes = batch_sizes.tolist() if batch_sizes.ndim == 1 else []
    if not sizes or sizes[-1] < 1 or sizes != sorted(sizes, reverse=True):
        raise ValueError(
            "batch_sizes: expected one dimension of positive, not increasing counts, as in a "
            f"PackedSequence; got {batch_sizes}"
        )
    if sum(sizes) != rows:
        raise ValueError(
            f"batch_sizes: expected counts that add up to the {rows} rows of {name}, "
            f"got a sum of {sum(sizes)}"
        )
    return sizes[0]


def _check_like(kind: _Kind, value: Any, name: str, shape: Any) -> None:
    """Check that ``value`` is None or a tensor of ``shape``, on the sequence's dtype and device."""
    if value is None:
        return
    _check_tensor(name, value)
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    _check_kind(kind, value, name)


def _check_kind(kind: _Kind, value: Tensor, name: str) -> None:
    dtype, device = kind
    if value.dtype != dtype or value.device != device:
        raise ValueError(
            f"{name}: expected {dtype} on {device} as the sequence has, "
            f"got {value.dtype} on {value.device}"
        )
