"""`FusedRNNCell`: what ``torch.nn.RNNCell`` does, one time step at a time."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rnn_cuda import autocast, export
from rnn_cuda.arguments import (
    check_both_distributed,
    check_dense,
    check_dtype,
    check_dtype_of,
    check_hx_placement,
    check_input_placement,
    check_int,
    check_nonlinearity,
    check_tensor,
    is_distributed,
)
from rnn_cuda.cells import Cell, cell_named
from rnn_cuda.cells.elman import activation
from rnn_cuda.functional import call_then_check, runs_as_one_node
from rnn_cuda.modules import read_weights
from rnn_cuda.reference import compute_dtype

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_TENSORS = ("input", "hx", *_WEIGHTS)
_OPTIONAL = ("hx", "bias_ih", "bias_hh")

# Other kinds of tensors, and traces, do with PyTorch's own operators as they like.
_PLAIN = {Tensor, nn.Parameter, type(None)}


def _wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = compute_dtype(x.dtype)
    if x.dtype != wide:  # not always: ExpandedWeights know linear() alone
        x, weight = x.to(wide), weight.to(wide)
        bias = None if bias is None else bias.to(wide)
    return linear(x, weight, bias)


class FusedRNNCell(nn.Module):
    r"""One step of an Elman RNN; a drop-in for :class:`torch.nn.RNNCell`.

    .. math:: h' = f(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    For code that steps by hand, with the nonlinearities and the rounding of :class:`FusedRNN`: half
    precisions compute the step in float32 and round once. On a CPU, eager code runs a step on the
    kernel of the layer, to the same bits; the first one compiles it. Everywhere else (on a GPU,
    under ``torch.compile``, traced, under the transforms of ``torch.func``, in forward mode, with
    subclasses of tensors, on the reference backend) a step is plain PyTorch, since a single one has
    nothing to fuse over time.

    Args:
        input_size: number of features I of the input.
        hidden_size: number of features H of the hidden state.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        nonlinearity: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.
        device: where the parameters are created.
        dtype: data type of the parameters, one of those of `FusedRNN`.

    Inputs:
        input: ``(B, I)`` or ``(I,)``.
        hx: the previous state, ``(B, H)`` or ``(H,)``; zeros by default.

    Output:
        The next state, shaped as ``hx``.

    Parameters: ``weight_ih`` ``(H, I)``, ``weight_hh`` ``(H, H)``, ``bias_ih`` and ``bias_hh``
    ``(H,)``, all drawn uniformly from :math:`(-1/\sqrt{H}, 1/\sqrt{H})`.

    Raises:
        TypeError: an argument, the input or ``hx`` is of the wrong type.
        ValueError: an argument is out of range, ``input`` or ``hx`` has not 1 or 2 dimensions, or
            the weights do not fit each other.
        RuntimeError: ``dtype``, or the shape, dtype or device of ``input`` or ``hx``, does not fit.

    Example:
        >>> import torch
        >>> cell = FusedRNNCell(3, 5)
        >>> cell(torch.zeros(2, 3)).shape
        torch.Size([2, 5])

    """

    __constants__: ClassVar[list[str]] = nn.RNNCell.__constants__

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # nn.RNNCell, unlike nn.RNN, allows sizes of zero and any truth value as bias.
        self.input_size = check_int("input_size", input_size)
        self.hidden_size = hidden = check_int("hidden_size", hidden_size)
        for name in ("input_size", "hidden_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        self.bias = bool(bias)
        self.nonlinearity = check_nonlinearity(nonlinearity)
        check_dtype(dtype, self.nonlinearity)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight_ih = parameter(hidden, self.input_size)
        self.weight_hh = parameter(hidden, hidden)
        self.bias_ih = parameter(hidden) if self.bias else None
        self.bias_hh = parameter(hidden) if self.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew from ``U(-1/sqrt(H), 1/sqrt(H))``, in order of creation."""
        bound = 1 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        """Return the arguments that differ from their defaults, as ``nn.RNNCell`` does."""
        options = [f"{self.input_size}, {self.hidden_size}"]
        if not self.bias:
            options.append(f"bias={self.bias}")
        if self.nonlinearity != "tanh":
            options.append(f"nonlinearity={self.nonlinearity}")
        return ", ".join(options)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return the state after one step from ``hx``; for shapes and errors see the class."""
        if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
            if hx is not None:
                self._check_hx_shape(hx, input)
            weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
            return self._plain_step(input, hx, *weights)
        else:  # noqa: RET505 (TorchScript would compile what just follows)
            return self._eager_step(input, hx)

    def _eager_step(self, input: Tensor, hx: Tensor | None) -> Tensor:
        if not (isinstance(input, Tensor) and (hx is None or isinstance(hx, Tensor))):
            if export.has_fx_proxy(input, hx):
                return export.fx_node(self, FusedRNNCell.forward, input, hx)
            check_tensor("input", input)
            check_tensor("hx", hx)
        if input.dim() not in (1, 2):
            raise ValueError(f"RNNCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(
                f"RNNCell, hx: Expected hidden to be 1D or 2D, got {hx.dim()}D instead"
            )

        weights = read_weights(self, _WEIGHTS)
        device_type = input.device.type
        dtype = autocast.active_dtype(device_type)
        if dtype is None:
            return self._step(device_type, input, hx, *weights)
        with autocast.disabled(device_type, dtype):
            hx, *weights = (autocast.cast(tensor, dtype) for tensor in (hx, *weights))
            return self._step(device_type, autocast.cast(input, dtype), hx, *weights)

    def _step(self, device_type: str, input: Tensor, hx: Tensor | None, *weights: Any) -> Tensor:
        """Take one step; ``weights`` are those of input and state, and their biases."""
        if (
            device_type == "cpu"
            and self.hidden_size > 0
            and runs_as_one_node(input, device_type)
            and {type(hx), *map(type, weights)} <= _PLAIN
            and not torch._C._is_tracing()
        ):
            step = (input, hx, *weights)
            return call_then_check(self._native_step, step, self._check_fit, step)
        self._check_fit(input, hx, *weights)
        return self._plain_step(input, hx, *weights)

    def _native_step(self, input: Tensor, hx: Tensor | None, *weights: Any) -> Tensor:
        weights_there = [weight for weight in weights if weight is not None]
        states = [] if hx is None else [hx]
        step = torch.ops.rnn_cuda.step
        return step(input, states, weights_there, f"elman.{self.nonlinearity}")[0]

    def _plain_step(
        self,
        input: Tensor,
        hx: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
    ) -> Tensor:
        if hx is None:
            hx = input.new_zeros(list(input.shape[:-1]) + [self.hidden_size])  # noqa: RUF005
        z = _wide_linear(input, weight_ih, bias_ih) + _wide_linear(hx, weight_hh, bias_hh)
        return activation(z, self.nonlinearity).to(input.dtype)

    def _cell(self) -> Cell:
        """Return the cell; see `rnn_cuda.cells.cell_of`."""
        return cell_named(f"elman.{self.nonlinearity}")

    def _check_fit(self, input: Tensor, hx: Tensor | None, *weights: Any) -> None:
        is_plain = type(input) in _PLAIN
        for name, tensor in zip(_TENSORS, (input, hx, *weights), strict=True):
            if tensor is None and name in _OPTIONAL:
                continue
            if not (  # the usual case, in little time
                is_plain
                and tensor is not None
                and type(tensor) in _PLAIN
                and tensor.layout is torch.strided
                and tensor.dtype == input.dtype
                and not tensor.is_nested
            ):
                tensor = check_tensor(name, tensor)
                check_dense(name, tensor)
                check_both_distributed(name, tensor, is_distributed(input), "input")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                "input has inconsistent input_size: "
                f"got {input.shape[-1]} expected {self.input_size}"
            )
        check_input_placement(input, weights[0], dtype_error=RuntimeError)
        check_dtype_of("input", input)
        if hx is not None:
            self._check_hx_shape(hx, input)
            check_hx_placement(hx, input)

    def _check_hx_shape(self, hx: Tensor, input: Tensor) -> None:
        if hx.shape[-1] != self.hidden_size:
            raise RuntimeError(
                "hx: hidden0 has inconsistent hidden_size: "
                f"got {hx.shape[-1]}, expected {self.hidden_size}"
            )
        if hx.dim() != input.dim():
            raise RuntimeError(
                f"hx must have a batch dimension if input has one: "
                f"expected {input.dim()}D, got {hx.dim()}D"
            )
        if hx.shape[:-1] != input.shape[:-1]:
            raise RuntimeError(
                f"Input batch size {input.shape[0]} doesn't match hidden0 batch size "
                f"{hx.shape[0]} of hx"
            )
