"""FusedRNN: the module, and the two layers of calls beneath it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.peers.base import Peer, Prepared, plain_float32_only
from benchmarks.problems import Problem, module_of, module_work, torch_work
from rnn_cuda import FusedRNN, backend
from rnn_cuda.functional import elman_rnn


class FusedRNNPeer(Peer):
    """`rnn_cuda.FusedRNN` on the backend that the environment chooses."""

    name = "fused_rnn"
    title = "FusedRNN"

    def prepare(self, problem: Problem) -> Prepared:
        """Copy the weights into a FusedRNN."""
        return Prepared(module_work(problem, module_of(problem, FusedRNN)))


class FusedRNNDense(FusedRNNPeer):
    """FusedRNN on a sequence whose samples all have the full length, beside a packed one."""

    name = "fused_rnn_dense"
    title = "FusedRNN, dense"
    same_numbers = False

    def prepare(self, problem: Problem) -> Prepared:
        """Make a problem of the same sizes that is not packed."""
        return super().prepare(Problem(replace(problem.case, packed=False)))


class FusedRNNTanh(FusedRNNPeer):
    """FusedRNN with tanh: the unit for nonlinearities that torch.nn.RNN does not have."""

    name = "fused_rnn_tanh"
    title = "FusedRNN, tanh"
    same_numbers = False

    def prepare(self, problem: Problem) -> Prepared:
        """Copy the weights into a FusedRNN with tanh."""
        return Prepared(module_work(problem, module_of(problem, FusedRNN, nonlinearity="tanh")))


def _leaves(problem: Problem) -> list[Tensor]:
    return [nn.Parameter(weight.clone()) for weight in problem.weights.values()]


class ElmanRNNFunction(Peer):
    """`rnn_cuda.functional.elman_rnn`, without the module around it."""

    name = "elman_rnn"
    title = "functional.elman_rnn"

    def refuses(self, case: Case) -> str | None:
        """Refuse what takes more than one call."""
        return plain_float32_only(case)

    def prepare(self, problem: Problem) -> Prepared:
        """Copy the weights."""
        weights, f = _leaves(problem), problem.case.nonlinearity

        def call(x: Tensor) -> Tensor:
            return elman_rnn(x, None, *weights, nonlinearity=f)[0]

        return Prepared(torch_work(problem, call, weights))


class ElmanOperator(ElmanRNNFunction):
    """``torch.ops.rnn_cuda.layer_forward`` itself, without any check in Python."""

    name = "operator"
    title = "operator"

    def missing(self) -> str | None:
        """Return why there are no kernels, if so."""
        try:
            native = backend.use_native("cpu", torch.float32)
        except backend.NativeBackendError as error:
            return str(error)
        return None if native else "the native kernels are not in use"

    def prepare(self, problem: Problem) -> Prepared:
        """Copy the weights."""
        weights, f = _leaves(problem), problem.case.nonlinearity

        def call(x: Tensor) -> Tensor:
            cell = f"elman.{f}"
            return torch.ops.rnn_cuda.layer_forward(x, [], weights, cell, "forward", None)[0]

        return Prepared(torch_work(problem, call, weights))
