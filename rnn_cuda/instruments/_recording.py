"""Records of adjoints, and the two ways to come by them: a fused backward's sinks, and a node."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnn_cuda._adjoint import RecurrentCall, check_recordable, row_norms
from rnn_cuda._dynamo import untraced
from rnn_cuda.instruments._stack import StackCall, by_step_and_sample
from rnn_cuda.operators.layer_forward import LayerForward


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

    def add(self, index: int, norm: Tensor, vectors: Tensor | None, **cell: Tensor) -> None:
        """Add what a backward pass brought for a layer and direction."""
        position, call = self.key
        records = self.log.setdefault((position, index, call), [])
        key = (self.names[index], call, len(records))
        records.append(AdjointRecord(*key, adjoint_norm=norm, adjoint=vectors, **cell))


# ---- FusedRNN on native kernels ------------------------------------------------------------------


class Sink:
    """Takes what the fused backward of one layer emits."""

    def __init__(self, log: CallLog, layer: int, call: RecurrentCall) -> None:
        self.vectors = log.vectors
        # The rows' order alone: the call holds the graph.
        order = call.batch_sizes, call.unsorted_indices
        self._log, self._first, self._order = log, layer * call.directions, order

    def __call__(self, norms: Tensor, adjoints: Tensor | None) -> None:
        vectors = [None] * len(norms) if adjoints is None else adjoints.chunk(len(norms), -1)
        for direction, (norm, adjoint) in enumerate(zip(norms, vectors, strict=True)):
            if self._order[0] is not None:
                norm = by_step_and_sample(norm, *self._order)
                adjoint = None if adjoint is None else by_step_and_sample(adjoint, *self._order)
            self._log.add(self._first + direction, norm, adjoint)


def add_sinks(log: CallLog, call: RecurrentCall, outputs: Sequence[Tensor]) -> bool:
    """Let the fused backward of every layer emit its adjoints.

    Return false, and do nothing, if not all have one: on the reference backend, or where a layer
    has nothing to differentiate.
    """
    node_type: Any = LayerForward._backward_cls  # pyright: ignore[reportAttributeAccessIssue]
    nodes: list[Any] = [output.grad_fn for output in outputs]
    if not nodes or not all(isinstance(node, node_type) for node in nodes):
        return False
    for layer, node in enumerate(nodes):
        node.sinks += (Sink(log, layer, call),)
    return True


# ---- everything else -----------------------------------------------------------------------------


def record_at(
    call: StackCall, log: CallLog, batch_first: bool, results: Sequence[Tensor]
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
        call: StackCall,
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
                "a FusedRNN on native kernels can be"
            )
        if ctx.has_graph:
            warnings.warn(
                "GradientFlow does not record this backward pass: it goes through gradients that "
                "were computed with create_graph=True before, and then the hidden states have "
                "gradients besides those that reach the module; FusedRNN on native kernels records "
                "such passes too",
                stacklevel=2,
            )
        else:
            ctx.has_graph = torch.is_grad_enabled()
            with torch.no_grad():
                laid_out = list(map(_laid_out, grads, ctx.layouts))
                _sweep(ctx.call, ctx.log, ctx.batch_first, laid_out)
        return (None, None, None, None, *grads)


def _laid_out(grad: Tensor | None, layout: tuple[Any, Any, int] | None) -> Tensor | None:
    """From the gradient of a base to that of the result that is a view of it."""
    if grad is None or layout is None:
        return grad
    size, stride, offset = layout
    grad = grad.contiguous()  # it may itself be a part of something
    return grad.as_strided(size, stride, grad.storage_offset() + offset)


def _sweep(
    stack: StackCall, log: CallLog, batch_first: bool, grads: Sequence[Tensor | None]
) -> None:
    def restored(rows: Tensor) -> Tensor:
        order = stack.call.batch_sizes, stack.call.unsorted_indices
        return by_step_and_sample(rows, *order, shape=stack.call.input.shape[:2])

    if batch_first and grads[0] is not None:
        grads = [grads[0].transpose(0, 1), *grads[1:]]
    options = {"vectors": log.vectors, "cell_total": log.cell_through_hidden}
    for index, adjoints in enumerate(stack.adjoints(grads, log.module, **options)):
        cell_records = {}
        cell = adjoints.cell if adjoints.cell_total is None else adjoints.cell_total
        if cell is not None:
            cell_records["cell_adjoint_norm"] = restored(row_norms(cell))
            if log.vectors:
                cell_records["cell_adjoint"] = restored(cell)
        hidden = adjoints.hidden if log.vectors else None
        hidden = None if hidden is None else restored(hidden)
        log.add(index, restored(adjoints.hidden_norm), hidden, **cell_records)
