"""Recurrent cells in plain PyTorch, one a file, and who has which.

``elman.tanh``, ``leaky.tanh`` (and the other nonlinearities), ``lstm``, ``gru`` and, with other
functions, ``lstm.relu.sigmoid`` and the like are found by name, a leaky cell without its constants.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn

from rnn_cuda.cells.cell import Cell, Linearisation, State, Weights
from rnn_cuda.cells.elman import GATED_NONLINEARITIES, NONLINEARITIES, Elman, gated_name
from rnn_cuda.cells.gru import GRU
from rnn_cuda.cells.leaky import Leaky
from rnn_cuda.cells.lstm import LSTM

__all__ = [
    "GRU",
    "LSTM",
    "Cell",
    "Elman",
    "Leaky",
    "Linearisation",
    "State",
    "Weights",
    "cell_named",
    "cell_of",
    "recurrent_matrix",
]

_CELLS: dict[str, Cell] = {
    **{f"elman.{nonlinearity}": Elman(nonlinearity) for nonlinearity in NONLINEARITIES},
    **{f"leaky.{nonlinearity}": Leaky(nonlinearity) for nonlinearity in NONLINEARITIES},
    "lstm": LSTM(),
    "gru": GRU(),
    **{
        gated_name(kind, *functions): cell(*functions)
        for kind, cell in (("lstm", LSTM), ("gru", GRU))
        for functions in itertools.product(GATED_NONLINEARITIES, repeat=2)
    },
}


def cell_named(name: str) -> Cell:
    """Return the cell of that name.

    Raises:
        ValueError: there is none.

    """
    if name not in _CELLS:
        names = ", ".join(name for name in _CELLS if name.count(".") < 2)
        raise ValueError(f"cell: expected one of {names}; got {name!r}")
    return _CELLS[name]


def cell_of(module: object) -> Cell | None:
    """Return the cell of a recurrent layer or of a module that takes single steps, else None."""
    own: Any = getattr(module, "_cell", None)  # of this package's modules
    if own is not None:
        return own()
    if isinstance(module, nn.RNN | nn.RNNCell):
        return cell_named(f"elman.{module.nonlinearity}")
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return cell_named("lstm")
    if isinstance(module, nn.GRU | nn.GRUCell):
        return cell_named("gru")
    return None


def recurrent_matrix(module: object, weight_hh: Tensor) -> Tensor:
    """Return what ``module`` multiplies h_{t-1} with, made of its ``weight_hh``."""
    own: Any = getattr(module, "_recurrent_matrix", None)
    return weight_hh if own is None else own(weight_hh)
