"""Rebuild a recurrent module as another class: torch's as this package's, or the reverse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from rnn_cuda.arguments import check_dense

if TYPE_CHECKING:
    from rnn_cuda.stack import RecurrentStack

_Target = TypeVar("_Target", bound=nn.Module)

TORCH_NONLINEARITIES = ("tanh", "relu")
"""The nonlinearities that ``torch.nn.RNN`` has too."""


def rebuild(
    source: RecurrentStack | nn.RNNBase,
    target: Callable[..., _Target],
    take: Callable[[nn.Parameter], nn.Parameter],
) -> _Target:
    """Return a ``target`` configured as ``source``, with ``take(parameter)`` for each parameter.

    Raises:
        TypeError: a parameter is sparse or quantized, which cannot be copied, and which this
            package does not take.
        ValueError: ``source`` is an LSTM with projections; or it computes a weight from other
            parameters (a parametrization, pruning, weight norm), which the target would lose.

    """
    # Parameters on the meta device cost nothing to make and draw no random numbers.
    options: Any = {"num_layers": source.num_layers, "bias": source.bias}
    options |= {"batch_first": source.batch_first, "bidirectional": source.bidirectional}
    if source.mode.startswith("RNN"):
        options["nonlinearity"] = source.nonlinearity
    if source.proj_size:
        options["proj_size"] = source.proj_size
    built: Any = target(source.input_size, source.hidden_size, **options, device="meta")
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
