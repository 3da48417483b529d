"""The Elman recurrence in plain PyTorch, one time step at a time.

This module is the oracle that every kernel is tested against and the fallback where no kernel can
be built. It is written to be read: autograd differentiates it like any other PyTorch code.

Half precisions follow the same rule as the kernels: a step is computed in float32 and its result
is rounded to the tensor's dtype, so that h_t as returned is exactly the h_t that is carried on.

Shape legend: T time steps, B batch, I input size, H hidden size, N = sum(batch_sizes) packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

NONLINEARITIES: tuple[str, ...] = ("tanh", "relu", "sigmoid", "identity")
"""Names accepted as ``nonlinearity``, everywhere in this package."""

REAL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What everything in this package computes in."""

DTYPES = (*REAL_DTYPES, torch.complex64, torch.complex128)
"""What a layer or cell computes in: complex numbers in plain PyTorch alone, and not with relu."""


def activation(z: Tensor, nonlinearity: str) -> Tensor:
    """Return ``f(z)`` for the nonlinearity of that name; also compiled by TorchScript."""
    if nonlinearity == "tanh":
        return torch.tanh(z)
    if nonlinearity == "relu":
        return torch.relu(z)
    if nonlinearity == "sigmoid":
        return torch.sigmoid(z)
    return z


def activation_derivative(h: Tensor, nonlinearity: str) -> Tensor:
    """Return ``f'(z)``, read off the output ``h = f(z)`` (differentiable in ``h``).

    tanh: 1 - h^2; relu: [h > 0]; sigmoid: h (1 - h); identity: 1.
    """
    if nonlinearity == "tanh":
        return 1 - h * h
    if nonlinearity == "relu":
        return (h <= 0).logical_not().to(h.dtype)  # a NaN lets the gradient pass, as in torch
    if nonlinearity == "sigmoid":
        return h * (1 - h)
    return torch.ones_like(h)


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
    step: Callable[[int, int, Tensor], Tensor],
    state: Tensor,
    num_rows: int,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Apply ``step(row, size, previous)`` along time; return every state and each sample's last.

    ``state`` is ``(B, H)``. A sample that has ended (or, in reverse, not begun) keeps its state.
    """
    outputs: list[tuple[int, Tensor]] = []
    for row, size in time_slices(num_rows, state.shape[0], batch_sizes, reverse):
        new = step(row, size, state[:size])
        outputs.append((row, new))
        state = new if size == state.shape[0] else torch.cat([new, state[size:]])
    outputs.sort(key=lambda item: item[0])
    if not outputs:
        return state.new_empty(0, state.shape[1]), state
    return torch.cat([new for _, new in outputs]), state


def join_directions(results: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Put the outputs ``(.., H)`` of a layer's directions side by side; stack the final states."""
    outputs, final_states = zip(*results, strict=True)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return output, torch.stack(final_states)


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
    dtype, wide = input.dtype, compute_dtype(input.dtype)
    batch = int(batch_sizes[0]) if batch_sizes is not None else input.shape[1]
    hidden = weight_hh.shape[0]
    state = input.new_zeros(batch, hidden) if h0 is None else h0
    z_input = input.flatten(0, -2).to(wide) @ weight_ih.to(wide).T
    for bias in (bias_ih, bias_hh):
        if bias is not None:
            z_input = z_input + bias.to(wide)
    weight = weight_hh.to(wide).T

    def step(row: int, size: int, previous: Tensor) -> Tensor:
        z = z_input[row : row + size] + previous.to(wide) @ weight
        return activation(z, nonlinearity).to(dtype)

    output, h_n = run_steps(step, state, z_input.shape[0], batch_sizes, reverse)
    return output.view(*input.shape[:-1], hidden), h_n


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

    def step(row: int, size: int, previous: Tensor) -> Tensor:
        rows = slice(row, row + size)
        return (d_rows[rows] * (g_rows[rows] + previous.to(wide) @ weight)).to(dtype)

    output, _ = run_steps(step, state, g_rows.shape[0], batch_sizes, reverse)
    return output.view(g.shape)
