"""torch.nn's own recurrent layers: oneDNN or plain operators on a CPU, cuDNN on a GPU."""

from __future__ import annotations

from torch import nn

from benchmarks.cases import Case
from benchmarks.contestants.base import Contestant
from benchmarks.problem import TORCH_LAYERS, Problem, layer_of, module_work
from benchmarks.timing import Work


class TorchLayer(Contestant):
    """The baseline. In a case of another cell, it has weights of its own."""

    def __init__(self, name: str, cell: str) -> None:
        self.name, self.cell = name, cell
        self.kind: type[nn.Module] = TORCH_LAYERS[cell]
        self.title = f"torch.nn.{self.kind.__name__}"

    def refuses(self, case: Case) -> str | None:
        fits = case.nonlinearity == "tanh" or self.kind is nn.RNN
        return None if fits else "its nonlinearities are fixed"

    def prepare(self, problem: Problem) -> Work:
        return Work(module_work(problem, layer_of(problem, self.kind, self.computes(problem.case))))


CONTESTANTS = (
    TorchLayer("torch_rnn", "elman"),
    TorchLayer("torch_lstm", "lstm"),
    TorchLayer("torch_gru", "gru"),
)
