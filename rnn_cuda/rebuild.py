"""Rebuild a recurrent module as another class: ``nn.RNN`` as `FusedRNN`, or the reverse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from rnn_cuda.arguments import check_dense

if TYPE_CHECKING:
    from rnn_cuda.modules import FusedRNN

_Target = TypeVar("_Target", "FusedRNN", nn.RNN)

TORCH_NONLINEARITIES = ("tanh", "relu")
"""The nonlinearities that ``torch.nn.RNN`` has too."""


def rebuild(
    source: FusedRNN | nn.RNN,
    target: Callable[..., _Target],
    take: Callable[[nn.Parameter], nn.Parameter],
) -> _Target:
    """Return a ``target`` configured as ``source``, with ``take(parameter)`` for each parameter.

    Raises:
        TypeError: a parameter is sparse or quantized, which cannot be copied, and which a FusedRNN
            does not take.
        ValueError: ``source`` computes a weight from other parameters (a parametrization, pruning,
            weight norm), which the target would silently lose.

    """
    # Parameters on the meta device cost nothing to make and draw no random numbers.
    built = target(
        source.input_size,
        source.hidden_size,
        num_layers=source.num_layers,
        nonlinearity=source.nonlinearity,
        bias=source.bias,
        batch_first=source.batch_first,
        bidirectional=source.bidirectional,
        device="meta",
    )
    built.dropout = source.dropout  # set here, because the constructor would repeat its warning
    built.training = source.training

    names = [name for name, _ in built.named_parameters()]
    parameters = dict(source.named_parameters(remove_duplicate=False))
    computed = [name for name in names if name not in parameters]
    if computed:
        raise ValueError(
            "rnn must have plain parameters, but these are parametrized, pruned or "
            f"weight-normalised: {', '.join(computed)}; convert first, then register that again"
        )
    for name in names:
        check_dense(f"rnn.{name}", parameters[name])
    for name in names:
        setattr(built, name, take(parameters[name]))
    built.flatten_parameters()
    return built


def parameter_copier() -> Callable[[nn.Parameter], nn.Parameter]:
    """Return a function that copies each parameter once, so that shared ones stay shared."""
    copies: dict[int, object] = {}
    return lambda parameter: copy.deepcopy(parameter, copies)
