"""Records of adjoints, and the two ways to come by them: a fused backward's sinks, and a node.

Shape legend: T time steps, B batch, L layers, D directions, P size of the state h_t, N packed rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnn_cuda import autocast
from rnn_cuda._dynamo import untraced
from rnn_cuda.cells import Cell, Weights, cell_named, recurrent_matrix
from rnn_cuda.instruments.adjoint import Adjoints, LayerRun, Wanted, adjoint_sweep
from rnn_cuda.linear_algebra import row_norms
from rnn_cuda.recording import RecurrentCall, check_recordable
from rnn_cuda.reference import compute_dtype
from rnn_cuda.stack import RecurrentStack

TORCH_RECURRENCES: dict[Callable[..., Any], Cell] = {
    torch._VF.rnn_tanh: cell_named("elman.tanh"),
    torch._VF.rnn_relu: cell_named("elman.relu"),
    torch._VF.lstm: cell_named("lstm"),
    torch._VF.gru: cell_named("gru"),
}
"""What the ``forward`` of torch's recurrent modules calls, and the cell of each."""

_FUNCTIONS = {cell: function for function, cell in TORCH_RECURRENCES.items()}
_OPTIONS = ("has_biases", "num_layers", "dropout", "train", "bidirectional")
_DENSE = ("input", "hx", "params", *_OPTIONS, "batch_first")
_PACKED = ("data", "batch_sizes", "hx", "params", *_OPTIONS)


@dataclasses.dataclass(frozen=True)
class AdjointRecord:
    """The adjoints of one layer and direction, in one call and one backward pass.

    T time steps, B batch, H hidden size (``proj_size`` for the hidden state of an LSTM that has
    one). Time and samples are the caller's, whatever ``batch_first`` is; an unbatched call has
    B = 1; in a packed call, what lies behind a sample's end is NaN.

    Attributes:
        layer: qualified name of the module with torch's suffix, such as ``encoder.l1_reverse``.
        call: number of the call among the module's calls that built a graph, from 0.
        backward: number of the backward pass through that call, from 0.
        adjoint_norm: float64 ``(T, B)``, Euclidean norm of dL/dh_t.
        cell_adjoint_norm: the same of dL/dc_t; None but for an LSTM.
        adjoint: dL/dh_t, ``(T, B, H)``, in the dtype that the layer computes in; None unless asked
            for.
        cell_adjoint: dL/dc_t, likewise.

    """

    layer: str
    call: int
    backward: int
    adjoint_norm: Tensor
    cell_adjoint_norm: Tensor | None = None
    adjoint: Tensor | None = None
    cell_adjoint: Tensor | None = None

    @property
    def joint_adjoint_norm(self) -> Tensor:
        """The norm of dL/dh_t and dL/dc_t together; of dL/dh_t where there is no cell."""
        if self.cell_adjoint_norm is None:
            return self.adjoint_norm
        return torch.hypot(self.adjoint_norm, self.cell_adjoint_norm)


# By the module's position in the model, the layer's in the module, and the call.
Log = dict[tuple[int, int, int], list[AdjointRecord]]


@dataclasses.dataclass(frozen=True)
class CallLog:
    """Where the adjoints of one call of a module go, and what is wanted of them."""

    log: Log
    key: tuple[int, int]  # the module's position in the model, and the call
    module: str  # its name
    names: list[str]  # of layers and directions
    vectors: bool
    cell_through_hidden: bool

    def add(self, index: int, **values: Tensor) -> None:
        """Add what a backward pass brought for a layer and direction."""
        position, call = self.key
        records = self.log.setdefault((position, index, call), [])
        key = (self.names[index], call, len(records))
        records.append(AdjointRecord(*key, **values))


def by_step_and_sample(
    rows: Tensor,
    batch_sizes: Tensor | None,
    unsorted_indices: Tensor | None,
    shape: Sequence[int] = (),
) -> Tensor:
    """From rows ``(N, ..)`` to ``(T, B, ..)``, the caller's samples; NaN behind a sample's end.

    ``shape`` is (T, B) where the rows are not those of a packed sequence.
    """
    if batch_sizes is None:
        return rows.reshape(*shape, *rows.shape[1:])
    packed = PackedSequence(rows, batch_sizes, None, unsorted_indices)
    return nn.utils.rnn.pad_packed_sequence(packed, padding_value=torch.nan)[0]


# ---- fused layers on native kernels --------------------------------------------------------------


