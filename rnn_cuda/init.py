"""Initialisations that a study of vanishing gradients compares, for recurrent layers of any kind.

    rnn_cuda.init.orthogonal_(torch.nn.RNN(10, 64))
    rnn_cuda.init.chrono_(torch.nn.LSTM(10, 64, num_layers=2), max_lag=784)

Each function works in place on every layer and direction, and returns what it was given. It takes
the recurrent layers of this package, ``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` or their cells; those that
concern the recurrent weights alone also take such a weight itself. With a ``torch.Generator`` a
call is reproducible and leaves torch's global generator alone.

Legend: H hidden size; W = ``weight_ih``, U = ``weight_hh``, b = ``bias_ih + bias_hh``. A gated
layer stacks a block of H rows per gate: i, f, g, o in an LSTM; r, z, n in a GRU. The blocks of U
are treated one by one. Of torch's two biases per gate, ``bias_ih`` gets the value and ``bias_hh``
zero: only their sum counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rnn_cuda.arguments import type_name
from rnn_cuda.cells import Cell, cell_of

__all__ = ["chrono_", "forget_bias_", "identity_", "irnn_", "orthogonal_", "scaled_gaussian_"]

_Module = TypeVar("_Module", bound=nn.Module)
_Target = TypeVar("_Target", bound="nn.Module | Tensor")


def orthogonal_(
    target: _Target, gain: float = 1.0, generator: torch.Generator | None = None
) -> _Target:
    """Set each block of U to ``gain`` times a random orthogonal matrix, uniformly distributed.

    It is Q of the QR decomposition of a Gaussian matrix, with its signs fixed. All singular values
    of U are then ``gain``; under tanh the Jacobian ``diag(f') U`` contracts all the same.

    Source: Saxe, McClelland & Ganguli, 2014; for recurrent weights Henaff, Szlam & LeCun, 2016.

    Args:
        target: a recurrent layer or cell, or a weight of shape ``(gates * H, H)``.
        gain: the singular value.
        generator: source of the random numbers.

    Raises:
        TypeError: ``target`` is neither a recurrent layer nor a tensor.
        ValueError: a weight given as ``target`` is not made of square blocks; one of the layer is
            computed from other parameters (parametrized, pruned); ``gain`` is not a finite number.

    """
    _check_finite("gain", gain)
    for block in _recurrent_blocks(target):
        _draw(block, lambda fresh: nn.init.orthogonal_(fresh, gain, generator), generator)
    return target


def scaled_gaussian_(
    target: _Target, gain: float = 1.0, generator: torch.Generator | None = None
) -> _Target:
    """Draw each block of U from ``N(0, gain^2 / H)``.

    Its eigenvalues fill the disc of radius ``gain`` as H grows. A large tanh network without input
    falls silent below ``gain = 1`` and is chaotic above: gradients vanish or explode.

    Source: Sompolinsky, Crisanti & Sommers, 1988.

    Args:
        target: as in :func:`orthogonal_`.
        gain: standard deviation times the square root of H; not negative.
        generator: source of the random numbers.

    Raises:
        TypeError, ValueError: as in :func:`orthogonal_`; ``gain`` is negative.

    """
    _check_not_negative("gain", gain)
    for block in _recurrent_blocks(target):
        std = gain / math.sqrt(block.shape[1])
        _draw(block, lambda fresh, s=std: fresh.normal_(0, s, generator=generator), generator)
    return target


def identity_(target: _Target, scale: float = 1.0) -> _Target:
    """Set U to ``scale`` times the identity and nothing else (for a whole IRNN: :func:`irnn_`).

    Source: Le, Jaitly & Hinton, 2015.

    Args:
        target: an Elman layer or cell, or a square weight. (An LSTM or GRU carries its state on a
            path of its own, past U.)
        scale: the diagonal.

    Raises:
        TypeError: ``target`` is neither an Elman layer nor a tensor.
        ValueError: the weight is not square, or computed from other parameters; ``scale`` is not a
            finite number.

    """
    _check_finite("scale", scale)
    if isinstance(target, nn.Module):
        _cell_of("identity_", target, gated=False)
    elif isinstance(target, Tensor) and (target.ndim != 2 or target.shape[0] != target.shape[1]):
        raise ValueError(f"target: expected a square weight, got shape {tuple(target.shape)}")
    for block in _recurrent_blocks(target):
        nn.init.eye_(block).mul_(scale)
    return target


def irnn_(
    module: _Module,
    scale: float = 1.0,
    input_std: float = 1e-3,
    generator: torch.Generator | None = None,
) -> _Module:
    """Make a ReLU network an IRNN: ``U = scale * I``, ``b = 0``, ``W ~ N(0, input_std^2)``.

    A unit that stays active adds up its input, and its adjoint travels back unchanged. A ``scale``
    below 1 forgets, as the paper has it for speech.

    Source: Le, Jaitly & Hinton, 2015.

    Args:
        module: an Elman layer or cell with ``nonlinearity="relu"``.
        scale: the diagonal of U.
        input_std: standard deviation of W; not negative.
        generator: source of the random numbers.

    Raises:
        TypeError: ``module`` is not an Elman layer or cell.
        ValueError: its nonlinearity is not ReLU (for others see :func:`identity_`), a weight is
            computed from other parameters, or a number is out of range.

    """
    _check_finite("scale", scale)
    _check_not_negative("input_std", input_std)
    _cell_of("irnn_", module, gated=False)
    if module.nonlinearity != "relu":
        raise ValueError(
            f"module: an IRNN has nonlinearity 'relu', got {module.nonlinearity!r}; for that one, "
            "identity_ sets the recurrent weights alone"
        )
    inputs = _parameters(module, "weight_ih")
    biases = _parameters(module, "bias_ih", "bias_hh") if module.bias else []
    identity_(module, scale)
    for weight in inputs:
        _draw(weight, lambda fresh: fresh.normal_(0, input_std, generator=generator), generator)
    for bias in biases:
        bias.zero_()
    return module


def forget_bias_(module: _Module, value: float = 1.0) -> _Module:
    """Set the total bias of the gate that keeps the state: ``b_f`` in an LSTM, ``b_z`` in a GRU.

    The additive path, ``c_t = f_t * c_{t-1} + ...`` or ``h_t = z_t * h_{t-1} + ...`` (torch keeps
    the old state where z is open), then passes about ``sigmoid(value)`` of the gradient per step:
    0.5 at 0, 0.73 at 1, 0.95 at 3.

    Source: Gers, Schmidhuber & Cummins, 2000; Jozefowicz, Zaremba & Sutskever, 2015.

    Args:
        module: an LSTM or GRU, or one of their cells.
        value: the bias.

    Raises:
        TypeError: ``module`` is not an LSTM or GRU, nor one of their cells.
        ValueError: it has no biases, or they are computed from other parameters; ``value`` is not a
            finite number.

    """
    _check_finite("value", value)
    cell = _cell_of("forget_bias_", module, gated=True)
    for bias_ih, bias_hh in _gate_biases(module, cell, cell.keeping_gate):
        bias_ih.fill_(value)
        bias_hh.zero_()
    return module


def chrono_(module: _Module, max_lag: float, generator: torch.Generator | None = None) -> _Module:
    """Spread the memories of the units over ``1 .. max_lag`` time steps.

    ``b_f = log(u)`` with ``u ~ U[1, max_lag - 1]`` for each unit, and ``b_i = -b_f`` in an LSTM. A
    gate with bias ``log(u)`` keeps ``u / (1 + u)`` of the state per step and so forgets over
    ``1 + u`` steps. In a GRU z plays both parts: ``b_z = log(u)``. (The paper writes ``-log(u)``,
    because its z lets the new state in; torch's keeps the old one.)

    Source: Tallec & Ollivier, 2018.

    Args:
        module: an LSTM or GRU, or one of their cells.
        max_lag: T_max, the longest dependency that is expected, in time steps; at least 3.
        generator: source of the random numbers.

    Raises:
        TypeError: as in :func:`forget_bias_`.
        ValueError: as in :func:`forget_bias_`; ``max_lag`` is below 3.

    """
    _check_finite("max_lag", max_lag)
    if max_lag < 3:
        raise ValueError(f"max_lag: expected a number of at least 3, got {max_lag}")
    cell = _cell_of("chrono_", module, gated=True)
    keeping = _gate_biases(module, cell, cell.keeping_gate)
    letting_in = _gate_biases(module, cell, cell.admitting_gate)
    for bias_ih, bias_hh in keeping:
        _draw(bias_ih, lambda u: u.uniform_(1, max_lag - 1, generator=generator).log_(), generator)
        bias_hh.zero_()
    for (bias_ih, bias_hh), (keep, _) in zip(letting_in, keeping, strict=False):
        torch.neg(keep, out=bias_ih)
        bias_hh.zero_()
    return module


# ---- the weights of a module ---------------------------------------------------------------------
#
# All are handed out detached, so that writing to them is not recorded but still seen by autograd's
# check for changed tensors; and all at once, so that an error changes nothing.


def _recurrent_blocks(target: nn.Module | Tensor) -> list[Tensor]:
    """Return each gate's block of U, ``(H, H)`` (``(H, P)`` in an LSTM with projections)."""
    if isinstance(target, nn.Module):
        blocks = _cell_of("target", target).blocks
        weights = _parameters(target, "weight_hh")
        return [block for weight in weights for block in weight.chunk(blocks)]
    if not isinstance(target, Tensor):
        raise TypeError(
            f"target: expected a recurrent module or one of its weights, got {type_name(target)}"
        )
    if target.ndim != 2 or target.shape[1] == 0 or target.shape[0] % target.shape[1] != 0:
        raise ValueError(
            f"target: expected a weight of shape (gates * H, H), got {tuple(target.shape)}"
        )
    return list(target.detach().split(target.shape[1]))


def _gate_biases(module: Any, cell: Cell, gate: str | None) -> list[tuple[Tensor, Tensor]]:
    """Return the rows of one gate, ``(H,)`` each, of both biases of every layer and direction."""
    if gate is None:
        return []
    if not module.bias:
        raise ValueError("module: expected biases, got a module with bias=False")
    first = cell.gate_names.index(gate) * module.hidden_size
    rows = slice(first, first + module.hidden_size)
    biases = [bias[rows] for bias in _parameters(module, "bias_ih", "bias_hh")]
    return list(zip(biases[::2], biases[1::2], strict=True))


def _parameters(module: Any, *kinds: str) -> list[Tensor]:
    """Return the parameters of these kinds, for each layer and direction in turn."""
    suffixes = [""]  # of a cell
    if hasattr(module, "num_layers"):
        directions = ("", "_reverse") if module.bidirectional else ("",)
        suffixes = [f"_l{layer}{d}" for layer in range(module.num_layers) for d in directions]
    found = []
    for name in (kind + suffix for suffix in suffixes for kind in kinds):
        parameter = module._parameters.get(name)
        if parameter is None:
            raise ValueError(
                f"module: expected a parameter {name}, but it is computed from others "
                "(parametrized, pruned or weight-normalised); initialise before registering that"
            )
        found.append(parameter.detach())
    return found


def _draw(
    target: Tensor, fill: Callable[[Tensor], Tensor], generator: torch.Generator | None
) -> None:
    """Copy ``fill(fresh tensor)`` to ``target``, drawn where the generator lives.

    Half precisions are drawn in float32: a QR decomposition has no others, and a seed then gives
    the same numbers, rounded.
    """
    dtype = target.dtype if target.dtype == torch.float64 else torch.float32
    device = target.device if generator is None else generator.device
    target.copy_(fill(torch.empty(target.shape, dtype=dtype, device=device)))


# ---- checks --------------------------------------------------------------------------------------


def _cell_of(caller: str, module: object, gated: bool | None = None) -> Cell:
    """Return the cell of a module; it is to have gates, or none, or (None) either."""
    cell = cell_of(module)
    if cell is None or gated not in (None, bool(cell.gate_names)):
        names = {False: "FusedRNN, nn.RNN", True: "FusedLSTM, FusedGRU, nn.LSTM, nn.GRU"}
        expected = names.get(gated) if gated is not None else ", ".join(names.values())
        raise TypeError(
            f"{caller}: expected one of {expected} or their cells, got {type_name(module)}"
        )
    return cell


def _check_finite(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def _check_not_negative(name: str, value: float) -> None:
    _check_finite(name, value)
    if value < 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
