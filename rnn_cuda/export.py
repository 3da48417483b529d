"""Leaving eager PyTorch: TorchScript, traces, ``torch.fx`` and ONNX.

The kernels stay behind: what leaves is made of PyTorch's or ONNX's own operators, so it runs where
this package is not installed. (``torch.export`` is not here: it keeps the kernels' operators.)

* ``torch.jit.script`` compiles the methods of `ScriptMethods` in place of ``forward``.
* ``torch.jit.trace`` records a call of `run_layers`, whose loop over time stays a loop.
* ``torch.onnx.export``, either exporter, gets one ``RNN`` operator per layer from `onnx_layers`.
* ``torch.fx`` gets one node that calls the module, from `fx_node`.

Shape legend: T time steps, B batch, I input size, H hidden size, L layers, D directions,
N = sum(batch_sizes) packed rows.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnn_cuda.cells import State
from rnn_cuda.cells.elman import activation
from rnn_cuda.reference import compute_dtype

if TYPE_CHECKING:
    from rnn_cuda.modules import ElmanStack
    from rnn_cuda.stack import RecurrentStack

# ---- plain PyTorch, as TorchScript takes it ------------------------------------------------------


def run_layers(
    sequence: Tensor,
    hx: Tensor | None,
    weights: list[Tensor],
    nonlinearity: str,
    keep: float,
    rate: float,
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    training: bool,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = keep h_{t-1} + rate f(W x_t + A h_{t-1} + b)`` through all layers and directions.

    ``sequence`` is ``(T, B, I)``, or ``(N, I)`` with ``batch_sizes``; ``weights`` are W, A and the
    biases, if any, of each layer and direction in turn. Returns output and h_n, as a module does.
    """
    directions = 2 if bidirectional else 1
    each = len(weights) // (num_layers * directions)
    batch = sequence.size(1) if batch_sizes is None else int(batch_sizes[0])
    shape = [num_layers * directions, batch, weights[0].size(0)]
    if hx is None:
        hx = zero_state(sequence, batch_sizes, num_layers * directions, weights[0].size(0))
    if list(hx.shape) != shape:
        raise RuntimeError(f"Expected hidden size {shape} of hx, got {list(hx.shape)}")
    if keep == 0.0 and rate == 1.0 and (nonlinearity == "tanh" or nonlinearity == "relu"):
        # What torch.nn.RNN calls: one operator for all layers.
        options = (each == 4, num_layers, dropout, training, bidirectional)
        if batch_sizes is None:
            if nonlinearity == "tanh":
                return torch.rnn_tanh(sequence, hx, weights, *options, batch_first=False)
            return torch.rnn_relu(sequence, hx, weights, *options, batch_first=False)
        if nonlinearity == "tanh":
            return torch.rnn_tanh(sequence, batch_sizes, hx, weights, *options)
        return torch.rnn_relu(sequence, batch_sizes, hx, weights, *options)
    final_states: list[Tensor] = []
    for layer in range(num_layers):
        outputs: list[Tensor] = []
        for direction in range(directions):
            index = layer * directions + direction
            z = input_term(sequence, weights[index * each : (index + 1) * each])
            matrix, state = weights[index * each + 1], hx[index]
            if batch_sizes is None:
                output, h_n = run_dense(z, state, matrix, nonlinearity, keep, rate, direction == 1)
            else:
                output, h_n = run_packed(
                    z, state, matrix, nonlinearity, keep, rate, direction == 1, batch_sizes
                )
            outputs.append(output)
            final_states.append(h_n)
        sequence = torch.cat(outputs, dim=-1)
        if dropout > 0 and layer + 1 < num_layers:
            sequence = nn.functional.dropout(sequence, dropout, training)
    return sequence, torch.stack(final_states)


def input_term(sequence: Tensor, weights: list[Tensor]) -> Tensor:
    """Return ``W x_t + b`` of every time step, in compute precision."""
    wide = compute_dtype(sequence.dtype)
    z = nn.functional.linear(sequence.to(wide), weights[0].to(wide))
    for bias in weights[2:]:
        z = z + bias.to(wide)
    return z


def step(
    z: Tensor, previous: Tensor, matrix: Tensor, nonlinearity: str, keep: float, rate: float
) -> Tensor:
    """Return the next state, in the dtype of the ``previous`` one."""
    wide = previous.to(z.dtype)
    new = activation(z + nn.functional.linear(wide, matrix.to(z.dtype)), nonlinearity)
    if keep != 0.0 or rate != 1.0:
        new = keep * wide + rate * new
    return new.to(previous.dtype)


