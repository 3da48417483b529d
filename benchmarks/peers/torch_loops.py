"""Python loops over a cell, eager and compiled: what one writes to get at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.peers.base import Peer, Prepared, plain_float32_only
from benchmarks.problems import Problem, torch_work
from rnn_cuda import FusedRNNCell

COMPILED_UP_TO = 256
"""Time steps. The loop is unrolled by torch.compile, whose own time grows with it: minutes at some
hundred steps."""


Cell = nn.RNNCell | FusedRNNCell


def _cell_of(problem: Problem, kind: type[Cell] = nn.RNNCell) -> Cell:
    case = problem.case
    cell = kind(case.I, case.H, nonlinearity=case.nonlinearity, dtype=problem.dtype)
    cell.load_state_dict({k.removesuffix("_l0"): w for k, w in problem.weights.items()})
    return cell


def _loop(cell: Cell) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], cell.hidden_size)
        states = []
        for x_t in x.unbind():
            h = cell(x_t, h)
            states.append(h)
        return torch.stack(states)

    return call


class RNNCellLoop(Peer):
    """One cell call per time step."""

    name = "rnn_cell_loop"
    title = "nn.RNNCell loop"
    kind: ClassVar[type[Cell]] = nn.RNNCell

    def refuses(self, case: Case) -> str | None:
        """Refuse what would need more than one plain loop."""
        return plain_float32_only(case)

    def prepare(self, problem: Problem) -> Prepared:
        """Copy the weights into a cell."""
        cell = _cell_of(problem, self.kind)
        return Prepared(torch_work(problem, _loop(cell), list(cell.parameters())))


class FusedRNNCellLoop(RNNCellLoop):
    """The same loop over this package's cell."""

    name = "fused_rnn_cell_loop"
    title = "FusedRNNCell loop"
    kind = FusedRNNCell


class CompiledLoop(RNNCellLoop):
    """The same loop through torch.compile; compiling is done before timing starts."""

    name = "compiled_loop"
    title = "torch.compile of the loop"

    def refuses(self, case: Case) -> str | None:
        """Refuse long sequences as well."""
        if case.T > COMPILED_UP_TO:
            return f"not tried above T = {COMPILED_UP_TO}: compiling unrolls the loop"
        return super().refuses(case)

    def prepare(self, problem: Problem) -> Prepared:
        """Copy the weights; the first run compiles."""
        torch._dynamo.reset()
        cell = _cell_of(problem)
        loop = torch.compile(_loop(cell), fullgraph=True, dynamic=False)
        return Prepared(torch_work(problem, loop, list(cell.parameters())))
