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
from rnn_cuda.cells import Cell, State, cell_named
from rnn_cuda.cells.elman import NONLINEARITIES
from rnn_cuda.operators.function import plain_eager_mode
from rnn_cuda.operators.layer_forward import LayerForward
from rnn_cuda.operators.linear_recurrence import LinearRecurrence
from rnn_cuda.recording import Tap
from rnn_cuda.reference import DTYPES, REAL_DTYPES

__all__ = ["NONLINEARITIES", "bidirectional_elman_rnn", "elman_rnn", "linear_recurrence"]

_Direction = tuple[Any, Any, Any, Any, Any]  # h0, weight_ih, weight_hh, bias_ih, bias_hh
_Weights = Sequence[Tensor | None]  # of a direction: weight_ih, weight_hh, and biases, if any


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
        nonlinearity: f, one of ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"identity"``,
            ``"softplus"``.
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
    cell = _elman_cell(nonlinearity)
    _check_bool("reverse", reverse)
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    checked = (input, [None if h0 is None else [h0]], [weights], cell, batch_sizes)
    if batch_sizes is None and input.ndim == 2:
        _check_directions(*checked)
        batch_of_one = input.unsqueeze(1), None if h0 is None else h0.unsqueeze(0)
        options: Any = {"nonlinearity": nonlinearity, "reverse": reverse}
        output, h_n = elman_rnn(*batch_of_one, *weights, **options)
        return output.squeeze(1), h_n.squeeze(0)
    if not isinstance(h0, Tensor | None):
        _check_directions(*checked)
    states = [] if h0 is None else [h0.unsqueeze(0)]
    order = "reverse" if reverse else "forward"
    output, h_n = layer(
        input, states, [weights], cell=cell, direction=order, batch_sizes=batch_sizes
    )
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
    cell = _elman_cell(nonlinearity)
    first, second = _direction("forward", forward), _direction("reverse", reverse)
    starts, weights = (first[0], second[0]), [first[1:], second[1:]]
    states_of_each = [None if start is None else [start] for start in starts]
    checked = (input, states_of_each, weights, cell, batch_sizes)
    if batch_sizes is None and input.ndim == 2:
        _check_directions(*checked)
        of_batch = bidirectional_elman_rnn(
            input.unsqueeze(1),
            (_unsqueezed(first[0]), *first[1:]),
            (_unsqueezed(second[0]), *second[1:]),
            nonlinearity=nonlinearity,
        )
        (output, h_n), (output_reverse, h_n_reverse) = of_batch
        return (
            (output.squeeze(1), h_n.squeeze(0)),
            (output_reverse.squeeze(1), h_n_reverse.squeeze(0)),
        )
    if (first[0] is None) != (second[0] is None):
        _check_directions(*checked)  # the error would name the zeros
    h0 = call_then_check(_stacked, starts, _check_directions, checked)
    states = [] if h0 is None else [h0]
    output, h_n = layer(
        input, states, weights, cell=cell, direction="both", batch_sizes=batch_sizes
    )
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
    states: Sequence[Tensor],
    weights: Sequence[_Weights],
    *,
    cell: str,
    direction: str = "forward",
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
    constants: Sequence[tuple[Tensor | float, ...]] = (),
    tap: Tap | None = None,
) -> tuple[Tensor, ...]:
    """Run one layer of a cell in the directions of time that it has.

    Args:
        input: ``(T, B, I)``, or packed ``(N, I)`` with ``batch_sizes``.
        states: the initial ones, ``(D, B, H)`` each: h0, and c0 of a cell that has c; or nothing.
        weights: of each direction weight_ih, weight_hh and biases, or None in the place of a bias.
        cell: its name, one of `rnn_cuda.cells`.
        direction: ``"forward"``, ``"reverse"`` or ``"both"``.
        batch_sizes: as in :func:`elman_rnn`.
        recompute: whether the backward pass computes once more what the cell would save for it.
        constants: of each direction those of a cell that has some: numbers, or ``(H)`` each.
        tap: for the node of the layer, if it has one that takes it: on native kernels, in eager
            code, where there is something to differentiate.

    Returns:
        The states h of both directions side by side, ``(T, B, D * H)`` or ``(N, D * H)``, and the
        final states, ``(D, B, H)`` each.

    """
    kind = cell_named(cell)
    flat = [weight for its in weights for weight in its if weight is not None]
    if len(weights) == 2 or (kind.keeps_sums_apart and len(flat) == 3):
        flat = with_equal_biases(weights, kind)
    checked = (input, states, weights, cell, batch_sizes)
    if constants:
        flat = call_then_check(_with_constants, (flat, constants, kind), check_layer, checked)
    arguments = (input, states, flat, cell, direction, batch_sizes)
    if tap is None and runs_as_one_node(input, input.device.type, kind):
        operator = torch.ops.rnn_cuda.layer
        return tuple(call_then_check(operator, (*arguments, recompute), check_layer, checked))
    check_layer(*checked)
    if run_direction := _plain_direction(input, flat, kind):
        kinds = [kind.with_constants(*own) for own in constants] or [kind] * len(weights)
        return reference.join_directions(
            run_direction(
                *(kinds[d], input, [state[d] for state in states], *its[:2], its[2:]),
                reverse=direction == "reverse" or d == 1,
                batch_sizes=batch_sizes,
            )
            for d, its in enumerate(weights)
        )
    saves = bool(kind.saved_values) and not recompute and torch.is_grad_enabled()
    if tap is not None and plain_eager_mode():
        results = LayerForward.call(*arguments, saves, tap=tap)
    else:
        results = torch.ops.rnn_cuda.layer_forward(*arguments, saves)
    return tuple(results[: 1 + kind.states])


