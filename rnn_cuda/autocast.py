"""Autocast as the modules apply it: cast on entry, then compute with autocast off.

Kernels are opaque to autocast, so a module does what autocast does to ``torch.nn.RNN``: every
floating-point tensor except float64 is cast to the autocast dtype. Autocast is then switched off
for the computation, because half precisions accumulate in float32, which autocast would undo.
"""

from __future__ import annotations

import contextlib
from typing import overload

import torch
from torch import Tensor


def active_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that autocast computes in on this type of device, or None where it is off.

    ``device_type`` is ``tensor.device.type``, such as ``"cpu"``.
    """
    if not torch._C._is_any_autocast_enabled():  # the usual case, in one call
        return None
    if not torch.amp.is_autocast_available(device_type):
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


@overload
def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor: ...


@overload
def cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None: ...


def cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """Return ``tensor`` in the autocast ``dtype``; None, float64 and integers stay as they are."""
    if tensor is None or dtype is None:
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def disabled(device_type: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Return a context without autocast on this type of device; ``dtype`` is `active_dtype`'s."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
