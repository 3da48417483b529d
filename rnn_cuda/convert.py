"""Swap every ``torch.nn.RNN`` inside a model for a `FusedRNN`, in one line."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from rnn_cuda.modules import FusedRNN
from rnn_cuda.rebuild import rebuild

_Model = TypeVar("_Model", bound=nn.Module)

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


def replace_rnn(model: _Model) -> _Model | FusedRNN:
    """Replace every ``torch.nn.RNN`` in ``model`` by a :class:`FusedRNN`, in place.

    The new modules hold the same ``Parameter`` objects, so an optimizer made beforehand goes on
    working, and tied weights stay tied. A module that occurs in several places is replaced by one.
    Forward and backward hooks are kept; hooks on ``state_dict`` are not.

    Only registered modules are found: an ``nn.RNN`` in a plain list is not. Submodules, buffers and
    attributes that were added to an ``nn.RNN`` from outside are not taken over.

    Subclasses of ``nn.RNN`` may compute something else: they are left alone, with a warning.

    Returns:
        ``model``, or its replacement if ``model`` is itself an ``nn.RNN``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an ``nn.RNN`` in it has a parametrization, pruning or weight norm; nothing has
            been replaced then.

    Example:
        >>> from torch import nn
        >>> replace_rnn(nn.Sequential(nn.RNN(3, 5), nn.Flatten()))
        Sequential(
          (0): FusedRNN(3, 5)
          (1): Flatten(start_dim=1, end_dim=-1)
        )

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    # Everything is rebuilt before anything is replaced, so that an error changes nothing.
    replacements: dict[nn.Module, FusedRNN] = {}
    for path, module in model.named_modules():
        # A parametrized module's class is a subclass made by torch; it goes on to a clear error.
        if type(module) is nn.RNN or (isinstance(module, nn.RNN) and is_parametrized(module)):
            replacements[module] = _replacement(path, module)
        elif isinstance(module, nn.RNN):
            warnings.warn(
                f"{_describe(path)} is left alone: {type(module).__name__} is a subclass of nn.RNN "
                "and may compute something else; if not, convert it with FusedRNN.from_torch",
                stacklevel=2,
            )
    if model in replacements:
        return replacements[model]
    # list(): the tree is changed while it is walked. Duplicates: every place of a shared module.
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(path, replacements[module])
    return model


def _replacement(path: str, rnn: nn.RNN) -> FusedRNN:
    try:
        fused = rebuild(rnn, FusedRNN, lambda parameter: parameter)
    except ValueError as error:
        raise ValueError(f"{_describe(path)}: {error}") from error
    for table in _HOOK_TABLES:
        setattr(fused, table, getattr(rnn, table))
    return fused


def _describe(path: str) -> str:
    return f"model.{path}" if path else "model"