def _with_constants(
    flat: list[Tensor], constants: Sequence[tuple[Tensor | float, ...]], cell: Cell
) -> list[Tensor]:
    """Put each direction's constants behind its weights, as the operators take them."""
    count = len(flat) // len(constants)
    return [
        tensor
        for d, own in enumerate(constants)
        for tensor in (
            *flat[d * count : (d + 1) * count],
            *cell.with_constants(*own).constant_tensors(flat[1]),
        )
    ]


def with_equal_biases(weights: Sequence[_Weights], cell: Cell) -> list[Tensor]:
    """Give both directions as many biases, with zeros for those that one lacks.

    A bias that is alone stays where it is if that makes a difference to the cell.
    """
    counts = [sum(bias is not None for bias in its[2:]) for its in weights]
    most = 2 if cell.keeps_sums_apart and any(counts) else max(counts)
    like: Any = next((bias for its in weights for bias in its[2:] if bias is not None), None)
    flat: list[Any] = []
    for weight_ih, weight_hh, *biases in weights:
        if not cell.keeps_sums_apart:
            biases = [bias for bias in biases if bias is not None]
        biases = (*biases, None, None)[:most]
        flat += [weight_ih, weight_hh]
        flat += [torch.zeros_like(like) if bias is None else bias for bias in biases]
    return flat


def check_layer(
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[_Weights],
    cell: str,
    batch_sizes: Tensor | None,
) -> None:
    """Check the arguments of `layer`."""
    its_states = [[state[d] for state in states] or None for d in range(len(weights))]
    _check_directions(input, its_states, weights, cell, batch_sizes)


def runs_as_one_node(input: Tensor, device_type: str, cell: Cell) -> bool:
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
        and (cell.is_linear_recurrence or backend.takes_gated_cells(device_type, dtype))
    )


