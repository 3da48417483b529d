"""Records of adjoints, and the two ways to come by them: a fused backward's sinks, and hooks."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rnn_cuda._adjoint import check_recordable, row_norms
from rnn_cuda._autograd import ElmanRNN
from rnn_cuda._autograd_pair import ElmanRNNPair
from rnn_cuda.instruments._stack import Layout, Recurrent, StackCall, layer_names
from rnn_cuda.modules import FusedRNN


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
    names: list[str]  # of layers and directions
    vectors: bool
    cell_through_hidden: bool

    def add(self, index: int, norm: Tensor, vectors: Tensor | None, **of_cell: Tensor) -> None:
        """Add what a backward pass brought for a layer and direction."""
        module, call = self.key
        records = self.log.setdefault((module, index, call), [])
        key = (self.names[index], call, len(records))
        records.append(AdjointRecord(*key, adjoint_norm=norm, adjoint=vectors, **of_cell))


# ---- FusedRNN on native kernels ------------------------------------------------------------------


class Sink:
    """Takes what the fused backward of one layer and direction emits."""

    def __init__(self, log: CallLog, index: int, layout: Layout) -> None:
        self.vectors = log.vectors
        self._log, self._index, self._layout = log, index, layout

    def __call__(self, norm: Tensor, adjoint: Tensor | None) -> None:
        if self._layout.batch_sizes is not None:
            norm = self._layout.by_step_and_sample(norm)
            adjoint = None if adjoint is None else self._layout.by_step_and_sample(adjoint)
        self._log.add(self._index, norm, adjoint)


def native_nodes(module: Recurrent, h_n: Tensor) -> list[tuple[Any, int]] | None:
    """The autograd node of each of a FusedRNN's layers and directions, and which of its directions.

    None if not all of them have one: on the reference backend, or where a layer has nothing to
    differentiate.
    """
    if not isinstance(module, FusedRNN):
        return None
    node: Any = h_n.grad_fn  # of the stack of all final states, perhaps after a change of order
    while node is not None and node.name() != "StackBackward0":
        node = node.next_functions[0][0] if node.next_functions else None
    # A node's results are the output and h_n of its directions in turn.
    nodes = [] if node is None else [(child, place // 2) for child, place in node.next_functions]
    of_layer: Any = ElmanRNNPair if module.bidirectional else ElmanRNN
    is_native = [isinstance(child, of_layer._backward_cls) for child, _ in nodes]
    return nodes if len(nodes) == len(layer_names(module)) and all(is_native) else None


# ---- everything else -----------------------------------------------------------------------------


class Watch:
    """Catches the gradients of one call's results in each backward pass, and sweeps at its end."""

    def __init__(self, log: CallLog, call: StackCall) -> None:
        self._log, self._call = log, call
        self._caught: dict[int, list[Tensor | None]] = {}  # by backward pass: output, h_n, c_n
        self._has_graph = False  # of its own gradients

    def attach(self, results: list[Tensor]) -> None:
        """Hook the results. The hooks keep this object, which must not keep the graph."""
        for position, tensor in enumerate(results):
            if tensor.requires_grad:
                source, back = _source(tensor)
                source.register_hook(self._catcher(position, back))

    def _catcher(
        self, position: int, back: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor | None], None]:
        def hook(grad: Tensor | None) -> None:
            check_recordable([grad])
            task = torch._C._current_graph_task_id()
            if task not in self._caught:
                self._caught[task] = [None] * 3
                engine: Any = torch.autograd.Variable._execution_engine
                engine.queue_callback(lambda: self._finish(task, torch.is_grad_enabled()))
            self._caught[task][position] = None if grad is None else back(grad)

        return hook

    @torch.no_grad()
    def _sweep(self, grads: list[Tensor | None]) -> None:
        restore, log = self._call.layout.by_step_and_sample, self._log
        options = {"vectors": log.vectors, "cell_total": log.cell_through_hidden}
        for index, found in enumerate(self._call.adjoints(*grads, **options)):
            of_cell = {}
            cell = found.cell if found.cell_total is None else found.cell_total
            if cell is not None:
                of_cell["cell_adjoint_norm"] = restore(row_norms(cell))
                if log.vectors:
                    of_cell["cell_adjoint"] = restore(cell)
            hidden = restore(found.hidden) if log.vectors and found.hidden is not None else None
            log.add(index, restore(found.hidden_norm), hidden, **of_cell)

    def _finish(self, task: int, has_graph: bool) -> None:
        grads = self._caught.pop(task)
        if self._has_graph:
            warnings.warn(
                "GradientFlow does not record this backward pass: it goes through gradients of a "
                "torch.nn module that were computed with create_graph=True, and then its hidden "
                "states have gradients that no hook sees; FusedRNN records such passes too",
                stacklevel=2,
            )
            return
        self._has_graph = has_graph
        self._sweep(grads)


def _source(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What ``tensor`` is a view of, and how to get its gradient from that one's.

    A view that is modified in place gets another place in the graph; what it is a view of does not.
    """
    base = tensor._base
    if base is None or base.numel() != tensor.numel() or not base.is_contiguous():
        return tensor, lambda grad: grad
    size, stride = tensor.size(), tensor.stride()
    offset = tensor.storage_offset() - base.storage_offset()

    def back(grad: Tensor) -> Tensor:
        grad = grad.contiguous()  # as the base is; it may itself be a part of something
        return grad.as_strided(size, stride, grad.storage_offset() + offset)

    return base, back


def refuse(tensor: Tensor, name: str) -> None:
    """Let a backward pass through what a checkpoint computed again fail.

    Unless the checkpoint is reentrant, none comes: the first computation's graph is used.
    """

    def hook(_: Tensor | None) -> None:
        raise RuntimeError(
            f"GradientFlow cannot record {name} inside a reentrant checkpoint; "
            "pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
        )

    if tensor.requires_grad:
        tensor.register_hook(hook)
