"""Swap torch's recurrent modules inside a model for those of this package, in one line."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from rnn_cuda.modules import FusedGRU, FusedLSTM, FusedRNN
from rnn_cuda.rebuild import rebuild

_FUSED: dict[type[nn.RNNBase], Any] = {nn.RNN: FusedRNN, nn.GRU: FusedGRU, nn.LSTM: FusedLSTM}

# What a module calls around forward and backward. Each is a dict that the handles of the hooks
# refer to, so taking over the dict itself keeps ``handle.remove()`` working.
_HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def replace_rnn(model: nn.Module) -> Any:
    """Replace every ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM`` in ``model``, in place.

    By a :class:`FusedRNN`, :class:`FusedGRU` or :class:`FusedLSTM`. They hold the same
    ``Parameter`` objects, so an optimizer made beforehand goes on working, and tied weights stay
    tied. A module that occurs in several places is replaced by one. Forward and backward hooks are
    kept; hooks on ``state_dict`` are not.

    Only registered modules are found: one in a plain list is not. Submodules, buffers and
    attributes that were added to torch's module from outside are not taken over.

    Some are left alone, with a warning: subclasses, which may compute something else; an LSTM with
    projections; and on CUDA, where there are no kernels for them yet, a GRU or LSTM.

    Returns:
        ``model``, or its replacement if ``model`` is itself one of these.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: one that is to be replaced has a parametrization, pruning or weight norm;
            nothing has been replaced then.

    Example:
        >>> from torch import nn
        >>> replace_rnn(nn.ModuleList([nn.RNN(3, 5), nn.Flatten(), nn.LSTM(3, 5)]))
        ModuleList(
          (0): FusedRNN(3, 5)
          (1): Flatten(start_dim=1, end_dim=-1)
          (2): FusedLSTM(3, 5)
        )

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    # Everything is rebuilt before anything is replaced, so that an error changes nothing.
    replacements: dict[nn.Module, nn.Module] = {}
    for path, module in model.named_modules():
        kind = next((kind for kind in _FUSED if isinstance(module, kind)), None)
        if kind is None:
            continue
        assert isinstance(module, nn.RNNBase)
        if reason := _why_not(module, kind):
            warnings.warn(f"{_describe(path)} is left alone: {reason}", stacklevel=2)
        else:
            replacements[module] = _replacement(path, module, _FUSED[kind])
    if model in replacements:
        return replacements[model]
    # list(): the tree is changed while it is walked. Duplicates: every place of a shared module.
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(path, replacements[module])
    return model


def _why_not(module: nn.RNNBase, kind: type[nn.RNNBase]) -> str | None:
    """Return why ``module``, a ``kind``, is not replaced, or None."""
    name, fused = type(module).__name__, _FUSED[kind].__name__
    # A parametrized module's class is a subclass made by torch; it goes on to a clear error.
    if type(module) is not kind and not is_parametrized(module):
        return (
            f"{name} is a subclass of nn.{kind.__name__} and may compute something else; if not, "
            f"convert it with {fused}.from_torch"
        )
    if module.proj_size:
        return f"a {fused} has no projections"
    if kind is not nn.RNN and any(weight.is_cuda for weight in module.parameters()):
        return f"a {fused} has no kernels for CUDA yet"
    return None


def _replacement(path: str, module: nn.RNNBase, fused: Any) -> nn.Module:
    try:
        built = rebuild(module, fused, lambda parameter: parameter)
    except ValueError as error:
        raise ValueError(f"{_describe(path)}: {error}") from error
    for table in _HOOK_TABLES:
        setattr(built, table, getattr(module, table))
    return built


def _describe(path: str) -> str:
    return f"model.{path}" if path else "model"