def _plain_direction(
    input: Tensor, tensors: Sequence[Tensor | None], cell: Cell
) -> Callable[..., tuple[State, State]] | None:
    """Return what runs a direction in plain PyTorch, or None: the kernels run the layer."""
    if _expanded_weights.are_among(tensors):
        return _expanded_weights.run_direction
    if is_distributed(input):  # which PyTorch's own operators know how to distribute
        backend.run_on_reference("there are no kernels for DTensors")
        return reference.run_direction
    device_type, dtype = input.device.type, input.dtype
    if not backend.use_native(device_type, dtype):
        return reference.run_direction
    if cell.is_linear_recurrence or backend.takes_gated_cells(device_type, dtype):
        return None
    backend.run_on_reference(
        f"there are no kernels for {type(cell).__name__} layers on {device_type} yet"
    )
    return reference.run_direction


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


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def _elman_cell(nonlinearity: object) -> str:
    """Return the name of the Elman cell with this nonlinearity."""
    if not isinstance(nonlinearity, str):
        raise TypeError(f"nonlinearity: expected a str, got {type(nonlinearity).__name__}")
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(
            f"nonlinearity: expected one of {', '.join(NONLINEARITIES)}; got {nonlinearity!r}"
        )
    return f"elman.{nonlinearity}"


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


_STATES = ("h0", "c0")
_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _check_directions(
    input: Tensor,
    states_of_each: Sequence[Sequence[Any] | None],
    weights_of_each: Sequence[_Weights],
    cell: str,
    batch_sizes: Tensor | None,
) -> None:
    """Check the arguments of a layer that has one direction, or a second one in reverse.

    States, ``(B, H)``, are None for zeros.
    """
    kind = cell_named(cell)
    _check_tensor("input", input)
    tensors: list[tuple[str, str, Any]] = []  # what it is, its name, itself
    for suffix, states, weights in zip(
        ("", "_reverse"), states_of_each, weights_of_each, strict=False
    ):
        pairs = [*zip(_STATES, states or [], strict=False), *zip(_WEIGHTS, weights, strict=False)]
        tensors += [(name, name + suffix, tensor) for name, tensor in pairs]
    for name, full_name, tensor in tensors:
        if name.startswith("weight"):
            _check_tensor(full_name, tensor)
    check_dense("input", input)
    distributed = is_distributed(input)
    for _, name, tensor in tensors:
        if isinstance(tensor, Tensor):
            check_dense(name, tensor)
            check_both_distributed(name, tensor, distributed, "input")
    weight_ih, weight_hh, *_ = weights_of_each[0]
    assert weight_ih is not None  # as checked above, and so is the next
    assert weight_hh is not None
    hidden = _check_square("weight_hh", weight_hh, kind.blocks)
    rows = kind.blocks * hidden
    features = _check_weight_ih(weight_ih, hidden, kind.blocks)
    dtype_and_device = (input.dtype, input.device)
    if batch_sizes is None and input.ndim == 2:
        _check_sequence("input", input.unsqueeze(1), features, None, DTYPES)
        state = (hidden,)
    else:
        batch = _check_sequence("input", input, features, batch_sizes, DTYPES)
        for states in states_of_each:
            if batch is None and states and isinstance(states[0], Tensor):
                batch = states[0].shape[0]
        state = (batch, hidden)
    shapes = {"weight_ih": (rows, features), "weight_hh": (rows, hidden)}
    shapes |= {"h0": state, "c0": state, "bias_ih": (rows,), "bias_hh": (rows,)}
    for name, full_name, tensor in tensors:
        _check_like(dtype_and_device, tensor, full_name, shapes[name])


def _check_square(name: str, matrix: Tensor, blocks: int = 1) -> int:
    """Check a recurrent matrix, ``blocks`` square ones; return H."""
    shape = matrix.shape
    if len(shape) != 2 or shape[0] != blocks * shape[1] or shape[1] == 0:
        expected = f"({_rows(blocks)}, H) with H > 0"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(shape)}")
    return shape[1]


def _check_weight_ih(weight_ih: Tensor, hidden: int, blocks: int) -> int:
    """Check the shape of ``weight_ih``; return I."""
    shape = weight_ih.shape
    if len(shape) != 2 or shape[0] != blocks * hidden:
        raise ValueError(
            f"weight_ih: expected shape ({_rows(blocks)}, I) with H = {hidden} as in weight_hh, "
            f"got {tuple(shape)}"
        )
    return shape[1]


def _rows(blocks: int) -> str:
    return "H" if blocks == 1 else f"{blocks} H"


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
