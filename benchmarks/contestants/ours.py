"""FusedRNN: the module, and the two layers of calls beneath it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.contestants.base import Contestant, PlainContestant
from benchmarks.problem import Problem, module_of, module_work, torch_work
from benchmarks.timing import Work
from rnn_cuda import FusedRNN  # no more here: `benchmarks.versions` runs older packages too


class Module(Contestant):
    """`rnn_cuda.FusedRNN` on the backend that the environment chooses."""

    name = "fused_rnn"
    title = "FusedRNN"

    def prepare(self, problem: Problem) -> Work:
        return Work(module_work(problem, module_of(problem, FusedRNN)))


class DenseModule(Module):
    """FusedRNN on a sequence whose samples all have the full length, beside a packed one."""

    name = "fused_rnn_dense"
    title = "FusedRNN, dense"
    same_numbers = False

    def prepare(self, problem: Problem) -> Work:
        return super().prepare(Problem(replace(problem.case, packed=False), problem.device))


class TanhModule(Module):
    """FusedRNN with tanh: the unit for nonlinearities that torch.nn.RNN does not have."""

    name = "fused_rnn_tanh"
    title = "FusedRNN, tanh"
    same_numbers = False

    def prepare(self, problem: Problem) -> Work:
        return Work(module_work(problem, module_of(problem, FusedRNN, nonlinearity="tanh")))


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

    name = "operator"
    title = "operator"

    def missing(self, device: str) -> str | None:
        from rnn_cuda import backend

        try:
            native = backend.use_native(device, torch.float32)
        except backend.NativeBackendError as error:
            return str(error)
        return super().missing(device) if native else "the native kernels are not in use"

    def call(self, x: Tensor, weights: list[nn.Parameter], f: str) -> Tensor:
        """Return the output."""
        return torch.ops.rnn_cuda.layer_forward(x, [], weights, f"elman.{f}", "forward", None)[0]


CONTESTANTS = (Module, DenseModule, TanhModule, Function, Operator)
