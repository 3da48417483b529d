"""Python loops over a cell, eager and compiled: what one writes to get at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rnn_cuda
from benchmarks.cases import Case
from benchmarks.contestants.base import PlainContestant
from benchmarks.problem import Problem, torch_work
from benchmarks.timing import Work

COMPILED_UP_TO = 256
"""Time steps. The loop is unrolled by torch.compile, whose own time grows with it: minutes at some
hundred steps."""


class RNNCellLoop(PlainContestant):
    """One cell call per time step."""

    name = "rnn_cell_loop"
    title = "nn.RNNCell loop"

    kind: Any = nn.RNNCell

    def prepare(self, problem: Problem) -> Work:
        case = problem.case
        cell = self.kind(case.I, case.H, nonlinearity=case.nonlinearity)
        cell.load_state_dict({k.removesuffix("_l0"): w for k, w in problem.weights.items()})
        return Work(torch_work(problem, self.loop(cell), list(cell.parameters())))

    def loop(self, cell: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return a function from (T, B, I) to (T, B, H)."""

        def call(x: Tensor) -> Tensor:
            h = x.new_zeros(x.shape[1], cell.hidden_size)
            states = []
            for x_t in x.unbind():
                h = cell(x_t, h)
                states.append(h)
            return torch.stack(states)

        return call


class FusedRNNCellLoop(RNNCellLoop):
    """The same loop over this package's cell."""

    name = "fused_rnn_cell_loop"
    title = "FusedRNNCell loop"

    # Older versions of the package, which `benchmarks.versions` runs too, have no cell.
    kind = getattr(rnn_cuda, "FusedRNNCell", None)


class CompiledLoop(RNNCellLoop):
    """The same loop through torch.compile; compiling is done before timing starts."""

    name = "compiled_loop"
    title = "torch.compile of the loop"

    def refuses(self, case: Case) -> str | None:
        if case.T > COMPILED_UP_TO:
            return f"not tried above T = {COMPILED_UP_TO}: compiling unrolls the loop"
        return super().refuses(case)

    def loop(self, cell: nn.Module) -> Callable[[Tensor], Tensor]:
        torch._dynamo.reset()
        return torch.compile(super().loop(cell), fullgraph=True, dynamic=False)


CONTESTANTS = (RNNCellLoop, FusedRNNCellLoop, CompiledLoop)
