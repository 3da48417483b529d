"""Remedies against vanishing gradients, by name: switch any of them on, in any model.

    model = rnn_cuda.remedies.apply(model, "chrono", max_lag=784)
    rnn_cuda.remedies.names(torch.nn.GRU(3, 5))  # those for a GRU

Some set weights anew (`rnn_cuda.init`), one constrains them while they are trained, some replace a
layer by one with another recurrence (`rnn_cuda.residual`). None of them is a cure: what a gradient
does at initialisation need not last, and a gradient that arrives does not make a task learnable.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from rnn_cuda import init
from rnn_cuda.arguments import type_name
from rnn_cuda.modules import ElmanStack, FusedGRU, FusedLSTM, FusedRNN
from rnn_cuda.rebuild import rebuild
from rnn_cuda.residual import AntisymmetricRNN, LeakyRNN

__all__ = [
    "REMEDIES",
    "Remedy",
    "antisymmetric",
    "apply",
    "leaky",
    "names",
    "orthogonal_parametrization",
    "parameter_groups",
]

_Layer = TypeVar("_Layer", bound=nn.Module)

PLAIN = (FusedRNN, nn.RNN)
ELMAN = (ElmanStack, nn.RNN)  # also leaky and antisymmetric ones
GATED = (FusedLSTM, FusedGRU, nn.LSTM, nn.GRU)


def orthogonal_parametrization(layer: _Layer, orthogonal_map: str | None = None) -> _Layer:
    """Keep each block of U orthogonal during training, by torch's own parametrization.

    ``U = Q exp(A)``, A skew-symmetric and trained, Q fixed (``orthogonal_map="matrix_exp"``, the
    default; torch's others are ``"cayley"`` and ``"householder"``). A U that is not orthogonal yet
    is replaced by the Q of its QR decomposition, so initialise before. Train it with a smaller
    learning rate than the rest (:func:`parameter_groups`). Every gate of an LSTM or GRU has its
    block of U.

    Source: Lezcano-Casado & Martinez-Rubio, 2019 (expRNN);
    ``torch.nn.utils.parametrizations.orthogonal``.

    Args:
        layer: a FusedRNN, FusedLSTM, FusedGRU or torch's module of the same cell; changed in place.
        orthogonal_map: as above.

    Returns:
        ``layer``.

    Raises:
        TypeError: ``layer`` is something else.
        ValueError: U is computed from other parameters already, or not square (LSTM projections).

    """
    _check_layer("orthogonal_parametrization", layer, (*ELMAN, *GATED))
    weights = [name for name, _ in layer.named_parameters() if name.startswith("weight_hh")]
    if not weights or parametrize.is_parametrized(layer):
        raise ValueError("layer: expected plain parameters, got a parametrized or pruned layer")
    for name in weights:
        weight = layer.get_parameter(name)
        if weight.shape[0] % weight.shape[1] != 0 or getattr(layer, "proj_size", 0):
            raise ValueError(f"layer: expected square blocks in {name}, got {tuple(weight.shape)}")
        # Unsafe as in "not checked": the check would take a U that is not yet orthogonal for a bug.
        map_ = _BlockwiseOrthogonal(weight.detach(), orthogonal_map)
        parametrize.register_parametrization(layer, name, map_, unsafe=True)
    return layer


class _BlockwiseOrthogonal(nn.Module):
    """torch's orthogonal parametrization for a stack of square blocks, ``(gates * H, H)``."""

    map: Any

    def __init__(self, weight: Tensor, orthogonal_map: str | None) -> None:
        super().__init__()
        # torch builds its map for a parameter of a module; this one serves for nothing else.
        stack = nn.Module()
        stack.weight = nn.Parameter(self._blocks(weight))
        parametrizations.orthogonal(stack, "weight", orthogonal_map)
        self.map = stack.get_submodule("parametrizations.weight.0")

    @staticmethod
    def _blocks(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (-1, weight.shape[1]))

    def forward(self, trained: Tensor) -> Tensor:
        return self.map(self._blocks(trained)).flatten(0, 1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self.map.right_inverse(self._blocks(weight)).flatten(0, 1)


def parameter_groups(
    model: nn.Module, learning_rate: float, orthogonal_factor: float = 0.1
) -> list[dict[str, Any]]:
    """Return the parameters for an optimizer, those of orthogonal matrices with their own rate.

    Args:
        model: any model.
        learning_rate: of all other parameters.
        orthogonal_factor: the rate of orthogonal matrices over ``learning_rate``.

    Returns:
        One or two groups, as ``torch.optim`` takes them; none is empty.

    Source: Lezcano-Casado & Martinez-Rubio, 2019.
    """
    orthogonal = {
        id(holder.original)
        for holder in model.modules()
        if isinstance(holder, parametrize.ParametrizationList)
        and any(isinstance(map_, _BlockwiseOrthogonal) for map_ in holder)
    }
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        factor = orthogonal_factor if id(parameter) in orthogonal else 1.0
        groups.setdefault(learning_rate * factor, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def leaky(layer: FusedRNN | nn.RNN, leak: float = 0.1) -> LeakyRNN:
    """Return a :class:`~rnn_cuda.residual.LeakyRNN` with the parameters of an Elman layer.

    Raises:
        TypeError: ``layer`` is not a FusedRNN or ``nn.RNN``, or its recurrence was replaced before.
        ValueError: ``leak`` is out of range, or a weight is computed from other parameters.

    """
    return _replacement("leaky", layer, partial(LeakyRNN, leak=leak))


def antisymmetric(
    layer: FusedRNN | nn.RNN, step_size: float = 0.1, diffusion: float = 0.01
) -> AntisymmetricRNN:
    """Return an :class:`~rnn_cuda.residual.AntisymmetricRNN` with the parameters of an Elman layer.

    Raises:
        TypeError: ``layer`` is not a FusedRNN or ``nn.RNN``, or its recurrence was replaced before.
        ValueError: a number is out of range, or a weight is computed from other parameters.

    """
    build = partial(AntisymmetricRNN, step_size=step_size, diffusion=diffusion)
    return _replacement("antisymmetric", layer, build)


def _replacement(caller: str, layer: FusedRNN | nn.RNN, build: Callable[..., Any]) -> Any:
    _check_layer(caller, layer, PLAIN)
    # The same parameters, not copies: an optimizer made before goes on working.
    return rebuild(layer, build, lambda parameter: parameter)


@dataclass(frozen=True)
class Remedy:
    """A remedy that :func:`apply` knows.

    Attributes:
        function: takes a layer and options, and returns the layer that is to stand in its place
            (often the same one, changed).
        layers: the classes that it applies to.
    """

    function: Callable[..., nn.Module]
    layers: tuple[type[nn.Module], ...]

    @property
    def options(self) -> tuple[str, ...]:
        """The names of what can be given beside the layer."""
        return tuple(inspect.signature(self.function).parameters)[1:]


REMEDIES: dict[str, Remedy] = {
    "orthogonal_init": Remedy(init.orthogonal_, (*ELMAN, *GATED)),
    "scaled_gain": Remedy(init.scaled_gaussian_, (*ELMAN, *GATED)),
    "identity_init": Remedy(init.identity_, ELMAN),
    "irnn": Remedy(init.irnn_, ELMAN),
    "forget_bias": Remedy(init.forget_bias_, GATED),
    "chrono": Remedy(init.chrono_, GATED),
    "orthogonal_parametrization": Remedy(orthogonal_parametrization, (*ELMAN, *GATED)),
    "leaky": Remedy(leaky, PLAIN),
    "antisymmetric": Remedy(antisymmetric, PLAIN),
}
"""All remedies by name."""


def names(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the remedies that apply to a layer of this class."""
    return tuple(name for name, remedy in REMEDIES.items() if isinstance(layer, remedy.layers))


def apply(model: nn.Module, name: str, **options: Any) -> nn.Module:
    """Apply a remedy to every recurrent layer of ``model``.

    Args:
        model: any module, or a recurrent layer itself; changed in place.
        name: one of :data:`REMEDIES`.
        options: what the remedy's function takes beside the layer.

    Returns:
        ``model``; or its replacement, if it is itself a layer that the remedy replaces.

    Raises:
        ValueError: there is no remedy of that name, no recurrent layer in the model, or an option
            or a layer does not fit; for the last two see the remedy's function.
        TypeError: the remedy does not apply to one of the layers, or has no such option. Nothing
            has been changed then.

    Example:
        >>> from torch import nn
        >>> apply(nn.Sequential(nn.RNN(3, 5)), "leaky", leak=0.2)
        Sequential(
          (0): LeakyRNN(3, 5, leak=0.2)
        )

    """
    if name not in REMEDIES:
        raise ValueError(f"name: expected one of {', '.join(REMEDIES)}; got {name!r}")
    remedy = REMEDIES[name]
    unknown = sorted(set(options) - set(remedy.options))
    if unknown:
        raise TypeError(
            f"{name} has no option {', '.join(unknown)}; it has: {', '.join(remedy.options)}"
        )
    layers: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, (*ELMAN, *GATED))
    ]
    if not layers:
        raise ValueError(f"model: expected a FusedRNN, RNN, LSTM or GRU in it, got {model}")
    for layer in layers:
        if not isinstance(layer, remedy.layers):
            possible = ", ".join(names(layer))
            raise TypeError(f"{name} does not apply to {type_name(layer)}; these do: {possible}")
    replacements = {layer: remedy.function(layer, **options) for layer in layers}
    if model in replacements:
        return replacements[model]
    # list(): the tree is changed while it is walked. Duplicates: every place of a shared layer.
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(path, replacements[module])
    return model


def _check_layer(name: str, layer: object, kinds: tuple[type[nn.Module], ...]) -> None:
    if not isinstance(layer, kinds):
        raise TypeError(f"{name} does not apply to {type_name(layer)}")
