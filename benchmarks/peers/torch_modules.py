"""torch.nn's own recurrent layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.peers.base import Peer, Prepared
from benchmarks.problems import Problem, module_of, module_work


class TorchRNN(Peer):
    """The baseline."""

    name = "torch_rnn"
    title = "torch.nn.RNN"

    def refuses(self, case: Case) -> str | None:
        """Refuse nonlinearities that it does not have."""
        if case.nonlinearity not in ("tanh", "relu"):
            return f"torch.nn.RNN has no {case.nonlinearity}"
        return None

    def prepare(self, problem: Problem) -> Prepared:
        """Copy the weights into an ``nn.RNN``."""
        return Prepared(module_work(problem, module_of(problem, nn.RNN)))


class _TorchGated(Peer):
    """Another model of the same sizes; it has weights of its own."""

    same_numbers = False
    kind: Any

    def refuses(self, case: Case) -> str | None:
        """Refuse other nonlinearities: the cell has its own."""
        return None if case.nonlinearity == "tanh" else "its nonlinearities are fixed"

    def prepare(self, problem: Problem) -> Prepared:
        """Draw weights for the cell."""
        case = problem.case
        torch.manual_seed(0)
        module = self.kind(
            case.I,
            case.H,
            num_layers=case.num_layers,
            bidirectional=case.bidirectional,
            batch_first=case.batch_first,
            dtype=problem.dtype,
        )
        return Prepared(module_work(problem, module))


class TorchLSTM(_TorchGated):
    """Four times the recurrent weights."""

    name = "torch_lstm"
    title = "torch.nn.LSTM"
    kind = nn.LSTM


class TorchGRU(_TorchGated):
    """Three times the recurrent weights."""

    name = "torch_gru"
    title = "torch.nn.GRU"
    kind = nn.GRU
