"""Adjoints of whatever a program does with its recurrent layers: the judge of `GradientFlow`.

Inside ``UnrolledCalls(model)`` the recurrences of torch and of this package are replaced by loops
over time steps, in which every h_t and c_t is a node of autograd's graph. All else that the program
does (hooks, subclasses, wrappers, parametrizations) stays as it is.
"""

from __future__ import annotations

import contextlib
import sys
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from rnn_cuda.stack import RecurrentStack
from tests.unrolled import step_of

RECURRENT = (nn.RNN, nn.LSTM, nn.GRU, RecurrentStack)
FORWARDS = {kind.forward.__code__ for kind in RECURRENT}

# By step of a layer and direction and kind of state ("h", "c", "c_total"): the gradient.
Gradients = dict[tuple[int, int, str], Tensor]


class Record(NamedTuple):
    """What one backward pass brought to one layer and direction in one call: ``(T, B, features)``.

    NaN behind a sample's end. ``cell`` is dL/dc_t with h_t held fixed, ``cell_total`` without that.
    """

    layer: str
    call: int
    backward: int
    hidden: Tensor
    cell: Tensor | None
    cell_total: Tensor | None


class Call:
    """One call of a module's forward."""

    def __init__(self, module: nn.Module, input: object, names: dict[nn.Module, str]) -> None:
        self.module, self.name = module, names.get(module)
        order = input.unsorted_indices if isinstance(input, PackedSequence) else None
        self._order, self._sizes, self._features = order, [], {}
        self.has_graph = False
        self.passes: dict[int, Gradients] = {}  # by backward pass

    def _watch(self, index: int, step: int, kind: str, node: Tensor) -> None:
        def hook(grad: Tensor) -> None:
            task = torch._C._current_graph_task_id()
            self.passes.setdefault(task, {})[index, step, kind] = grad.detach().clone()

        self._features[index, kind] = node.shape[-1]
        if node.requires_grad:
            node.register_hook(hook)

    def run(self, x, batch_sizes, h0, c0, weights, rate, training):
        """Unroll all layers and directions over ``x``, ``(T, B, I)`` or packed rows ``(N, I)``.

        Returns the output, h_n and c_n.
        """
        module, directions = self.module, 2 if self.module.bidirectional else 1
        leaves = [x, *(s for s in (h0, c0) if s is not None), *(w for ws in weights for w in ws)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in leaves):
            self.has_graph = True
            x = x + torch.zeros((), dtype=x.dtype, requires_grad=True)  # all states are nodes
        dense = x.shape if batch_sizes is None else None
        self._sizes = [x.shape[1]] * len(x) if batch_sizes is None else batch_sizes.tolist()
        x = x if dense is None else x.flatten(0, 1)
        finals, cells = [], []
        for layer in range(module.num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                start = h0[index], None if c0 is None else c0[index]
                rows, h, c = self._direction(index, x, start, weights[index], direction == 1)
                outputs.append(rows)
                finals.append(h)
                cells.append(c)
            x = torch.cat(outputs, dim=-1)
            if rate and layer + 1 < module.num_layers:
                x = dropout(x, rate, training)
        if dense is not None:
            x = x.view(*dense[:2], x.shape[-1])
        return x, torch.stack(finals), None if c0 is None else torch.stack(cells)

    def _direction(self, index, x, start, weights, reverse):
        sizes, steps, inputs = self._sizes, range(len(self._sizes)), x.split(self._sizes)
        outputs, ended = [None] * len(sizes), []
        state = [s if s is None else s[: sizes[-1 if reverse else 0]] for s in start]
        for t in reversed(steps) if reverse else steps:
            have, need = len(state[0]), sizes[t]
            if need > have:  # backwards in time samples begin where they are longest
                state = [
                    s if s is None else torch.cat([s, s0[have:need]])
                    for s, s0 in zip(state, start, strict=True)
                ]
            elif need < have:
                ended.insert(0, [s if s is None else s[need:] for s in state])
                state = [s if s is None else s[:need] for s in state]
            h, c_total = step_of(self.module, weights, inputs[t], *state)
            c = None
            if c_total is not None:
                c = c_total.clone()  # what the next step uses: h_t does not hang on it
                self._watch(index, t, "c_total", c_total)
                self._watch(index, t, "c", c)
            self._watch(index, t, "h", h)
            outputs[t], state = h, [h, c]
        h, c = (
            None if s is None else torch.cat([s, *(e[k] for e in ended)])
            for k, s in enumerate(state)
        )
        return torch.cat(outputs), h, c

    def records(self, call: int) -> list[Record]:
        found, directions = [], 2 if self.module.bidirectional else 1
        for index in range(self.module.num_layers * directions):
            suffix = "_reverse" if index % directions else ""
            layer = f"{self.name}.l{index // directions}{suffix}".removeprefix(".")
            for number, gradients in enumerate(self.passes.values()):
                tables = [self._table(index, kind, gradients) for kind in ("h", "c", "c_total")]
                found.append(Record(layer, call, number, *tables))
        return found

    def _table(self, index: int, kind: str, gradients: Gradients) -> Tensor | None:
        if (index, kind) not in self._features:
            return None
        dtype = next(iter(gradients.values())).dtype
        shape = len(self._sizes), self._sizes[0], self._features[index, kind]
        table = torch.full(shape, torch.nan, dtype=dtype)
        for t, size in enumerate(self._sizes):
            table[t, :size] = gradients.get((index, t, kind), 0)
        return table if self._order is None else table.index_select(1, self._order)


class UnrolledCalls:
    """Unroll every recurrent layer, and keep the adjoints of those of ``model``."""

    def __init__(self, model: nn.Module) -> None:
        modules = [(m, name) for name, m in model.named_modules() if isinstance(m, RECURRENT)]
        self._calls: dict[nn.Module, list[Call]] = {module: [] for module, _ in modules}
        self._names = dict(modules)

    def __enter__(self) -> UnrolledCalls:
        self._stack = contextlib.ExitStack()
        for name in ("rnn_tanh", "rnn_relu", "lstm", "gru"):
            self._replace(torch._VF, name, self._of_torch)
        self._replace(RecurrentStack, "_compute", lambda _, *args: self._of_stack(*args))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _replace(self, *args: object) -> None:
        self._stack.enter_context(mock.patch.object(*args, create=True))

    @property
    def records(self) -> list[Record]:
        """In the order of `GradientFlow.records`: by layer, call and backward pass."""
        found = []
        for calls in self._calls.values():
            records = [record for k, call in enumerate(calls) for record in call.records(k)]
            for layer in dict.fromkeys(record.layer for record in records):
                found += [record for record in records if record.layer == layer]
        return found

    def _run(self, *args):
        call = Call(*_running_forward(), self._names)
        results = call.run(*args)
        # What a checkpoint computes again is no new call.
        if call.has_graph and torch._C._current_graph_task_id() == -1:
            self._calls.get(call.module, []).append(call)
        return results

    def _of_torch(self, x, *args):
        packed = isinstance(args[0], Tensor) and args[0].dtype == torch.int64
        batch_sizes, args = (args[0], args[1:]) if packed else (None, args)
        hx, flat, _, _, rate, training, _ = args[:7]
        h0, c0 = hx if isinstance(hx, list | tuple) else (hx, None)
        per_layer = len(flat) // len(h0)
        weights = [flat[k : k + per_layer] for k in range(0, len(flat), per_layer)]
        batch_first = not packed and args[7]
        x = x.transpose(0, 1) if batch_first else x
        output, *states = self._run(x, batch_sizes, h0, c0, weights, rate, training)
        # A view or not as torch's is: what a change in place does to hooks hangs on it.
        output = output.clone()
        if batch_first:
            output = output.transpose_(0, 1) if c0 is None else output.transpose(0, 1)
        return output, *states[: 1 if c0 is None else 2]

    def _of_stack(self, x, states, weights, batch_sizes, _):
        module, _ = _running_forward()
        if not states:
            batch = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
            zeros = x.new_zeros(len(weights), batch, module.hidden_size)
            states = (zeros,) * module._cell().states
        h0, c0 = (*states, None)[:2]
        results = self._run(x, batch_sizes, h0, c0, weights, module.dropout, module.training)
        return results[: 1 + len(states)]


def _running_forward():
    """The module whose own forward is running, and its input.

    Read from the stack: its forward may be called in any way.
    """
    frame = sys._getframe()
    while frame.f_code not in FORWARDS:
        frame = frame.f_back
    names = frame.f_locals
    return names["self"], names.get("orig_input", names["input"])
