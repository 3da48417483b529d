"""The layers of `rnn_cuda`, and the two layers of calls beneath FusedRNN."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

import rnn_cuda
from benchmarks.cases import Case
from benchmarks.contestants.base import Contestant, PlainContestant
from benchmarks.problem import Problem, layer_of, module_work, torch_work
from benchmarks.timing import Work


class Module(Contestant):
    """A layer such as `rnn_cuda.FusedRNN`, on the backend that the environment chooses."""

    def __init__(self, name: str, cell: str, kind: str) -> None:
        self.name, self.cell, self.title = name, cell, kind
        # `benchmarks.versions` runs older packages too, which may not have it.
        self.kind: type[nn.Module] | None = getattr(rnn_cuda, kind, None)

    def missing(self, device: str) -> str | None:
        return None if self.kind else f"there is no rnn_cuda.{self.title}"

    def prepare(self, problem: Problem) -> Work:
        assert self.kind is not None
        return Work(module_work(problem, layer_of(problem, self.kind, self.computes(problem.case))))


class DenseModule(Module):
    """FusedRNN on a sequence whose samples all have the full length, beside a packed one."""

    def computes(self, case: Case) -> bool:
        return False

    def prepare(self, problem: Problem) -> Work:
        """Ignore that the problem is packed."""
        return super().prepare(Problem(replace(problem.case, packed=False), problem.device))


class Function(PlainContestant):
    """`rnn_cuda.functional.elman_rnn`, without the module around it."""

    name = "elman_rnn"
    title = "functional.elman_rnn"

    def prepare(self, problem: Problem) -> Work:
        weights = [nn.Parameter(weight.clone()) for weight in problem.weights.values()]
        f = problem.case.nonlinearity
        return Work(torch_work(problem, lambda x: self.call(x, weights, f), weights))

    def call(self, x: Tensor, weights: list[nn.Parameter], f: str) -> Tensor:
        from rnn_cuda.functional import elman_rnn

        return elman_rnn(x, None, *weights, nonlinearity=f)[0]


class Operator(Function):
    """``torch.ops.rnn_cuda.layer_forward`` itself, without any check in Python."""

    def __init__(self, name: str, cell: str) -> None:
        self.name, self.cell, self.title = name, cell, "operator"

    def missing(self, device: str) -> str | None:
        from rnn_cuda import backend

        try:
            native = backend.use_native(device, torch.float32)
        except backend.NativeBackendError as error:
            return str(error)
        return super().missing(device) if native else "the native kernels are not in use"

    def call(self, x: Tensor, weights: list[nn.Parameter], f: str) -> Tensor:
        if self.cell == "elman":
            operator, cell = torch.ops.rnn_cuda.layer_forward, f"elman.{f}"
        else:  # whose eager node is reached by this one alone
            operator, cell = torch.ops.rnn_cuda.layer, self.cell
        return operator(x, [], weights, cell, "forward", None)[0]


CONTESTANTS = (
    Module("fused_rnn", "elman", "FusedRNN"),
    DenseModule("fused_rnn_dense", "elman", "FusedRNN"),
    Module("fused_gru", "gru", "FusedGRU"),
    Module("fused_lstm", "lstm", "FusedLSTM"),
    Module("leaky_rnn", "leaky", "LeakyRNN"),
    Function(),
    Operator("operator", "elman"),
    Operator("gru_operator", "gru"),
    Operator("lstm_operator", "lstm"),
)
