"""A Python loop over ``nn.RNNCell``, eager and compiled: what one writes to get at every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.peers.base import Peer, Prepared, plain_float32_only
from benchmarks.problems import Problem, torch_work

COMPILED_UP_TO = 256
"""Time steps. The loop is unrolled by torch.compile, whose own time grows with it: minutes at some
hundred steps."""


def _cell_of(problem: Problem) -> nn.RNNCell:
    case = problem.case
    cell = nn.RNNCell(case.I, case.H, nonlinearity=case.nonlinearity, dtype=problem.dtype)
    cell.load_state_dict({k.removesuffix("_l0"): w for k, w in problem.weights.items()})
    return cell


def _loop(cell: nn.RNNCell) -> Callable[[Tensor], Tensor]:
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

    def refuses(self, case: Case) -> str | None:
        """Refuse what would need more than one plain loop."""
        return plain_float32_only(case)

    def prepare(self, problem: Problem) -> Prepared:
        """Copy the weights into a cell."""
        cell = _cell_of(problem)
        return Prepared(torch_work(problem, _loop(cell), list(cell.parameters())))


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
