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


class CellLoop(PlainContestant):
    """One call of a cell per time step."""

    def __init__(self, name: str, cell: str, kind: Any, title: str) -> None:
        # `benchmarks.versions` runs older packages too, which may not have the cell.
        self.name, self.cell, self.kind, self.title = name, cell, kind, title

    def missing(self, device: str) -> str | None:
        return super().missing(device) if self.kind else "there is no such cell"

    def prepare(self, problem: Problem) -> Work:
        case = problem.case
        options = {"nonlinearity": case.nonlinearity} if case.cell == "elman" else {}
        cell = self.kind(case.I, case.H, **options)
        cell.load_state_dict({k.removesuffix("_l0"): w for k, w in problem.weights.items()})
        return Work(torch_work(problem, self.loop(cell), list(cell.parameters())))

    def loop(self, cell: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return a function from (T, B, I) to (T, B, H)."""

        def call(x: Tensor) -> Tensor:
            state, outputs = None, []
            for x_t in x.unbind():
                state = cell(x_t, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            return torch.stack(outputs)

        return call


class CompiledLoop(CellLoop):
    """The same loop through torch.compile; compiling is done before timing starts."""

    def refuses(self, case: Case) -> str | None:
        if case.T > COMPILED_UP_TO:
            return f"not tried above T = {COMPILED_UP_TO}: compiling unrolls the loop"
        return super().refuses(case)

    def loop(self, cell: nn.Module) -> Callable[[Tensor], Tensor]:
        torch._dynamo.reset()
        return torch.compile(super().loop(cell), fullgraph=True, dynamic=False)


def _loops(cell: str, name: str) -> list[CellLoop]:
    """Return the loops over torch's cell and over ours."""
    short, torchs = name.lower(), getattr(nn, f"{name}Cell")
    ours = getattr(rnn_cuda, f"Fused{name}Cell", None)
    return [
        CellLoop(f"{short}_cell_loop", cell, torchs, f"nn.{name}Cell loop"),
        CellLoop(f"fused_{short}_cell_loop", cell, ours, f"Fused{name}Cell loop"),
    ]


CONTESTANTS = (
    *_loops("elman", "RNN"),
    *_loops("gru", "GRU"),
    *_loops("lstm", "LSTM"),
    CompiledLoop("compiled_loop", "elman", nn.RNNCell, "torch.compile of the loop"),
)
