"""Checks of arguments that the modules share.

Types and wording of the errors follow ``torch.nn.RNN`` where it has the same check, because code
that is ported to this package may match on them; arguments, expected and got are always named.
"""

from __future__ import annotations

import numbers

from torch import Tensor

from rnn_cuda.reference import NONLINEARITIES


def type_name(value: object) -> str:
    """Return the name of the type of ``value``, for a message."""
    return type(value).__name__


def check_int(name: str, value: int) -> None:
    """Raise TypeError unless ``value`` is an int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} should be of type int, got: {type_name(value)}")


def check_positive_int(name: str, value: int) -> None:
    """Raise TypeError unless ``value`` is an int, ValueError unless it is positive."""
    check_int(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be greater than zero, got {value}")


def check_bool(name: str, value: bool) -> None:
    """Raise TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type_name(value)}")


def check_nonlinearity(nonlinearity: str) -> None:
    """Raise ValueError unless ``nonlinearity`` is one of the names that the package knows."""
    if nonlinearity not in NONLINEARITIES:
        expected = ", ".join(map(repr, NONLINEARITIES))
        raise ValueError(f"Unknown nonlinearity {nonlinearity!r}: expected one of {expected}")


def check_dropout(dropout: float) -> None:
    """Raise ValueError or TypeError unless ``dropout`` is a number in [0, 1]."""
    # A bool or a str is a ValueError in nn.RNN, any other type a TypeError.
    if not isinstance(dropout, numbers.Real | str):
        raise TypeError(f"dropout should be a number in range [0, 1], got: {type_name(dropout)}")
    if isinstance(dropout, bool | str) or not 0 <= float(dropout) <= 1:
        raise ValueError(f"dropout should be a number in range [0, 1], got: {dropout!r}")


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a Tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should be a Tensor, got: {type_name(value)}")


def check_input_placement(
    input: Tensor, weight: Tensor, *, dtype_error: type[Exception] = ValueError
) -> None:
    """Raise RuntimeError unless the devices agree, ``dtype_error`` unless the dtypes do."""
    if input.device != weight.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device: "
            f"expected input on {weight.device}, got {input.device}"
        )
    if input.dtype != weight.dtype:
        raise dtype_error(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
        )


def check_hx_placement(hx: Tensor, input: Tensor) -> None:
    """Raise RuntimeError unless ``hx`` has the device and the dtype of ``input``."""
    if hx.device != input.device:
        raise RuntimeError(
            "Input and hidden tensors are not at the same device: "
            f"expected hx on {input.device}, got {hx.device}"
        )
    if hx.dtype != input.dtype:
        raise RuntimeError(
            "Input and hidden tensors do not have the same dtype: "
            f"expected hx of {input.dtype}, got {hx.dtype}"
        )
