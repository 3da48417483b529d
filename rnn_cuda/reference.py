"""The recurrences in plain PyTorch, one time step at a time: the loop over time, for any cell.

This module is the oracle that every kernel is tested against and the fallback where no kernel can
be built. It is written to be read: autograd differentiates it like any other PyTorch code. A step
itself is in ``rnn_cuda/cells/``.

Half precisions follow the same rule as the kernels: a step is computed in float32 and its result
is rounded to the tensor's dtype, so that h_t as returned is exactly the h_t that is carried on.

Shape legend: T time steps, B batch, I input size, H hidden size, N = sum(batch_sizes) packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from rnn_cuda.cells import Cell, State, cell_named

REAL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What everything in this package computes in."""

DTYPES = (*REAL_DTYPES, torch.complex64, torch.complex128)
"""What a layer or cell computes in: complex numbers in plain PyTorch alone, and not with relu."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which ``dtype`` is accumulated; also compiled by TorchScript."""
    return torch.float32 if dtype == torch.bfloat16 or dtype == torch.float16 else dtype


def time_slices(
    num_rows: int, batch: int, batch_sizes: Tensor | None, reverse: bool
) -> Iterator[tuple[int, int]]:
    """Yield ``(first row, number of rows)`` of each time step, in the order of processing.

    Rows are those of the sequence flattened to ``(rows, features)``: ``t * B + b`` when every
    sample has every step, and PackedSequence's order otherwise.
    """
    if batch_sizes is None:
        # A batch of no samples takes one empty step, so that its result depends on the weights.
        sizes = [batch] * (num_rows // batch if batch else 1)
    else:
        sizes = batch_sizes.tolist()
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    steps = range(len(sizes) - 1, -1, -1) if reverse else range(len(sizes))
    for t in steps:
        yield starts[t], sizes[t]


def run_steps(
    step: Callable[[int, int, State], State],
    state: State,
    num_rows: int,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[State, State]:
    """Apply ``step(row, size, previous)`` along time; return every state and each sample's last.

    ``state`` has tensors ``(B, features)``, what comes back too. A sample that has ended (or, in
    reverse, not begun) keeps its state.
    """
    outputs: list[tuple[int, State]] = []
    batch = state[0].shape[0]
    for row, size in time_slices(num_rows, batch, batch_sizes, reverse):
        new = step(row, size, state if size == batch else tuple(part[:size] for part in state))
        outputs.append((row, new))
        if size < batch:
            new = tuple(torch.cat([n, part[size:]]) for n, part in zip(new, state, strict=True))
        state = new
    outputs.sort(key=lambda item: item[0])
    if not outputs:
        return tuple(part.new_empty(0, part.shape[1]) for part in state), state
    rows = zip(*(new for _, new in outputs), strict=True)
    return tuple(torch.cat(parts) for parts in rows), state


def run_cell(
    cell: Cell,
    input_sums: Tensor,
    state: State,
    weight_hh: Tensor,
    bias_hh: Tensor | None = None,
    projection: Tensor | None = None,
    *,
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[State, State]:
    """Run a cell along time; return every state, in rows, and each sample's last.

    Args:
        cell: the cell.
        input_sums: ``W x_t + b`` ``(rows, G * H)``, in the dtype that steps are computed in.
        state: ``(h,)`` or ``(h, c)``, each ``(B, features)``, in the dtype of the result.
        weight_hh: ``(G * H, P)``, in the dtype of ``input_sums``, as what follows.
        bias_hh: ``(G * H)``, where it is not in ``input_sums``.
        projection: ``(P, H)``.
        reverse: whether to run from the last step to the first.
        batch_sizes: of a packed sequence.

    """
    dtype, wide = state[0].dtype, input_sums.dtype
    weight = weight_hh.T
    if bias_hh is not None and not cell.keeps_sums_apart:
        input_sums, bias_hh = input_sums + bias_hh, None

    def step(row: int, size: int, previous: State) -> State:
        if dtype != wide:
            previous = tuple(part.to(wide) for part in previous)
        recurrent_sums = previous[0] @ weight
        if bias_hh is not None:
            recurrent_sums = recurrent_sums + bias_hh
        h, *c = cell.step(input_sums[row : row + size], recurrent_sums, previous[-1])
        if projection is not None:
            h = h @ projection.T
        return (h, *c) if dtype == wide else tuple(part.to(dtype) for part in (h, *c))

    return run_steps(step, state, input_sums.shape[0], batch_sizes, reverse)


def join_directions(results: Iterable[tuple[State, State]]) -> tuple[Tensor, ...]:
    """Put what `run_direction` returns of a layer's directions together, as a layer returns it."""
    sequences, final_states = zip(*results, strict=True)
    outputs = [h for h, *_ in sequences]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return output, *map(torch.stack, zip(*final_states, strict=True))


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
    """Run ``h_t = f(W x_t + b_ih + U h_{t-1} + b_hh)``; see :func:`rnn_cuda.functional.elman_rnn`.

    Takes ``input`` of shape ``(T, B, I)``, or ``(N, I)`` with ``batch_sizes``; arguments are not
    checked here.
    """
    (output,), (h_n,) = run_direction(
        cell_named(f"elman.{nonlinearity}"),
        input,
        [] if h0 is None else [h0],
        weight_ih,
        weight_hh,
        (bias_ih, bias_hh),
        reverse=reverse,
        batch_sizes=batch_sizes,
    )
    return output, h_n


def run_direction(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    biases: Sequence[Tensor | None],
    *,
    reverse: bool,
    batch_sizes: Tensor | None,
) -> tuple[State, State]:
    """Run one layer and direction of a cell; return its states as sequences, and the final ones.

    Args:
        cell: the cell.
        input: ``(T, B, I)``, or ``(N, I)`` with ``batch_sizes``.
        states: the initial ones, each ``(B, H)``, or nothing for zeros.
        weight_ih: ``(G * H, I)``.
        weight_hh: ``(G * H, H)``.
        biases: up to two, ``(G * H)`` or None.
        reverse: whether to run from the last step to the first.
        batch_sizes: of a packed sequence.

    """
    wide = compute_dtype(input.dtype)
    batch = int(batch_sizes[0]) if batch_sizes is not None else input.shape[1]
    hidden = weight_hh.shape[1]
    start = tuple(states) or (input.new_zeros(batch, hidden),) * cell.states
    input_sums = input.flatten(0, -2).to(wide) @ weight_ih.to(wide).T
    bias_ih, bias_hh = (*(None if b is None else b.to(wide) for b in biases), None, None)[:2]
    if bias_ih is not None:
        input_sums = input_sums + bias_ih
    outputs, final_states = run_cell(
        cell,
        input_sums,
        start,
        weight_hh.to(wide),
        bias_hh,
        reverse=reverse,
        batch_sizes=batch_sizes,
    )
    shape = *input.shape[:-1], hidden
    return tuple(output.view(shape) for output in outputs), final_states


def linear_recurrence(
    d: Tensor,
    g: Tensor,
    m: Tensor,
    y0: Tensor | None = None,
    *,
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
) -> Tensor:
    """Run ``y_t = d_t * (g_t + M y_{t-1})``; see :func:`rnn_cuda.functional.linear_recurrence`.

    Takes ``d`` and ``g`` of shape ``(T, B, H)``, or ``(N, H)`` with ``batch_sizes``; arguments are
    not checked here.
    """
    dtype, wide = g.dtype, compute_dtype(g.dtype)
    batch = int(batch_sizes[0]) if batch_sizes is not None else g.shape[1]
    hidden = m.shape[0]
    state = g.new_zeros(batch, hidden) if y0 is None else y0
    d_rows, g_rows = d.reshape(-1, hidden).to(wide), g.reshape(-1, hidden).to(wide)
    weight = m.to(wide).T

    def step(row: int, size: int, previous: State) -> State:
        rows = slice(row, row + size)
        return ((d_rows[rows] * (g_rows[rows] + previous[0].to(wide) @ weight)).to(dtype),)

    (output,), _ = run_steps(step, (state,), g_rows.shape[0], batch_sizes, reverse)
    return output.view(g.shape)
