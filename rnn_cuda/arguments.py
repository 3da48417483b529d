"""Checks of arguments that the modules share.

Types and wording of the errors follow ``torch.nn.RNN`` where it has the same check, because code
that is ported to this package may match on them; arguments, expected and got are always named.
"""

from __future__ import annotations

import contextlib
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils._expanded_weights.expanded_weights_impl import ExpandedWeight

from rnn_cuda.cells.elman import NONLINEARITIES
from rnn_cuda.reference import DTYPES


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def type_name(value: object) -> str:
    """Return the name of the type of ``value``, for a message."""
    return type(value).__name__


def check_int(name: str, value: object) -> int:
    """Return ``value`` as an int; raise TypeError unless it is an integer and no truth value.

    Integers are those of Python (enumerations too), those of NumPy, and tensors of one integer.
    """
    is_truth_value = isinstance(value, bool) or (
        isinstance(value, Tensor) and value.dtype is torch.bool
    )
    if hasattr(type(value), "__index__") and not is_truth_value:
        with contextlib.suppress(TypeError):  # of arrays of several numbers, or of floats
            return operator.index(value)  # pyright: ignore[reportArgumentType]
    raise TypeError(f"{name} should be of type int, got: {type_name(value)}")


def check_positive_int(name: str, value: object) -> int:
    """Return ``value`` as an int, as `check_int`; raise ValueError unless it is positive."""
    number = check_int(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be greater than zero, got {number}")
    return number


def check_bool(name: str, value: object) -> bool:
    """Return ``value`` as a bool; raise TypeError unless it is one.

    One of Python, one of NumPy, or a tensor or array of a single one.
    """
    is_scalar = getattr(value, "ndim", None) == 0  # of PyTorch or NumPy
    if isinstance(value, bool) or (is_scalar and str(value.dtype) in ("bool", "torch.bool")):  # pyright: ignore[reportAttributeAccessIssue]
        return bool(value)
    raise TypeError(f"{name} should be of type bool, got: {type_name(value)}")


def check_nonlinearity(
    nonlinearity: object, known: Sequence[str] = NONLINEARITIES, argument: str = "nonlinearity"
) -> str:
    """Return ``nonlinearity`` as a plain str; raise ValueError unless its name is ``known``.

    Members of an enumeration of strings count as the strings that they equal. ``argument`` is what
    an error calls it.
    """
    for name in known:
        if isinstance(nonlinearity, str) and nonlinearity == name:
            return name
    expected = ", ".join(map(repr, known))
    raise ValueError(f"Unknown {argument} {nonlinearity!r}: expected one of {expected}")


def check_dropout(dropout: object) -> float:
    """Return ``dropout`` as a float; raise ValueError or TypeError unless it is in [0, 1]."""
    try:
        number = float(dropout)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        number = None
    if number is None and not isinstance(dropout, str):
        raise TypeError(f"dropout should be a number in range [0, 1], got: {type_name(dropout)}")
    # What float() would take but is no number (a bool, a str, a tensor) is a ValueError in nn.RNN.
    is_number = isinstance(dropout, numbers.Real) and not isinstance(dropout, bool)
    if number is None or not is_number or not 0 <= number <= 1:
        raise ValueError(f"dropout should be a number in range [0, 1], got: {dropout!r}")
    return number


def check_dtype(dtype: Any, nonlinearity: str | None = None) -> None:
    """Raise unless a layer can compute in ``dtype``, which is None for PyTorch's default.

    Raises:
        TypeError: it is no ``torch.dtype``.
        RuntimeError: it is an integer type (as in ``torch.nn.RNN``), or a type that neither a
            kernel nor PyTorch's operators compute in.
        ValueError: it is complex, and the nonlinearity is not defined there.

    """
    if not isinstance(dtype, torch.dtype):
        try:
            dtype = torch.empty(0, dtype=dtype, device="meta").dtype  # None and float stand for one
        except TypeError:
            raise TypeError(f"dtype should be a torch.dtype, got: {type_name(dtype)}") from None
    if dtype not in DTYPES:
        raise RuntimeError(
            f"dtype: expected one of {_names(DTYPES)}, as the weights need gradients and the "
            f"recurrence is computed in it; got {dtype}"
        )
    if dtype.is_complex and nonlinearity in ("relu", "softplus"):
        raise ValueError(
            f"nonlinearity: {nonlinearity} is not defined for complex numbers, and dtype is "
            f"{dtype}; expected one of 'tanh', 'sigmoid', 'identity'"
        )


def check_tensor(name: str, value: object) -> Tensor:
    """Return ``value``; raise TypeError unless it is a Tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should be a Tensor, got: {type_name(value)}")
    return value


def check_dtype_of(name: str, tensor: Tensor, dtypes: Iterable[torch.dtype] = DTYPES) -> None:
    """Raise ValueError unless ``tensor`` is of one of ``dtypes``."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected a dtype among {_names(dtypes)}; got {tensor.dtype}")


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` is a plain array of numbers: dense, strided, unmasked."""
    if isinstance(tensor, ExpandedWeight):  # it answers nothing below
        return
    if tensor.is_nested:
        kind = "a nested tensor"
        remedy = (
            f"pack its sequences, torch.nn.utils.rnn.pack_sequence({name}.unbind(), "
            "enforce_sorted=False), or pad them"
        )
    elif tensor.is_quantized:
        kind, remedy = "a quantized tensor", f"convert it, {name}.dequantize()"
    elif tensor.layout is not torch.strided:
        kind, remedy = f"one of layout {tensor.layout}", f"convert it, {name}.to_dense()"
    elif type(tensor).__name__ == "MaskedTensor":
        kind, remedy = "a MaskedTensor", f"fill what is masked, {name}.to_tensor(0)"
    else:
        return
    raise TypeError(f"{name}: expected a dense tensor, got {kind}; {remedy}")


def is_distributed(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a DTensor (asked without importing torch.distributed)."""
    return type(tensor) not in (Tensor, Parameter) and hasattr(tensor, "device_mesh")


def check_both_distributed(name: str, tensor: Tensor, distributed: bool, other: str) -> None:
    """Raise TypeError unless ``tensor`` is a DTensor just if ``distributed``, as ``other`` is."""
    if is_distributed(tensor) == distributed:
        return
    kinds = ("a plain tensor", "a DTensor")
    raise TypeError(
        f"{name}: expected {kinds[distributed]} as {other} is, got {kinds[not distributed]}; "
        "give local tensors alone (tensor.to_local(), tensor.full_tensor()), or distribute input, "
        "states and weights over one mesh"
    )


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
        check_dense("input", input)  # no advice to convert a quantized one to a float dtype
        raise dtype_error(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
        )


def check_hx_placement(hx: Tensor, input: Tensor, name: str = "hx") -> None:
    """Raise RuntimeError unless ``hx`` has the device and the dtype of ``input``.

    And TypeError if just one of them is a DTensor. ``name`` is that of ``hx``.
    """
    if type(hx) is not type(input):
        check_both_distributed(name, hx, is_distributed(input), "input")
    if hx.device != input.device:
        raise RuntimeError(
            "Input and hidden tensors are not at the same device: "
            f"expected {name} on {input.device}, got {hx.device}"
        )
    if hx.dtype != input.dtype:
        check_dense(name, hx)
        raise RuntimeError(
            "Input and hidden tensors do not have the same dtype: "
            f"expected {name} of {input.dtype}, got {hx.dtype}"
        )
