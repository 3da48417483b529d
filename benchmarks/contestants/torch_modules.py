"""torch.nn's own recurrent layers: oneDNN or plain operators on a CPU, cuDNN on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.contestants.base import Contestant
from benchmarks.problem import Problem, layer_options, module_of, module_work
from benchmarks.timing import Work


class TorchRNN(Contestant):
    """The baseline."""

    name = "torch_rnn"
    title = "torch.nn.RNN"

    def refuses(self, case: Case) -> str | None:
        if case.nonlinearity not in ("tanh", "relu"):
            return f"torch.nn.RNN has no {case.nonlinearity}"
        return None

    def prepare(self, problem: Problem) -> Work:
        return Work(module_work(problem, module_of(problem, nn.RNN)))


class TorchLSTM(Contestant):
    """Another model of the same sizes, with weights of its own: four times the recurrent ones."""

    name = "torch_lstm"
    title = "torch.nn.LSTM"
    same_numbers = False
    kind: Any = nn.LSTM

    def refuses(self, case: Case) -> str | None:
        return None if case.nonlinearity == "tanh" else "its nonlinearities are fixed"

    def prepare(self, problem: Problem) -> Work:
        torch.manual_seed(0)
        module = self.kind(problem.case.I, problem.case.H, **layer_options(problem))
        return Work(module_work(problem, module.train(problem.case.mode != "forward")))


class TorchGRU(TorchLSTM):
    """Three times the recurrent weights."""

    name = "torch_gru"
    title = "torch.nn.GRU"
    kind = nn.GRU


CONTESTANTS = (TorchRNN, TorchLSTM, TorchGRU)