def run_dense(
    z: Tensor,
    state: Tensor,
    matrix: Tensor,
    nonlinearity: str,
    keep: float,
    rate: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Run one direction over ``z`` ``(T, B, H)``; return output and final state ``(B, H)``."""
    if reverse:
        z = z.flip(0)
    states: list[Tensor] = []
    for t in range(z.size(0)):
        state = step(z[t], state, matrix, nonlinearity, keep, rate)
        states.append(state)
    output = torch.stack(states)
    return output.flip(0) if reverse else output, state


def run_packed(
    z: Tensor,
    state: Tensor,
    matrix: Tensor,
    nonlinearity: str,
    keep: float,
    rate: float,
    reverse: bool,
    batch_sizes: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run one direction over ``z`` ``(N, H)``, as `run_dense` does over a dense batch."""
    # Backwards, the samples begin one after another: all carry their initial state until they do.
    steps = len(batch_sizes)
    row = z.size(0) if reverse else 0
    states: list[Tensor] = []
    for i in range(steps):
        size = int(batch_sizes[steps - 1 - i if reverse else i])
        row = row - size if reverse else row
        new = step(z[row : row + size], state[:size], matrix, nonlinearity, keep, rate)
        row = row if reverse else row + size
        state = torch.cat([new, state[size:]])
        states.append(new)
    if reverse:
        states.reverse()
    return torch.cat(states), state


@functools.cache
def _scripted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` compiled: a trace then calls it, where it would unroll its loops."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch has warned already
        return torch.jit.script(function)


# ---- torch.jit.trace, and both ONNX exporters ----------------------------------------------------


def is_leaving(sequence: Tensor) -> bool:
    """Whether a layer over ``sequence`` is being traced by TorchScript or exported to ONNX."""
    return torch._C._get_tracing_state() is not None or (
        type(sequence) is not Tensor
        and torch.compiler.is_compiling()
        and torch.onnx.is_in_onnx_export()
    )


def trace_layers(
    module: ElmanStack,
    sequence: Tensor,
    states: State,
    weights: list[list[Tensor]],
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run all layers where `is_leaving`; arguments and results are those of ``_compute``."""
    hx = states[0] if states else None
    groups = []
    for weight_ih, weight_hh, *biases in map(_with_biases, weights):
        groups.append([weight_ih, module._recurrent_matrix(weight_hh), *biases])
    step_options = (module.nonlinearity, *module._coefficients())
    if torch.onnx.is_in_onnx_export():
        return onnx_layers(module, sequence, hx, groups, step_options, batch_sizes)
    return _scripted(run_layers)(
        sequence,
        hx,
        [weight for group in groups for weight in group],
        *step_options,
        module.num_layers,
        bool(module.bidirectional),
        module.dropout,
        module.training,
        batch_sizes,
    )


def trace_gated_layers(
    module: RecurrentStack,
    sequence: Tensor,
    states: State,
    weights: list[list[Tensor]],
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    """Run all layers of a GRU or LSTM where `is_leaving`; see `trace_layers`.

    By torch's own operator, which the older ONNX exporter knows, too. Under torch.export that one
    fixes the number of time steps.
    """
    dtype = sequence.dtype
    if torch.onnx.is_in_onnx_export() and dtype == torch.float64:
        raise NotImplementedError(
            f"a {type(module).__name__} in {dtype} cannot be exported to ONNX, whose runtime has "
            "no operator for it: export it in float32"
        )
    wide = compute_dtype(dtype)
    # Where a sequence is packed, the exporter would not see the operator behind a cast.
    if wide != dtype and batch_sizes is None:
        wide_states = tuple(state.to(wide) for state in states)
        wide_weights = [[weight.to(wide) for weight in _with_biases(group)] for group in weights]
        results = trace_gated_layers(module, sequence.to(wide), wide_states, wide_weights, None)
        return tuple(result.to(dtype) for result in results)
    groups = [_with_biases(group) for group in weights]
    if torch._C._get_tracing_state() is None:
        return _onnx_gated_layers(module, sequence, states, groups)
    if not states:
        batch: Any = sequence.shape[1] if batch_sizes is None else batch_sizes[0]
        zeros = sequence.new_zeros(len(weights), batch, module.hidden_size)
        states = (zeros,) * module._cell().states
    flat = [weight for group in groups for weight in group]
    options = (module.bias, module.num_layers, module.dropout, module.training)
    options = (*options, bool(module.bidirectional))
    is_lstm = len(states) == 2
    run: Any = torch.lstm if is_lstm else torch.gru
    hx = states if is_lstm else states[0]
    if batch_sizes is None:
        return run(sequence, hx, flat, *options, False)
    return run(sequence, batch_sizes, hx, flat, *options)


def check_packed(batch_sizes: Tensor) -> None:
    """Raise NotImplementedError where packed sequences are exported with ``dynamo=True``."""
    # First of all checks: PyTorch gives what it packs there the wrong shape and dtype.
    if torch._C._get_tracing_state() is None and is_leaving(batch_sizes):
        raise NotImplementedError(
            "packed sequences cannot be exported to ONNX with dynamo=True, which PyTorch's own "
            "pack_padded_sequence does not support; export with dynamo=False"
        )


def _with_biases(group: list[Any]) -> list[Tensor]:
    """Return W, U and the biases of a direction, with zeros for a bias that was set to None."""
    return [group[1].new_zeros(len(group[1])) if weight is None else weight for weight in group]


_StepOptions = tuple[str, float, float]  # nonlinearity, keep, rate

_ONNX_ACTIVATIONS = {
    "tanh": "Tanh",
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "identity": "Affine",  # alpha z + beta
    "softplus": "Softplus",
}


def onnx_layers(
    module: ElmanStack,
    sequence: Tensor,
    hx: Tensor | None,
    groups: list[list[Tensor]],
    step_options: _StepOptions,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run all layers as ONNX has them; ``groups`` are W, A, biases of each layer and direction.

    A layer is one ``RNN`` operator. It knows no share of the old state that is kept, and ONNX
    Runtime has none in float64: these are loops.
    """
    nonlinearity, keep, rate = step_options
    dtype = sequence.dtype
    if dtype.is_complex:
        raise NotImplementedError(f"{dtype} cannot be exported to ONNX: its operators take none")
    is_operator = (keep, rate) == (0.0, 1.0) and dtype != torch.float64
    if batch_sizes is not None and (not is_operator or dtype == torch.bfloat16):
        raise NotImplementedError(
            f"a {type(module).__name__} in {dtype} cannot be exported to ONNX with packed "
            "sequences, which need its RNN operator: export a FusedRNN in float32, or dense batches"
        )
    directions = module._num_directions
    final_states = []
    for first in range(0, len(groups), directions):
        its = groups[first : first + directions]
        h0 = None if hx is None else hx[first : first + directions]
        if is_operator:
            options = (nonlinearity, module.hidden_size, batch_sizes)
            sequence, h_n = _onnx_operator(sequence, h0, its, *options)
        else:
            sequence, h_n = _onnx_loops(sequence, h0, its, step_options)
        final_states.append(h_n)
        if module.dropout and first + directions < len(groups):
            sequence = nn.functional.dropout(sequence, module.dropout, module.training)
    return sequence, torch.cat(final_states)


def _onnx_operator(
    sequence: Tensor,
    h0: Tensor | None,
    groups: list[list[Tensor]],
    nonlinearity: str,
    hidden: int,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run one layer from ``h0`` ``(D, B, H)``, as one operator; h_n is shaped as ``h0``."""
    dtype = sequence.dtype
    wide = compute_dtype(dtype)
    # Where a sequence is packed, the exporter would not see the operator behind a cast.
    if wide != dtype and batch_sizes is None:
        h0 = None if h0 is None else h0.to(wide)
        groups = [[weight.to(wide) for weight in group] for group in groups]
        results = _onnx_operator(sequence.to(wide), h0, groups, nonlinearity, hidden, None)
        return results[0].to(dtype), results[1].to(dtype)
    W, R = (torch.stack([group[i] for group in groups]) for i in (0, 1))
    B = None if len(groups[0]) == 2 else torch.stack([torch.cat(group[2:]) for group in groups])
    directions = len(groups)
    if torch._C._get_tracing_state() is not None:
        arguments = (sequence, W, R, B, batch_sizes, h0)
        return _RNNOperator.apply(*arguments, nonlinearity, hidden, directions)
    T, batch = sequence.shape[:2]
    y, h_n = torch.onnx.ops.symbolic_multi_out(
        "RNN",
        (sequence, W, R, B, None, h0),
        _onnx_attributes(nonlinearity, hidden, directions),
        dtypes=(dtype, dtype),
        shapes=((T, directions, batch, hidden), (directions, batch, hidden)),
    )
    return y.transpose(1, 2).flatten(2), h_n


_ONNX_GATES = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}
"""The order of ONNX's gates, by their numbers in torch's."""


def _onnx_gated_layers(
    module: RecurrentStack, sequence: Tensor, states: State, groups: list[list[Tensor]]
) -> tuple[Tensor, ...]:
    """Run all layers as one ``GRU`` or ``LSTM`` operator each, for ``dynamo=True``."""
    name, hidden, directions = module.mode, module.hidden_size, module._num_directions
    order, count = _ONNX_GATES[name], module._cell().states

    def reordered(weight: Tensor) -> Tensor:
        blocks = weight.chunk(len(order))
        return torch.cat([blocks[gate] for gate in order])

    attributes: Any = {"hidden_size": hidden}
    attributes["direction"] = "bidirectional" if directions == 2 else "forward"
    if name == "GRU":
        attributes["linear_before_reset"] = 1  # r multiplies U h + b, as in torch
    T, batch = sequence.shape[:2]
    shapes = (T, directions, batch, hidden), *[(directions, batch, hidden)] * count
    final_states = []
    for first in range(0, len(groups), directions):
        its = [list(map(reordered, group)) for group in groups[first : first + directions]]
        W, R = (torch.stack([group[i] for group in its]) for i in (0, 1))
        B = torch.stack([torch.cat(group[2:]) for group in its]) if module.bias else None
        starts = [state[first : first + directions] for state in states]
        y, *finals = torch.onnx.ops.symbolic_multi_out(
            name,
            (sequence, W, R, B, None, *starts),
            attributes,
            dtypes=(sequence.dtype,) * (1 + count),
            shapes=shapes,
        )
        sequence = y.transpose(1, 2).flatten(2)
        final_states.append(finals)
        if module.dropout and first + directions < len(groups):
            sequence = nn.functional.dropout(sequence, module.dropout, module.training)
    return sequence, *map(torch.cat, zip(*final_states, strict=True))


def _onnx_attributes(nonlinearity: str, hidden: int, directions: int) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "activations": [_ONNX_ACTIVATIONS[nonlinearity]] * directions,
        "direction": "bidirectional" if directions == 2 else "forward",
        "hidden_size": hidden,
    }
    if nonlinearity == "identity":
        attributes |= {"activation_alpha": [1.0] * directions}
        attributes |= {"activation_beta": [0.0] * directions}
    return attributes


class _RNNOperator(torch.autograd.Function):
    """ONNX's RNN operator for the exporter that works on traces (``dynamo=False``)."""

    @staticmethod
    def forward(
        ctx: Any,
        sequence: Tensor,
        W: Tensor,
        R: Tensor,
        B: Tensor | None,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        nonlinearity: str,
        hidden: int,
        directions: int,
    ) -> tuple[Tensor, Tensor]:
        biases = [[] if B is None else [B[d, :hidden], B[d, hidden:]] for d in range(directions)]
        weights = [w for d in range(directions) for w in (W[d], R[d], *biases[d])]
        options = (nonlinearity, 0.0, 1.0, 1, directions == 2, 0.0, False)
        return run_layers(sequence, h0, weights, *options, batch_sizes)

    @staticmethod
    def symbolic(
        g: Any,
        sequence: Any,
        W: Any,
        R: Any,
        B: Any,
        batch_sizes: Any,
        h0: Any,
        nonlinearity: str,
        hidden: int,
        directions: int,
    ) -> tuple[Any, Any]:
        absent = g.op("prim::Constant")
        absent.setType(torch._C.OptionalType.ofTensor())
        inputs = (sequence, W, R, B, batch_sizes, h0)
        attributes = _onnx_attributes(nonlinearity, hidden, directions)
        suffixes = {"activations": "s", "direction": "s", "hidden_size": "i"}
        y, h_n = g.op(
            "RNN",
            *(absent if value is None else value for value in inputs),
            outputs=2,
            **{f"{name}_{suffixes.get(name, 'f')}": v for name, v in attributes.items()},
        )
        # (T, D, B, H) to (T, B, D H). The exporter takes a sequence's packing past the operator,
        # to where it is unpacked again, if just these two operators follow.
        y = g.op("Transpose", y, perm_i=[0, 2, 1, 3])
        shape = g.op("Constant", value_t=torch.tensor([0, 0, -1]))
        return g.op("Reshape", y, shape), h_n


def _onnx_loops(
    sequence: Tensor, h0: Tensor | None, groups: list[list[Tensor]], step_options: _StepOptions
) -> tuple[Tensor, Tensor]:
    """Run one layer as `_onnx_operator` does, with a loop over time per direction."""
    results = []
    for direction, group in enumerate(groups):
        z = input_term(sequence, group)
        matrix = group[1].to(z.dtype)
        state = z.new_zeros(z.shape[1:]) if h0 is None else h0[direction].to(z.dtype)
        loop = _scripted(run_dense) if torch._C._get_tracing_state() is not None else _scan
        results.append(loop(z, state, matrix, *step_options, direction == 1))
    outputs, final_states = zip(*results, strict=True)
    dtype = sequence.dtype
    return torch.cat(outputs, dim=-1).to(dtype), torch.stack(final_states).to(dtype)


def _scan(
    z: Tensor,
    state: Tensor,
    matrix: Tensor,
    nonlinearity: str,
    keep: float,
    rate: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Do what `run_dense` does, for the exporter that works on ``torch.export``."""
    from torch._higher_order_ops import scan

    # As a tensor: the exporter rounds the numbers of Python to float32.
    shares = torch.tensor([keep, rate], dtype=z.dtype, device=z.device)

    def next_state(previous: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
        new = step(z_t, previous, matrix, nonlinearity, 0.0, 1.0)
        if (keep, rate) != (0.0, 1.0):
            new = shares[0] * previous + shares[1] * new
        return new, new.clone()  # scan refuses results that are one tensor

    h_n, output = scan(next_state, state, z.flip(0) if reverse else z)
    return output.flip(0) if reverse else output, h_n


# ---- torch.jit.script ----------------------------------------------------------------------------


class ScriptMethods:
    """What ``torch.jit.script`` compiles of a `RecurrentStack` instead of its ``forward``.

    As in ``torch.nn.RNN``, ``forward`` has one compiled overload for dense and one for packed
    sequences, which only callers that are compiled too can choose from. torch.jit.trace compiles
    these methods too, unprepared, but does not call them.
    """

    def __prepare_scriptable__(self: Any) -> Any:
        """Return the module to compile: this one, with what compiled code reads."""
        from rnn_cuda.stack import RecurrentStack

        self._check_leaving()
        computed = [n for names in self._weight_names for n in names if n not in self._parameters]
        if computed:
            raise ValueError(
                "torch.jit.script takes plain parameters, but these are parametrized, pruned or "
                f"weight-normalised: {', '.join(computed)}; remove that first"
            )
        # Compiled code cannot look a parameter up by a name that it computes.
        self._script_weights = [w for group in self.all_weights for w in _with_biases(group)]
        if (
            type(self).forward is RecurrentStack.forward
        ):  # else what it was overridden with is compiled
            self.__overloads__ = {"forward": ["_script_dense", "_script_packed"]}
        return self

    @torch.jit.export
    def _script_dense(self: Any, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if input.dim() != 2 and input.dim() != 3:
            raise ValueError(f"RNN: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if input.dim() == 2:
            output, h_n = self._script_layers(
                input.unsqueeze(1), None if hx is None else hx.unsqueeze(1), None
            )
            return output.squeeze(1), h_n.squeeze(1)
        if self.batch_first:
            output, h_n = self._script_layers(input.transpose(0, 1), hx, None)
            return output.transpose(0, 1), h_n
        return self._script_layers(input, hx, None)

    @torch.jit.export
    def _script_packed(
        self: Any, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is not None and sorted_indices is not None:
            hx = hx.index_select(1, sorted_indices)
        output, h_n = self._script_layers(data, hx, batch_sizes)
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n


class ElmanScriptMethods(ScriptMethods):
    """Those of an `ElmanStack`."""

    def _script_layers(
        self: Any, sequence: Tensor, hx: Tensor | None, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "_script_weights"):
            raise RuntimeError("torch.jit.script was not asked for this module")
        keep, rate = self._coefficients()
        weights: list[Tensor] = []
        for i, weight in enumerate(self._script_weights):
            if i % (4 if self.bias else 2) == 1:
                weight = self._recurrent_matrix(weight)
            weights.append(weight)
        return run_layers(
            sequence,
            hx,
            weights,
            self.nonlinearity,
            keep,
            rate,
            self.num_layers,
            bool(self.bidirectional),
            self.dropout,
            self.training,
            batch_sizes,
        )


class GRUScriptMethods(ScriptMethods):
    """Those of a `FusedGRU`."""

    def _script_layers(
        self: Any, sequence: Tensor, hx: Tensor | None, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "_script_weights"):
            raise RuntimeError("torch.jit.script was not asked for this module")
        bidirectional = bool(self.bidirectional)
        if hx is None:
            count = self.num_layers * (2 if bidirectional else 1)
            hx = zero_state(sequence, batch_sizes, count, self.hidden_size)
        options = (self.bias, self.num_layers, self.dropout, self.training)
        if batch_sizes is None:
            return torch.gru(sequence, hx, self._script_weights, *options, bidirectional, False)
        return torch.gru(sequence, batch_sizes, hx, self._script_weights, *options, bidirectional)


class LSTMScriptMethods(ScriptMethods):
    """Those of a `FusedLSTM`."""

    @torch.jit.export
    def _script_dense(  # pyright: ignore[reportIncompatibleMethodOverride]
        self: Any, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if input.dim() != 2 and input.dim() != 3:
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if input.dim() == 2:
            states = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
            output, (h_n, c_n) = self._script_layers(input.unsqueeze(1), states, None)
            return output.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        if self.batch_first:
            output, states_n = self._script_layers(input.transpose(0, 1), hx, None)
            return output.transpose(0, 1), states_n
        return self._script_layers(input, hx, None)

    @torch.jit.export
    def _script_packed(  # pyright: ignore[reportIncompatibleMethodOverride]
        self: Any, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is not None and sorted_indices is not None:
            hx = (hx[0].index_select(1, sorted_indices), hx[1].index_select(1, sorted_indices))
        output, (h_n, c_n) = self._script_layers(data, hx, batch_sizes)
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
            c_n = c_n.index_select(1, unsorted_indices)
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, (h_n, c_n)

    def _script_layers(
        self: Any,
        sequence: Tensor,
        hx: tuple[Tensor, Tensor] | None,
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if not hasattr(self, "_script_weights"):
            raise RuntimeError("torch.jit.script was not asked for this module")
        bidirectional = bool(self.bidirectional)
        if hx is None:
            count = self.num_layers * (2 if bidirectional else 1)
            zeros = zero_state(sequence, batch_sizes, count, self.hidden_size)
            hx = (zeros, zeros)
        states = [hx[0], hx[1]]
        options = (self.bias, self.num_layers, self.dropout, self.training)
        if batch_sizes is None:
            output, h_n, c_n = torch.lstm(
                sequence, states, self._script_weights, *options, bidirectional, False
            )
        else:
            output, h_n, c_n = torch.lstm(
                sequence, batch_sizes, states, self._script_weights, *options, bidirectional
            )
        return output, (h_n, c_n)


def zero_state(sequence: Tensor, batch_sizes: Tensor | None, count: int, hidden: int) -> Tensor:
    """Return a zero state of ``count`` layers and directions, as `run_layers` takes it."""
    batch = sequence.size(1) if batch_sizes is None else int(batch_sizes[0])
    return torch.zeros([count, batch, hidden], dtype=sequence.dtype, device=sequence.device)


# ---- torch.fx ------------------------------------------------------------------------------------


def has_fx_proxy(*arguments: object) -> bool:
    """Whether ``torch.fx`` is tracing through a module that has these arguments."""
    return any(isinstance(argument, torch.fx.Proxy) for argument in arguments)


def fx_node(module: nn.Module, *arguments: Any) -> Any:
    """Record one call of ``module``, from within this package's ``forward``; return its proxy.

    torch.fx does so with ``torch.nn.RNN`` by itself: it looks into no module of ``torch.nn``.

    Raises:
        TypeError: the module itself is traced, and not one that holds it.

    """
    tracer: Any = next(a.tracer for a in arguments if isinstance(a, torch.fx.Proxy))
    path = tracer.path_of_module(module)
    if not path:
        name = type(module).__name__
        raise TypeError(f"torch.fx traces modules that hold a {name}, but not the {name} itself")
    arguments = arguments if arguments[-1] is not None else arguments[:-1]
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        nn.modules.module._global_forward_hooks,
        nn.modules.module._global_forward_pre_hooks,
    )
    if type(module).forward is _own_class(module).forward and not any(hooks):
        return tracer.create_proxy("call_module", path, arguments, {})
    # What stands around this method is being traced too: a call of the module would do it twice.
    return tracer.create_proxy("call_function", call_forward, (module, *arguments), {})


def call_forward(module: Any, *arguments: Any) -> Any:
    """Call ``forward`` of this package's class that ``module`` is, without hooks."""
    return _own_class(module).forward(module, *arguments)


def _own_class(module: nn.Module) -> Any:
    return next(kind for kind in type(module).__mro__ if kind.__module__.startswith("rnn_cuda."))