class Sink:
    """Takes what the fused backward of one layer emits."""

    def __init__(self, log: CallLog, layer: int, call: RecurrentCall) -> None:
        self.vectors = log.vectors
        # The rows' order alone: the call holds the graph.
        order = call.batch_sizes, call.unsorted_indices
        self._log, self._first, self._order = log, layer * call.directions, order

    def __call__(self, norms: Sequence[Tensor], adjoints: Sequence[Tensor] | None) -> None:
        directions = len(norms[0])
        which = {"": 0}
        if len(norms) > 1:
            which["cell_"] = 1 if self._log.cell_through_hidden else 2
        for direction in range(directions):
            records = {}
            for state, number in which.items():
                records[f"{state}adjoint_norm"] = self._restored(norms[number][direction])
                if adjoints is not None:
                    vectors = adjoints[number].chunk(directions, -1)[direction]
                    records[f"{state}adjoint"] = self._restored(vectors)
            self._log.add(self._first + direction, **records)

    def _restored(self, rows: Tensor) -> Tensor:
        return rows if self._order[0] is None else by_step_and_sample(rows, *self._order)


def add_sinks(log: CallLog, call: RecurrentCall) -> bool:
    """Let the fused backward of every layer emit its adjoints.

    Return false, and do nothing, if not all have one: on the reference backend, or where a layer
    has nothing to differentiate.
    """
    if call.taps is None or not all(tap.is_attached for tap in call.taps):
        return False
    for layer, tap in enumerate(call.taps):
        tap.sinks.append(Sink(log, layer, call))
    return True


# ---- everything else: a node behind the recurrence -----------------------------------------------


