"""`FusedRNN`: what ``torch.nn.RNN`` does, on the fused recurrence.

Shape legend: T time steps, B batch, I input size, H hidden size, L layers, D directions,
N = sum(batch_sizes) packed rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnn_cuda import autocast, export
from rnn_cuda.arguments import (
    check_bool,
    check_dense,
    check_dropout,
    check_dtype,
    check_hx_placement,
    check_input_placement,
    check_int,
    check_nonlinearity,
    check_positive_int,
    check_tensor,
    type_name,
)
from rnn_cuda.cells import Cell, cell_named
from rnn_cuda.functional import layer
from rnn_cuda.rebuild import TORCH_NONLINEARITIES, parameter_copier, rebuild
from rnn_cuda.recording import RecurrentCall, Tap, recorders


def read_weights(module: nn.Module, names: Sequence[str]) -> list[Any]:
    """Return the weights of these names, each read once: a parametrized one is computed by that."""
    # Module.__getattr__ would look for a parameter in several places. It still finds those that
    # are none any more: parametrized, pruned, weight-normalised.
    registered: dict[str, Any] = module._parameters
    return [
        registered[name] if name in registered else _unregistered_weight(module, name)
        for name in names
    ]


def _unregistered_weight(module: nn.Module, name: str) -> Any:
    weight = getattr(module, name, _MISSING)
    if weight is _MISSING:
        # Not an AttributeError, of which a property such as all_weights would get the blame.
        raise RuntimeError(
            f"{name}: expected a weight of this name in {type_name(module)}, got none"
        )
    return weight


_MISSING = object()


class ElmanStack(export.ScriptMethods, nn.Module):
    """Layers and directions of Elman cells, with the interface of :class:`torch.nn.RNN`.

    Arguments, inputs, outputs and parameters are those that `FusedRNN` documents; a subclass says
    how one layer runs over a sequence.
    """

    # A plain Module rather than an nn.RNNBase: the base class keeps a second, flat list of the
    # weights that must be kept in step with the parameters. Here the parameters are read by name at
    # every forward pass, so parametrizations, pruning and functional_call work with nothing to
    # synchronise. The price: isinstance(module, nn.RNNBase) is False.

    # What TorchScript asks a module for; other code reads it too.
    __constants__: ClassVar[list[str]] = [*nn.RNNBase.__constants__, "nonlinearity"]
    __jit_unused_properties__: ClassVar[list[str]] = [
        *nn.RNNBase.__jit_unused_properties__,
        "mode",
        "proj_size",
        "_num_directions",
        "_output_size",
        "_all_weights",
        "_flat_weights_names",
        "_flat_weights",
    ]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: None = None,
    ) -> None:
        super().__init__()
        if proj_size is not None:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        self.input_size = check_positive_int("input_size", input_size)
        self.hidden_size = check_positive_int("hidden_size", hidden_size)
        self.num_layers = check_positive_int("num_layers", num_layers)
        self.nonlinearity = check_nonlinearity(nonlinearity)
        self.bias = check_bool("bias", bias)
        self.batch_first = check_bool("batch_first", batch_first)
        self.dropout = check_dropout(dropout)
        self.bidirectional = _check_bidirectional(bidirectional)
        check_dtype(dtype, self.nonlinearity)
        if self.dropout > 0 and self.num_layers == 1:
            warnings.warn(
                f"dropout={dropout} has no effect with num_layers=1: dropout is applied to the "
                "output of every layer but the last",
                stacklevel=2,
            )

        # The parameter names of each layer and direction, in the order of ``hx``.
        kinds = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if self.bias else [])
        suffixes = ["", "_reverse"][: self._num_directions]
        self._weight_names = [
            [f"{kind}_l{layer}{suffix}" for kind in kinds]
            for layer in range(self.num_layers)
            for suffix in suffixes
        ]
        for index, names in enumerate(self._weight_names):
            layer_input = self.input_size if index < self._num_directions else self._output_size
            hidden = self.hidden_size
            shapes = [(hidden, layer_input), (hidden, hidden)]
            shapes += [(hidden,), (hidden,)] if self.bias else []
            for name, shape in zip(names, shapes, strict=True):
                setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @property
    def mode(self) -> str:
        """The name that ``nn.RNN`` gives its kind, such as ``"RNN_TANH"``."""
        return f"RNN_{self.nonlinearity.upper()}"

    @property
    def proj_size(self) -> int:
        """Zero: only an LSTM has projections."""
        return 0

    @property
    def _num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _output_size(self) -> int:
        return self._num_directions * self.hidden_size

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The weights of each layer and direction: ``[weight_ih, weight_hh, bias_ih, bias_hh]``."""
        return [read_weights(self, names) for names in self._weight_names]

    def reset_parameters(self) -> None:
        """Draw every parameter anew from ``U(-1/sqrt(H), 1/sqrt(H))``, in order of creation."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        """Return the arguments that differ from their defaults, as ``nn.RNN`` does."""
        options = [f"{self.input_size}, {self.hidden_size}"]
        # nn.RNN never shows its nonlinearity, so only those that it does not have are added.
        if self.nonlinearity not in TORCH_NONLINEARITIES:
            options.append(f"nonlinearity={self.nonlinearity}")
        defaults = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0,
            "bidirectional": False,
        }
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default:
                options.append(f"{name}={value}")
        return ", ".join(options)

    # ---- what code written for nn.RNN reads and calls besides ------------------------------------

    def flatten_parameters(self) -> None:
        """Do nothing: the kernels need no flat copy of the weights (kept for ``nn.RNN`` code)."""

    def _init_flat_weights(self) -> None:
        """Do nothing, as weights are read by name; so does `_update_flat_weights`."""

    def _update_flat_weights(self) -> None:
        pass

    def _weights_have_changed(self) -> bool:
        return False  # in the sense that something had to be brought up to date

    @property
    def _all_weights(self) -> list[list[str]]:
        return [list(names) for names in self._weight_names]

    @property
    def _flat_weights_names(self) -> list[str]:
        return [name for names in self._weight_names for name in names]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return _FlatWeights(self)

    @_flat_weights.setter
    def _flat_weights(self, weights: Sequence[Tensor]) -> None:
        for name, weight in zip(self._flat_weights_names, weights, strict=True):
            _set_weight(self, name, weight)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise what ``torch.nn.RNN`` does unless dtype, dimensions and features of input fit."""
        weight = read_weights(self, self._weight_names[0][:1])[0]
        if not torch._C._is_any_autocast_enabled():
            check_input_placement(input, weight)
        expected = 3 if batch_sizes is None else 2
        if input.dim() != expected:
            raise RuntimeError(f"input must have {expected} dimensions, got {input.dim()}")
        if input.shape[-1] != self.input_size:
            self._refuse_features(input)

    def get_expected_hidden_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """Return the shape ``(L * D, B, H)`` of ``hx`` for an input as the caller gives it."""
        if batch_sizes is not None:
            batch = int(batch_sizes[0])
        else:
            batch = input.size(0 if self.batch_first else 1)
        return len(self._weight_names), batch, self.hidden_size

    def check_hidden_size(
        self,
        hx: Tensor,
        expected_hidden_size: tuple[int, int, int],
        msg: str = "Expected hidden size {}, got {}",
    ) -> None:
        """Raise RuntimeError with ``msg`` unless ``hx`` has the expected shape."""
        if hx.size() != expected_hidden_size:
            raise RuntimeError(msg.format(expected_hidden_size, list(hx.size())))

    def check_forward_args(self, input: Tensor, hidden: Tensor, batch_sizes: Tensor | None) -> None:
        """Check input and hidden state as ``torch.nn.RNN`` does, and raise what it raises."""
        self.check_input(input, batch_sizes)
        self.check_hidden_size(hidden, self.get_expected_hidden_size(input, batch_sizes))

    def permute_hidden(self, hx: Tensor, permutation: Tensor | None) -> Tensor:
        """Return ``hx`` with its samples in the order of ``permutation``."""
        return hx if permutation is None else hx.index_select(1, permutation)

    # ---- the forward pass ------------------------------------------------------------------------

    @overload
    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the layers over ``input`` from the state ``hx``; shapes and errors: see the class."""
        if hx is None or isinstance(hx, Tensor):
            if isinstance(input, Tensor):
                return self._forward_dense(input, hx)
            if isinstance(input, PackedSequence):
                return self._forward_packed(input, hx)
        if export.has_fx_proxy(input, hx):
            return export.fx_node(self, ElmanStack.forward, input, hx)
        if hx is not None:
            check_tensor("hx", hx)
        raise TypeError(f"input should be a Tensor or a PackedSequence, got: {type_name(input)}")

    def _forward_dense(self, input: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor]:
        if input.layout is not torch.strided or input.is_nested:
            check_dense("input", input)
        dim = input.dim()
        if dim not in (2, 3):
            raise ValueError(f"RNN: Expected input to be 2D or 3D, got {dim}D tensor instead")
        batched = dim == 3
        # From here on the sequence is (T, B, I), and hx is (L * D, B, H).
        if not batched:
            input = input.unsqueeze(1)
        elif self.batch_first:
            input = input.transpose(0, 1)
        if input.shape[0] == 0:
            raise RuntimeError(
                "Expected sequence length to be larger than 0 in RNN, got input of 0"
            )
        if hx is not None:
            self._check_hx_shape(hx, (input.shape[1],) if batched else ())
            if not batched:
                hx = hx.unsqueeze(1)

        output, h_n = self._run_layers(input, hx, None)

        if not batched:
            return output.squeeze(1), h_n.squeeze(1)
        return (output.transpose(0, 1) if self.batch_first else output), h_n

    def _forward_packed(
        self, input: PackedSequence, hx: Tensor | None
    ) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        export.check_packed(batch_sizes)
        if data.layout is not torch.strided or data.is_nested:
            check_dense("input.data", data)
        if data.dim() != 2:
            raise RuntimeError(f"input.data must have 2 dimensions, (N, I), got {data.dim()}")
        if batch_sizes.shape[0] == 0:
            raise RuntimeError(
                "Expected sequence length to be larger than 0 in RNN, got no batch_sizes in input"
            )
        # The caller's hx is in the order of the samples, the packed rows in order of length.
        if hx is not None:
            # Where batch_sizes cannot be read, what runs later checks against them.
            unread = torch.compiler.is_compiling() or export.is_leaving(data)
            batch = hx.shape[1] if unread else int(batch_sizes[0])
            self._check_hx_shape(hx, (batch,))
            hx = hx if sorted_indices is None else hx.index_select(1, sorted_indices)

        output, h_n = self._run_layers(data, hx, batch_sizes, unsorted_indices)

        h_n = h_n if unsorted_indices is None else h_n.index_select(1, unsorted_indices)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n

    def _run_layers(
        self,
        sequence: Tensor,
        hx: Tensor | None,
        batch_sizes: Tensor | None,
        unsorted_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run every layer and direction; ``sequence`` is ``(T, B, I)``, or ``(N, I)`` packed."""
        weights = self.all_weights  # once: reading a parametrized weight computes it
        device_type = sequence.device.type
        dtype = autocast.active_dtype(device_type)
        if dtype is None:
            return self._compute(sequence, hx, weights, batch_sizes, unsorted_indices)
        weights = [[autocast.cast(w, dtype) for w in group] for group in weights]
        sequence, hx = autocast.cast(sequence, dtype), autocast.cast(hx, dtype)
        with autocast.disabled(device_type, dtype):
            return self._compute(sequence, hx, weights, batch_sizes, unsorted_indices)

    def _compute(
        self,
        sequence: Tensor,
        hx: Tensor | None,
        weights: list[list[Tensor]],
        batch_sizes: Tensor | None,
        unsorted_indices: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        self._check_fit(sequence, hx, weights[0][0])
        if export.is_leaving(sequence):
            return export.trace_layers(self, sequence, hx, weights, batch_sizes)
        call = None
        if recorders and not torch.compiler.is_compiling():
            call = self._call_to_record(sequence, hx, weights, batch_sizes, unsorted_indices)
        elif recorders and getattr(self._compiled_call_impl, "is_recording", False):
            raise RuntimeError("GradientFlow cannot record a call in a graph of torch.compile")
        elif self.num_layers == 1:
            # As below, in less Python: over a short sequence it is most of the time.
            return self._layer(sequence, hx, weights, batch_sizes)
        final_states = []
        for index in range(self.num_layers):
            its = slice(index * self._num_directions, (index + 1) * self._num_directions)
            h0 = None if hx is None else hx[its]
            tap = {} if call is None or call.taps is None else {"tap": call.taps[index]}
            sequence, h_n = self._layer(sequence, h0, weights[its], batch_sizes, **tap)
            final_states.append(h_n)
            if self.dropout and index + 1 < self.num_layers:
                sequence = nn.functional.dropout(sequence, self.dropout, self.training)
        results: Any = sequence, torch.cat(final_states)
        if call is not None:
            for recorder in recorders:
                results = recorder.record(call, results)
        return results

    def _call_to_record(
        self,
        sequence: Tensor,
        hx: Tensor | None,
        weights: list[list[Tensor]],
        batch_sizes: Tensor | None,
        unsorted_indices: Tensor | None,
    ) -> RecurrentCall:
        dropout = self.dropout if self.training and self.num_layers > 1 else 0.0
        return RecurrentCall(
            module=self,
            cell=self._cell(),
            input=sequence,
            h0=hx,
            c0=None,
            weights=weights,
            bidirectional=self._num_directions == 2,
            has_biases=self.bias,
            training=self.training,
            dropout=dropout,
            batch_sizes=batch_sizes,
            unsorted_indices=unsorted_indices,
            random_state=torch.get_rng_state() if dropout else None,
            taps=self._taps(),
        )

    def _taps(self) -> list[Tap] | None:
        """Return one for each layer if `_layer` takes any."""
        return None

    def _layer(
        self,
        sequence: Tensor,
        h0: Tensor | None,
        weights: Sequence[list[Tensor]],
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run one layer; arguments and results are those of `functional.layer`."""
        raise NotImplementedError

    def _cell(self) -> Cell:
        """Return the cell; see `rnn_cuda.cells.cell_of`."""
        return cell_named(f"elman.{self.nonlinearity}")

    # TorchScript, which knows no cells, compiles these two.

    def _coefficients(self) -> tuple[float, float]:
        """Return keep and rate of ``h_t = keep h_{t-1} + rate f(W x_t + A h_{t-1} + b)``."""
        return 0.0, 1.0

    def _recurrent_matrix(self, weight_hh: Tensor) -> Tensor:
        """Return A."""
        return weight_hh

    def _check_hx_shape(self, hx: Tensor, batch: tuple[int, ...]) -> None:
        """Check ``hx`` against ``(L * D, *batch, H)``; ``batch`` is empty for unbatched input."""
        if hx.layout is not torch.strided or hx.is_nested:
            check_dense("hx", hx)
        expected = (len(self._weight_names), *batch, self.hidden_size)
        if hx.shape != expected:
            kind = "batched" if batch else "unbatched"
            axes = ["num_layers * directions", *(["batch"] if batch else []), "hidden_size"]
            raise RuntimeError(
                f"Expected hidden size {expected} of hx for {kind} input, ({', '.join(axes)}), "
                f"got {tuple(hx.shape)}"
            )

    def _check_fit(self, input: Tensor, hx: Tensor | None, weight: Tensor) -> None:
        """Check features, devices and dtypes of input and ``hx`` against the first weight."""
        if input.shape[-1] != self.input_size:
            self._refuse_features(input)
        if weight is None:  # setting a parameter to None is allowed
            check_tensor("weight_ih_l0", weight)
        check_input_placement(input, weight)
        if hx is not None:
            check_hx_placement(hx, input)

    def _refuse_features(self, input: Tensor) -> NoReturn:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {self.input_size}, got {input.shape[-1]}"
        )


class _FlatWeights(list[Any]):
    """What ``nn.RNN._flat_weights`` is: every weight; one that is set in here is the layer's."""

    def __init__(self, module: ElmanStack) -> None:
        super().__init__(weight for group in module.all_weights for weight in group)
        self._module = module

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        self._module._flat_weights = self


def _set_weight(module: nn.Module, name: str, weight: Any) -> None:
    # Weight dropping puts plain tensors in the place of parameters, which setattr would refuse.
    if name in module._parameters:
        module._parameters[name] = weight
    else:
        setattr(module, name, weight)


def _check_bidirectional(value: object) -> bool:
    # nn.RNN takes any value here: 0 and 1 are in use, anything else is a mistake.
    try:
        number = check_int("bidirectional", value)
    except TypeError:
        return check_bool("bidirectional", value)
    if number not in (0, 1):
        raise TypeError(f"bidirectional should be of type bool, got: {number}")
    return bool(number)


class FusedRNN(ElmanStack):
    r"""Multi-layer Elman RNN; a drop-in for :class:`torch.nn.RNN`.

    Each layer and direction computes, for every time step,

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Arguments, parameter names, initialisation, ``state_dict`` and results are those of
    ``torch.nn.RNN``. Beyond it: two more nonlinearities, derivatives of any order, and a backward
    pass in eval mode on every device.

    Two differences: it is not an instance of ``nn.RNNBase``, and ``output`` must not be modified in
    place before the backward pass, which reads the states from it (autograd raises if it was).
    ``docs/limitations.md`` lists what it does not do.

    Args:
        input_size: number of features I of the input.
        hidden_size: number of features H of the hidden state.
        num_layers: number of stacked layers L.
        nonlinearity: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        batch_first: whether dense batched input and output are ``(B, T, features)`` instead of
            ``(T, B, features)``; unbatched and packed sequences and hidden states are not affected.
        dropout: probability of dropping each output of every layer but the last, in training.
        bidirectional: whether a second direction runs from the last time step to the first (D = 2).
        device: where the parameters are created.
        dtype: data type of the parameters: float32, float64, bfloat16 or float16; complex64 and
            complex128 are computed by the reference.
        proj_size: refused as ``torch.nn.RNN`` refuses it; only an LSTM has projections.

    Inputs:
        input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(T, I)`` for one unbatched
            sequence, or a :class:`~torch.nn.utils.rnn.PackedSequence`.
        hx: initial states, ``(L * D, B, H)``, or ``(L * D, H)`` if unbatched; zeros by default.

    Outputs:
        output: the last layer's hidden state at every step, shaped as the input with D * H features
            (packed if the input was).
        h_n: the final hidden state of every layer and direction, shaped as ``hx``.

    Parameters of layer k (direction 1 has the suffix ``_reverse``): ``weight_ih_l{k}`` of shape
    ``(H, I)``, or ``(H, D * H)`` above the first layer, ``weight_hh_l{k}`` ``(H, H)``,
    ``bias_ih_l{k}`` and ``bias_hh_l{k}`` ``(H,)``; all drawn uniformly from
    :math:`(-1/\sqrt{H}, 1/\sqrt{H})`.

    Raises:
        TypeError: an argument, the input or ``hx`` is of the wrong type.
        ValueError: an argument is out of range, the input has not 2 or 3 dimensions, or its dtype
            is not that of the parameters.
        RuntimeError: ``dtype`` is not one of these; or the input's features, its length (0), its
            device, or the shape, dtype or device of ``hx`` do not fit.

    Example:
        >>> import torch
        >>> rnn = FusedRNN(input_size=3, hidden_size=5, num_layers=2, bidirectional=True)
        >>> output, h_n = rnn(torch.zeros(7, 2, 3))  # 7 time steps, 2 samples, 3 features
        >>> output.shape, h_n.shape
        (torch.Size([7, 2, 10]), torch.Size([4, 2, 5]))
        >>> same = torch.nn.RNN(3, 5, num_layers=2, bidirectional=True)
        >>> same.load_state_dict(rnn.state_dict())
        <All keys matched successfully>

    """

    def _layer(
        self,
        sequence: Tensor,
        h0: Tensor | None,
        weights: Sequence[list[Tensor]],
        batch_sizes: Tensor | None,
        tap: Tap | None = None,
    ) -> tuple[Tensor, Tensor]:
        return layer(
            sequence,
            h0,
            weights,
            nonlinearity=self.nonlinearity,
            direction="both" if self.bidirectional else "forward",
            batch_sizes=batch_sizes,
            tap=tap,
        )

    def _taps(self) -> list[Tap] | None:
        if type(self)._layer is not FusedRNN._layer:  # a subclass has another recurrence
            return None
        return [Tap() for _ in range(self.num_layers)]

    @classmethod
    def from_torch(cls, rnn: nn.RNN) -> FusedRNN:
        """Return a FusedRNN with copies of the parameters of ``rnn``.

        Configuration, dtype, device, ``requires_grad`` and training mode are those of ``rnn``, and
        parameters that it shares between layers stay shared; hooks are not taken over.

        Raises:
            TypeError: ``rnn`` is not an ``nn.RNN`` (an LSTM or a GRU, for instance).
            ValueError: a parameter of ``rnn`` is parametrized, pruned or weight-normalised.

        """
        if not isinstance(rnn, nn.RNN):
            raise TypeError(f"rnn must be a torch.nn.RNN, got {type_name(rnn)}")
        return rebuild(rnn, cls, parameter_copier())

    def to_torch(self) -> nn.RNN:
        """Return a ``torch.nn.RNN`` with copies of the parameters; see :meth:`from_torch`.

        Raises:
            ValueError: ``nn.RNN`` has no such nonlinearity, or a parameter is parametrized, pruned
                or weight-normalised.

        """
        if self.nonlinearity not in TORCH_NONLINEARITIES:
            raise ValueError(
                f"nonlinearity must be 'tanh' or 'relu' for torch.nn.RNN, got {self.nonlinearity!r}"
            )
        return rebuild(self, nn.RNN, parameter_copier())
