"""`FusedRNNCell`, `FusedGRUCell` and `FusedLSTMCell`: one time step at a time, as torch's cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from rnn_cuda.cells import Cell, State, cell_named
from rnn_cuda.cells.elman import activation
from rnn_cuda.functional import call_then_check, runs_as_one_node, with_equal_biases
from rnn_cuda.reference import compute_dtype
from rnn_cuda.stack import GatedFunctions, HiddenAndCellState, HiddenState, read_weights

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_OPTIONAL = ("bias_ih", "bias_hh")

# Other kinds of tensors, and traces, do with PyTorch's own operators as they like.
_PLAIN = {Tensor, nn.Parameter, type(None)}


def _wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = compute_dtype(x.dtype)
    if x.dtype != wide:  # not always: ExpandedWeights know linear() alone
        x, weight = x.to(wide), weight.to(wide)
        bias = None if bias is None else bias.to(wide)
    return linear(x, weight, bias)


class _FusedCell(HiddenState, nn.Module):
    """One step of a cell, with the interface of torch's module for it."""

    _torch_class: ClassVar[type[nn.RNNCellBase]]
    """Torch's module of the same cell."""

    __constants__: ClassVar[list[str]] = nn.RNNCellBase.__constants__
    __jit_unused_properties__: ClassVar[list[str]] = ["_cell_name"]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
        *,
        cell: Cell,
    ) -> None:
        super().__init__()
        # torch's cells, unlike its layers, allow sizes of zero and any truth value as bias.
        self.input_size = check_int("input_size", input_size)
        self.hidden_size = check_int("hidden_size", hidden_size)
        for name in ("input_size", "hidden_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        self.bias = bool(bias)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        rows = cell.blocks * self.hidden_size
        self.weight_ih = parameter(rows, self.input_size)
        self.weight_hh = parameter(rows, self.hidden_size)
        self.bias_ih = parameter(rows) if self.bias else None
        self.bias_hh = parameter(rows) if self.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew from ``U(-1/sqrt(H), 1/sqrt(H))``, in order of creation."""
        bound = 1 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        """Return the arguments that differ from their defaults, as torch's cell does."""
        options = [f"{self.input_size}, {self.hidden_size}"]
        if not self.bias:
            options.append(f"bias={self.bias}")
        return ", ".join(options)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Return the state after one step from ``hx``; for shapes and errors see the class."""
        states = self._states_of(hx)
        if states is None or not isinstance(input, Tensor):
            if export.has_fx_proxy(input, hx):
                return export.fx_node(self, input, hx)
            check_tensor("input", input)
            self._refuse_hx(hx)
        kind = self._torch_class.__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{kind}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for i, state in enumerate(states):
            if state.dim() not in (1, 2):
                name = self._state_names("hx")[i]
                what = "hidden" if name == "hx" else name
                raise ValueError(
                    f"{kind}, {name}: Expected {what} to be 1D or 2D, got {state.dim()}D instead"
                )

        weights = read_weights(self, _WEIGHTS)
        device_type = input.device.type
        dtype = autocast.active_dtype(device_type)
        if dtype is None:
            return self._hx_of(self._step(device_type, input, states, weights))
        with autocast.disabled(device_type, dtype):
            states = tuple(autocast.cast(state, dtype) for state in states)
            weights = [autocast.cast(weight, dtype) for weight in weights]
            input = autocast.cast(input, dtype)
            return self._hx_of(self._step(device_type, input, states, weights))

    def _step(
        self, device_type: str, input: Tensor, states: State, weights: list[Any]
    ) -> Sequence[Tensor]:
        """Take one step; ``weights`` are those of input and state, and their biases."""
        if (
            device_type == "cpu"
            and self.hidden_size > 0
            and runs_as_one_node(input, device_type, self._cell())
            and {*map(type, states), *map(type, weights)} <= _PLAIN
            and not torch._C._is_tracing()
        ):
            step = (input, states, weights)
            return call_then_check(self._native_step, step, self._check_fit, step)
        self._check_fit(input, states, weights)
        return self._plain_step(input, states, weights)

    def _native_step(
        self, input: Tensor, states: State, weights: list[Tensor | None]
    ) -> Sequence[Tensor]:
        weights_there = [weight for weight in weights if weight is not None]
        if len(weights_there) == 3:
            weights_there = with_equal_biases([weights], self._cell())
        return torch.ops.rnn_cuda.step(input, states, weights_there, self._cell_name)

    def _plain_step(self, input: Tensor, states: State, weights: Sequence[Any]) -> Sequence[Tensor]:
        weight_ih, weight_hh, bias_ih, bias_hh = weights
        cell = self._cell()
        if not states:
            states = (input.new_zeros(*input.shape[:-1], self.hidden_size),) * cell.states
        input_sums = _wide_linear(input, weight_ih, bias_ih)
        recurrent_sums = _wide_linear(states[0], weight_hh, bias_hh)
        new = cell.step(input_sums, recurrent_sums, states[-1].to(input_sums.dtype))
        return [state.to(input.dtype) for state in new]

    @property
    def _cell_name(self) -> str:
        """What the operators call the cell."""
        raise NotImplementedError

    def _cell(self) -> Cell:
        """Return the cell; see `rnn_cuda.cells.cell_of`."""
        return cell_named(self._cell_name)

    def _check_fit(self, input: Tensor, states: State, weights: Sequence[Any]) -> None:
        is_plain = type(input) in _PLAIN
        state_names = self._state_names("hx")
        tensors = [("input", input), *zip(state_names, states, strict=False)]
        for name, tensor in (*tensors, *zip(_WEIGHTS, weights, strict=True)):
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
        for name, state in zip(state_names, states, strict=False):
            self._check_hx_shape(state, input, name)
            check_hx_placement(state, input, name)

    def _check_hx_shape(self, hx: Tensor, input: Tensor, name: str) -> None:
        if hx.shape[-1] != self.hidden_size:
            raise RuntimeError(
                f"{name}: hidden0 has inconsistent hidden_size: "
                f"got {hx.shape[-1]}, expected {self.hidden_size}"
            )
        if hx.dim() != input.dim():
            raise RuntimeError(
                f"{name} must have a batch dimension if input has one: "
                f"expected {input.dim()}D, got {hx.dim()}D"
            )
        if hx.shape[:-1] != input.shape[:-1]:
            raise RuntimeError(
                f"Input batch size {input.shape[0]} doesn't match hidden0 batch size "
                f"{hx.shape[0]} of {name}"
            )


class FusedRNNCell(_FusedCell):
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
        nonlinearity: ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"identity"`` or ``"softplus"``.
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

    _torch_class = nn.RNNCell
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
        nonlinearity = check_nonlinearity(nonlinearity)
        check_dtype(dtype, nonlinearity)
        cell = cell_named(f"elman.{nonlinearity}")
        super().__init__(input_size, hidden_size, bias, device, dtype, cell=cell)
        self.nonlinearity = nonlinearity

    def extra_repr(self) -> str:
        """Return the arguments that differ from their defaults, as ``nn.RNNCell`` does."""
        is_default = self.nonlinearity == "tanh"
        more = "" if is_default else f", nonlinearity={self.nonlinearity}"
        return super().extra_repr() + more

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return the state after one step from ``hx``; for shapes and errors see the class."""
        if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
            if hx is None:
                hx = input.new_zeros(list(input.shape[:-1]) + [self.hidden_size])  # noqa: RUF005
            self._check_hx_shape(hx, input, "hx")
            z = _wide_linear(input, self.weight_ih, self.bias_ih)
            z = z + _wide_linear(hx, self.weight_hh, self.bias_hh)
            return activation(z, self.nonlinearity).to(input.dtype)
        else:  # noqa: RET505 (TorchScript would compile what just follows)
            return super().forward(input, hx)

    @property
    def _cell_name(self) -> str:
        return f"elman.{self.nonlinearity}"


class _GatedCell(GatedFunctions, _FusedCell):
    """What `FusedGRUCell` and `FusedLSTMCell` have in common."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        nonlinearity: str = "tanh",
        gate_nonlinearity: str = "sigmoid",
    ) -> None:
        check_dtype(dtype)
        cell = cell_named(self._kind)
        super().__init__(input_size, hidden_size, bias, device, dtype, cell=cell)
        self._choose_functions(nonlinearity, gate_nonlinearity)

    def extra_repr(self) -> str:
        """Return the arguments that differ from their defaults, as torch's cell does."""
        return ", ".join([super().extra_repr(), *self._other_functions()])

    def __prepare_scriptable__(self) -> nn.Module:
        """Return this, which ``torch.jit.script`` then compiles."""
        if not self._functions_are_torchs():
            raise NotImplementedError(
                f"torch.jit.script of a {type(self).__name__} with other functions than tanh and "
                "sigmoid: TorchScript has no operator for it"
            )
        return self


class FusedGRUCell(_GatedCell):
    r"""One step of a gated recurrent unit; a drop-in for :class:`torch.nn.GRUCell`.

    The formula is that of :class:`FusedGRU`; where a step runs natively, and where it is plain
    PyTorch, is as in `FusedRNNCell`, and so are inputs, output and errors.

    Args:
        input_size: number of features I of the input.
        hidden_size: number of features H of the hidden state.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        device: where the parameters are created.
        dtype: data type of the parameters, one of those of `FusedRNN`.
        nonlinearity: as in `FusedGRU`; so is ``gate_nonlinearity``.

    Parameters: ``weight_ih`` ``(3 * H, I)``, ``weight_hh`` ``(3 * H, H)``, ``bias_ih`` and
    ``bias_hh`` ``(3 * H,)``, with the gates in the order of `FusedGRU`.

    Example:
        >>> import torch
        >>> cell = FusedGRUCell(3, 5)
        >>> cell(torch.zeros(2, 3)).shape
        torch.Size([2, 5])

    """

    _torch_class = nn.GRUCell

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return the state after one step from ``hx``; for shapes and errors see the class."""
        if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
            if hx is None:
                hx = input.new_zeros(list(input.shape[:-1]) + [self.hidden_size])  # noqa: RUF005
            self._check_hx_shape(hx, input, "hx")
            rows = (input.view(-1, self.input_size), hx.view(-1, self.hidden_size))
            weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
            return torch.gru_cell(*rows, *weights).view(hx.shape)
        else:  # noqa: RET505 (TorchScript would compile what just follows)
            return super().forward(input, hx)

    _kind = "gru"


class FusedLSTMCell(HiddenAndCellState, _GatedCell):
    r"""One step of a long short-term memory; a drop-in for :class:`torch.nn.LSTMCell`.

    The formula is that of :class:`FusedLSTM`; where a step runs natively, and where it is plain
    PyTorch, is as in `FusedRNNCell`.

    Args:
        input_size: number of features I of the input.
        hidden_size: number of features H of the hidden and of the cell state.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        device: where the parameters are created.
        dtype: data type of the parameters, one of those of `FusedRNN`.
        nonlinearity: as in `FusedLSTM`; so is ``gate_nonlinearity``.

    Inputs:
        input: ``(B, I)`` or ``(I,)``.
        hx: the previous states ``(h, c)``, each ``(B, H)`` or ``(H,)``; zeros by default.

    Output:
        The next states ``(h, c)``.

    Parameters: ``weight_ih`` ``(4 * H, I)``, ``weight_hh`` ``(4 * H, H)``, ``bias_ih`` and
    ``bias_hh`` ``(4 * H,)``, with the gates in the order of `FusedLSTM`.

    Raises:
        TypeError: as in `FusedRNNCell`; or ``hx`` is not a pair of tensors.
        ValueError, RuntimeError: as in `FusedRNNCell`.

    Example:
        >>> import torch
        >>> cell = FusedLSTMCell(3, 5)
        >>> h, c = cell(torch.zeros(2, 3))
        >>> h.shape, c.shape
        (torch.Size([2, 5]), torch.Size([2, 5]))

    """

    _torch_class = nn.LSTMCell

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the states after one step from ``hx``; for shapes and errors see the class."""
        if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
            if hx is None:
                zeros = input.new_zeros(list(input.shape[:-1]) + [self.hidden_size])  # noqa: RUF005
                hx = (zeros, zeros)
            self._check_hx_shape(hx[0], input, "hx[0]")
            self._check_hx_shape(hx[1], input, "hx[1]")
            states = [hx[0].view(-1, self.hidden_size), hx[1].view(-1, self.hidden_size)]
            weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
            h, c = torch.lstm_cell(input.view(-1, self.input_size), states, *weights)
            return h.view(hx[0].shape), c.view(hx[1].shape)
        else:  # noqa: RET505 (TorchScript would compile what just follows)
            return super().forward(input, hx)

    _kind = "lstm"