def record_at(
    call: KeptCall, log: CallLog, batch_first: bool, results: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Put a node between a recurrence and its results; return these as they are behind it.

    A view stays one, of what is behind the node: where it is modified in place, hooks on a view are
    dropped, and others are not.
    """
    bases = [_base(result) for result in results]
    view_of: Any = Tensor._view_func  # pyright: ignore[reportAttributeAccessIssue]
    recorded = RecordAdjoints.apply(call, log, batch_first, results, *bases)
    return tuple(
        copy if result is base else view_of(result, copy)
        for result, base, copy in zip(results, bases, recorded, strict=True)
    )


def _base(result: Tensor) -> Tensor:
    """What ``result`` is a view of, if it shows all of it."""
    base = result._base
    is_whole = base is not None and base.numel() == result.numel() and base.is_contiguous()
    return base if base is not None and is_whole else result


class RecordAdjoints(torch.autograd.Function):
    """The identity, on what a recurrence returns: between it and all that others do with that.

    So its gradients are what flows into the recurrence, whatever hooks there are; and it measures
    before the recurrence's own backward pass, when the weights are still those of the forward pass.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        call: KeptCall,
        log: CallLog,
        batch_first: bool,
        results: Sequence[Tensor],
        *bases: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.log, ctx.batch_first = call, log, batch_first
        ctx.layouts = [
            None
            if result is base
            else (result.size(), result.stride(), result.storage_offset() - base.storage_offset())
            for result, base in zip(results, bases, strict=True)
        ]
        ctx.has_graph = False  # of gradients that came through here
        ctx.set_materialize_grads(False)
        # Detached, they share their version counters with the results, and are no views of them:
        # they can be modified in place wherever the results could.
        return tuple(base.detach() for base in bases)

    @staticmethod
    @untraced
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        check_recordable(grads)
        compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")
        if compiled_autograd is not None and compiled_autograd.in_compiled_autograd_region:
            # Its graphs add up gradients, and take none that is None.
            raise RuntimeError(
                f"GradientFlow cannot record {ctx.log.module} under compiled autograd, which only "
                "a fused layer on native kernels can be"
            )
        if ctx.has_graph:
            warnings.warn(
                "GradientFlow does not record this backward pass: it goes through gradients that "
                "were computed with create_graph=True before, and then the hidden states have "
                "gradients besides those that reach the module; fused layers on native kernels "
                "record such passes too",
                stacklevel=2,
            )
        else:
            ctx.has_graph = torch.is_grad_enabled()
            with torch.no_grad():
                laid_out = list(map(_laid_out, grads, ctx.layouts))
                _record(ctx.call, ctx.log, ctx.batch_first, laid_out)
        return (None, None, None, None, *grads)


def _laid_out(grad: Tensor | None, layout: tuple[Any, Any, int] | None) -> Tensor | None:
    """From the gradient of a base to that of the result that is a view of it."""
    if grad is None or layout is None:
        return grad
    size, stride, offset = layout
    grad = grad.contiguous()  # it may itself be a part of something
    return grad.as_strided(size, stride, grad.storage_offset() + offset)


def _record(
    kept: KeptCall, log: CallLog, batch_first: bool, grads: Sequence[Tensor | None]
) -> None:
    def restored(rows: Tensor) -> Tensor:
        order = kept.call.batch_sizes, kept.call.unsorted_indices
        return by_step_and_sample(rows, *order, shape=kept.call.input.shape[:2])

    if batch_first and grads[0] is not None:
        grads = [grads[0].transpose(0, 1), *grads[1:]]
    options = {"vectors": log.vectors, "cell_total": log.cell_through_hidden}
    for index, adjoints in enumerate(kept.adjoints(grads, log.module, **options)):
        records = {"adjoint_norm": restored(adjoints.hidden_norm)}
        cell = adjoints.cell if adjoints.cell_total is None else adjoints.cell_total
        if cell is not None:
            records["cell_adjoint_norm"] = restored(row_norms(cell))
        if log.vectors and adjoints.hidden is not None:
            records["adjoint"] = restored(adjoints.hidden)
        if log.vectors and cell is not None:
            records["cell_adjoint"] = restored(cell)
        log.add(index, **records)


# ---- calls that are kept -------------------------------------------------------------------------


def torch_call(
    module: nn.Module,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    unsorted_indices: Callable[[Tensor], Tensor | None],
) -> tuple[RecurrentCall, bool]:
    """Describe a call of one of `TORCH_RECURRENCES`; also return whether it is batch first.

    Its random state is left to the caller. ``unsorted_indices`` is asked for those that belong to
    packed ``batch_sizes``.
    """
    second = kwargs["batch_sizes"] if "batch_sizes" in kwargs else args[1]
    is_packed = isinstance(second, Tensor) and second.dim() == 1  # states have three dimensions
    given = dict(zip(_PACKED if is_packed else _DENSE, args, strict=False)) | kwargs
    batch_sizes, batch_first = given.get("batch_sizes"), given.get("batch_first", False)
    input = given["data"] if batch_sizes is not None else given["input"]
    hx, params, num_layers = given["hx"], given["params"], given["num_layers"]
    cell = TORCH_RECURRENCES[function]
    h0, c0 = hx if cell.has_cell_state else (hx, None)
    per_group = len(params) // (num_layers * (2 if given["bidirectional"] else 1))
    dropout = given["dropout"] if given["train"] and num_layers > 1 else 0.0
    call = RecurrentCall(
        module=module,
        cell=cell,
        input=input.transpose(0, 1) if batch_first else input,
        h0=h0,
        c0=c0,
        weights=[list(params[i : i + per_group]) for i in range(0, len(params), per_group)],
        bidirectional=given["bidirectional"],
        has_biases=given["has_biases"],
        training=given["train"],
        dropout=dropout,
        batch_sizes=batch_sizes,
        unsorted_indices=None if batch_sizes is None else unsorted_indices(batch_sizes),
        autocast_dtype=autocast.active_dtype(input.device.type),
    )
    return call, batch_first


class KeptCall:
    """A `RecurrentCall` with its output, detached: what a backward pass needs to find adjoints.

    It keeps no graph, and no copies either: a weight that is modified in place is noticed. What a
    module returns are the states of its last layer. Lower layers are recomputed, one at a time, by
    the functions and with the dropout masks of the call: to the bit what it computed, on a CPU.
    """

    def __init__(self, call: RecurrentCall, output: Tensor) -> None:
        """``output`` is ``(T, B, D * P)``, or packed ``(N, D * P)``."""

        def detached(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.detach()

        self.call = call = dataclasses.replace(
            call,
            module=_as_it_is(call.module),
            input=call.input.detach(),
            h0=detached(call.h0),
            c0=detached(call.c0),
            weights=[[weight.detach() for weight in group] for group in call.weights],
        )
        self._output = output.detach()
        self._output_version = output._version
        states = [state for state in (call.h0, call.c0) if state is not None]
        kept = [call.input, *states, *(weight for group in call.weights for weight in group)]
        self._versions = [(tensor, tensor._version) for tensor in kept]

    def adjoints(
        self, grads: Sequence[Tensor | None], name: str, *, vectors: bool, cell_total: bool
    ) -> list[Adjoints]:
        """Return the adjoints of every layer and direction.

        Args:
            grads: of output, h_n and, for an LSTM, c_n; None stands for zeros.
            name: of the module, for errors.
            vectors: if false, those of the hidden states may be missing, but for their norms.
            cell_total: whether to find that of `Adjoints`.

        Raises:
            RuntimeError: what the call computed with was modified in place since, or is gone.

        """
        self._check_unchanged(name)
        call, wide = self.call, compute_dtype(self._output.dtype)

        def widened(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(wide)

        inputs, outputs, masks = self._replay()
        direct, grad_h_n, grad_c_n = (widened(grad) for grad in (*grads, None)[:3])
        results: list[Adjoints] = []
        for layer in reversed(range(call.num_layers)):
            per_direction = []
            size = outputs[layer].shape[-1] // call.directions
            for direction in range(call.directions):
                index = layer * call.directions + direction
                columns = slice(direction * size, (direction + 1) * size)
                run = LayerRun(
                    cell=call.cell,
                    weights=self._weights(index, wide),
                    input=inputs[layer].to(wide),
                    output=outputs[layer][..., columns].to(wide),
                    h0=widened(_at(call.h0, index)),
                    c0=widened(_at(call.c0, index)),
                    reverse=direction == 1,
                    batch_sizes=call.batch_sizes,
                    batch=_batch(call),
                )
                grad_output = None if direct is None else direct[..., columns]
                finals = _at(grad_h_n, index), _at(grad_c_n, index)
                wanted = Wanted(vectors, layer > 0, cell_total)
                per_direction.append(adjoint_sweep(run, grad_output, *finals, wanted))
            results = per_direction + results
            if layer > 0:
                total = sum(a.input for a in per_direction if a.input is not None)
                direct = torch.as_tensor(total).view(inputs[layer].shape)
                mask = masks[layer - 1]
                direct = direct if mask is None else direct * mask
        return results

    def _weights(self, index: int, dtype: torch.dtype) -> Weights:
        call = self.call
        group = [autocast.cast(w, call.autocast_dtype).to(dtype) for w in call.weights[index]]
        ih, hh, *rest = group
        bias_ih, bias_hh = rest[:2] if call.has_biases else (None, None)
        projection = rest[-1] if len(rest) % 2 else None
        return Weights(ih, recurrent_matrix(call.module, hh), bias_ih, bias_hh, projection)

    def _check_unchanged(self, name: str) -> None:
        for tensor, version in self._versions:
            is_gone = tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0
            if is_gone or tensor._version != version:
                fate = "freed" if is_gone else "modified by an inplace operation"
                raise RuntimeError(
                    f"GradientFlow cannot record {name}: its input, an initial state or a weight "
                    f"was {fate} between the forward and the backward pass"
                )

    def _replay(self) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """Every layer's input and output, and the dropout masks (scaled) between them."""
        inputs, outputs, masks = [self.call.input], [], []
        with self._as_it_ran():
            last = self.call.num_layers - 1
            for layer in range(last):
                outputs.append(self._run_layer(layer, inputs[layer]))
                mask = None
                if self.call.random_state is not None:
                    mask = torch.dropout(torch.ones_like(outputs[layer]), self.call.dropout, True)
                masks.append(mask)
                inputs.append(outputs[layer] if mask is None else outputs[layer] * mask)
            modified = self._output._version != self._output_version
            outputs.append(self._run_layer(last, inputs[last]) if modified else self._output)
        return inputs, outputs, masks

    @contextlib.contextmanager
    def _as_it_ran(self) -> Iterator[None]:
        device, dtype = self.call.input.device.type, self.call.autocast_dtype
        with contextlib.ExitStack() as stack:
            if self.call.random_state is not None:
                stack.enter_context(torch.random.fork_rng(devices=[]))
                torch.set_rng_state(self.call.random_state)
            if torch.amp.is_autocast_available(device):
                # Without the cache: what is cached under no_grad would lose the caller's gradients.
                stack.enter_context(
                    torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False)
                )
            yield

    def _run_layer(self, layer: int, sequence: Tensor) -> Tensor:
        """Run one layer, in both directions if it has two."""
        call = self.call
        indices = range(layer * call.directions, (layer + 1) * call.directions)
        states = [s[indices[0] : indices[-1] + 1] for s in (call.h0, call.c0) if s is not None]
        if isinstance(call.module, RecurrentStack):
            weights = [call.weights[index] for index in indices]
            return call.module._layer(sequence, tuple(states), weights, call.batch_sizes)[0]
        weights = [weight for index in indices for weight in call.weights[index]]
        hx = states if call.cell.has_cell_state else states[0]
        options = (weights, call.has_biases, 1, 0.0, call.training, call.bidirectional)
        function = _FUNCTIONS[call.cell]
        if call.batch_sizes is None:
            return function(sequence, hx, *options, False)[0]
        return function(sequence, call.batch_sizes, hx, *options)[0]


def _as_it_is(module: nn.Module) -> nn.Module:
    """Return a module with the same attributes, which may be set anew in the other: a leak."""
    # Not copy.copy: what FSDP2 makes of a module cannot be copied.
    same: nn.Module = object.__new__(type(module))
    same.__dict__.update(module.__dict__)
    return same


def _at(states: Tensor | None, index: int) -> Tensor | None:
    return None if states is None else states[index]


def _batch(call: RecurrentCall) -> int:
    return call.input.shape[1] if call.batch_sizes is None else int(call.batch_sizes[0])
