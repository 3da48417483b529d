"""Layers and directions of a cell, with the interface of torch's recurrent modules.

Shape legend: T time steps, B batch, I input size, H hidden size, L layers, D directions,
N = sum(batch_sizes) packed rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnn_cuda import autocast, export
from rnn_cuda.arguments import (
    check_bool,
    check_dense,
    check_dropout,
    check_hx_placement,
    check_input_placement,
    check_int,
    check_nonlinearity,
    check_positive_int,
    check_tensor,
    type_name,
)
from rnn_cuda.cells import Cell, State, cell_named
from rnn_cuda.cells.elman import GATED_NONLINEARITIES, TORCH_GATED_NONLINEARITIES, gated_name
from rnn_cuda.functional import layer
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


class HiddenState:
    """How a module is given its state and gives it back: h alone is a tensor."""

    def _states_of(self, hx: Any) -> State | None:
        """Return the states that ``hx`` gives, nothing for zeros; None if it is no such thing."""
        if hx is None:
            return ()
        return (hx,) if isinstance(hx, Tensor) else None

    def _hx_of(self, states: Sequence[Tensor]) -> Any:
        """Return states as the caller is given them."""
        return states[0]

    def _state_names(self, hx: str) -> tuple[str, ...]:
        """Return the names of the states if those of all are ``hx``."""
        return (hx,)

    def _refuse_hx(self, hx: object) -> NoReturn:
        """Raise what is wrong with the type of ``hx``."""
        raise TypeError(f"hx should be a Tensor, got: {type_name(hx)}")


class HiddenAndCellState(HiddenState):
    """The same of h and c, which are a pair."""

    def _states_of(self, hx: Any) -> State | None:
        if hx is None:
            return ()
        is_pair = isinstance(hx, tuple | list) and len(hx) == 2
        return tuple(hx) if is_pair and all(isinstance(part, Tensor) for part in hx) else None

    def _hx_of(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(states)

    def _state_names(self, hx: str) -> tuple[str, ...]:
        return f"{hx}[0]", f"{hx}[1]"

    def _refuse_hx(self, hx: object) -> NoReturn:
        if not isinstance(hx, tuple | list):
            raise TypeError(f"hx should be a tuple (h_0, c_0) of Tensors, got: {type_name(hx)}")
        if len(hx) != 2:
            raise TypeError(f"hx should be a tuple (h_0, c_0) of Tensors, got {len(hx)} items")
        for name, state in zip(self._state_names("hx"), hx, strict=True):
            check_tensor(name, state)
        raise AssertionError("hx is a pair of tensors")


class GatedFunctions:
    """What a gated layer and its cell have beside torch's: the functions of the cell."""

    _kind: ClassVar[str]
    """The cell's name without its functions."""
    nonlinearity, gate_nonlinearity = TORCH_GATED_NONLINEARITIES

    def _choose_functions(self, nonlinearity: object, gate_nonlinearity: object) -> None:
        known = GATED_NONLINEARITIES
        self.nonlinearity = check_nonlinearity(nonlinearity, known)
        self.gate_nonlinearity = check_nonlinearity(gate_nonlinearity, known, "gate_nonlinearity")

    def _functions_are_torchs(self) -> bool:
        return (self.nonlinearity, self.gate_nonlinearity) == TORCH_GATED_NONLINEARITIES

    def _other_functions(self) -> list[str]:
        """Return those that are not torch's, for ``extra_repr``."""
        names = ("nonlinearity", "gate_nonlinearity")
        return [
            f"{name}={getattr(self, name)}"
            for name, torchs in zip(names, TORCH_GATED_NONLINEARITIES, strict=True)
            if getattr(self, name) != torchs
        ]

    @property
    def _cell_name(self) -> str:
        return gated_name(self._kind, self.nonlinearity, self.gate_nonlinearity)


class RecurrentStack(HiddenState, nn.Module):
    """Layers and directions of one cell, with the interface of torch's module for it.

    Arguments, inputs, outputs and parameters are those that `FusedRNN`, `FusedGRU` and `FusedLSTM`
    document; a subclass says which cell.
    """

    # A plain Module rather than an nn.RNNBase: the base class keeps a second, flat list of the
    # weights that must be kept in step with the parameters. Here the parameters are read by name at
    # every forward pass, so parametrizations, pruning and functional_call work with nothing to
    # synchronise. The price: isinstance(module, nn.RNNBase) is False.

    _torch_class: ClassVar[type[nn.RNNBase]]
    """Torch's module of the same cell."""
    recompute = False

    # What TorchScript asks a module for; other code reads it too.
    __constants__: ClassVar[list[str]] = nn.RNNBase.__constants__
    __jit_unused_properties__: ClassVar[list[str]] = [
        *nn.RNNBase.__jit_unused_properties__,
        "mode",
        "proj_size",
        "_cell_name",
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
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
        *,
        cell: Cell,
    ) -> None:
        super().__init__()
        self.input_size = check_positive_int("input_size", input_size)
        self.hidden_size = check_positive_int("hidden_size", hidden_size)
        self.num_layers = check_positive_int("num_layers", num_layers)
        self.bias = check_bool("bias", bias)
        self.batch_first = check_bool("batch_first", batch_first)
        self.dropout = check_dropout(dropout)
        self.bidirectional = _check_bidirectional(bidirectional)
        if self.dropout > 0 and self.num_layers == 1:
            warnings.warn(
                f"dropout={dropout} has no effect with num_layers=1: dropout is applied to the "
                "output of every layer but the last",
                stacklevel=3,
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
            rows = cell.blocks * self.hidden_size
            shapes = [(rows, layer_input), (rows, self.hidden_size)]
            shapes += [(rows,), (rows,)] if self.bias else []
            for name, shape in zip(names, shapes, strict=True):
                setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @property
    def mode(self) -> str:
        """The name that torch gives this kind, such as ``"RNN_TANH"`` or ``"LSTM"``."""
        return self._torch_class.__name__

    @property
    def proj_size(self) -> int:
        """Zero: h_t is not projected."""
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
        """Return the arguments that differ from their defaults, as torch's module does."""
        options = [f"{self.input_size}, {self.hidden_size}", *self._more_repr()]
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

    def _more_repr(self) -> list[str]:
        """Return what `extra_repr` is to show behind the sizes."""
        return []

    # ---- what code written for torch's modules reads and calls besides ---------------------------

    def flatten_parameters(self) -> None:
        """Do nothing: the kernels need no flat copy of the weights (code calls it)."""

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
        """Raise what torch does unless dtype, dimensions and features of input fit."""
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

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """Check input and states as torch's module does, and raise what it raises."""
        self.check_input(input, batch_sizes)
        expected = self.get_expected_hidden_size(input, batch_sizes)
        states = self._states_of(hidden) or ()
        for name, state in zip(self._state_names("hidden"), states, strict=True):
            self.check_hidden_size(state, expected, f"Expected {name} size {{}}, got {{}}")

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """Return ``hx`` with its samples in the order of ``permutation``."""
        if permutation is None:
            return hx
        states = self._states_of(hx) or ()
        return self._hx_of(tuple(state.index_select(1, permutation) for state in states))

    # ---- the forward pass ------------------------------------------------------------------------

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Run the layers over ``input`` from the state ``hx``; shapes and errors: see the class."""
        states = () if hx is None else self._states_of(hx)
        if states is not None:
            if isinstance(input, Tensor):
                return self._forward_dense(input, states)
            if isinstance(input, PackedSequence):
                return self._forward_packed(input, states)
        if export.has_fx_proxy(input, hx):
            return export.fx_node(self, input, hx)
        if states is None:
            self._refuse_hx(hx)
        raise TypeError(f"input should be a Tensor or a PackedSequence, got: {type_name(input)}")

    def _forward_dense(self, input: Tensor, states: State) -> tuple[Tensor, Any]:
        if input.layout is not torch.strided or input.is_nested:
            check_dense("input", input)
        dim = input.dim()
        if dim not in (2, 3):
            kind = self._torch_class.__name__
            raise ValueError(f"{kind}: Expected input to be 2D or 3D, got {dim}D tensor instead")
        batched = dim == 3
        # From here on the sequence is (T, B, I), and states are (L * D, B, H).
        if not batched:
            input = input.unsqueeze(1)
        elif self.batch_first:
            input = input.transpose(0, 1)
        if input.shape[0] == 0:
            raise RuntimeError(
                "Expected sequence length to be larger than 0 in RNN, got input of 0"
            )
        if states:
            self._check_states_shape(states, (input.shape[1],) if batched else ())
            if not batched:
                states = tuple(state.unsqueeze(1) for state in states)

        output, *finals = self._run_layers(input, states, None)

        if not batched:
            return output.squeeze(1), self._hx_of([state.squeeze(1) for state in finals])
        return (output.transpose(0, 1) if self.batch_first else output), self._hx_of(finals)

    def _forward_packed(self, input: PackedSequence, states: State) -> tuple[PackedSequence, Any]:
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
        # The caller's states are in the order of the samples, the packed rows in order of length.
        if states:
            # Where batch_sizes cannot be read, what runs later checks against them.
            unread = torch.compiler.is_compiling() or export.is_leaving(data)
            batch = states[0].shape[1] if unread else int(batch_sizes[0])
            self._check_states_shape(states, (batch,))
            if sorted_indices is not None:
                states = tuple(state.index_select(1, sorted_indices) for state in states)

        output, *finals = self._run_layers(data, states, batch_sizes, unsorted_indices)

        if unsorted_indices is not None:
            finals = [state.index_select(1, unsorted_indices) for state in finals]
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self._hx_of(finals)

    def _run_layers(
        self,
        sequence: Tensor,
        states: State,
        batch_sizes: Tensor | None,
        unsorted_indices: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run every layer and direction; ``sequence`` is ``(T, B, I)``, or ``(N, I)`` packed."""
        weights = self.all_weights  # once: reading a parametrized weight computes it
        device_type = sequence.device.type
        dtype = autocast.active_dtype(device_type)
        if dtype is None:
            return self._compute(sequence, states, weights, batch_sizes, unsorted_indices)
        weights = [[autocast.cast(w, dtype) for w in group] for group in weights]
        sequence = autocast.cast(sequence, dtype)
        states = tuple(autocast.cast(state, dtype) for state in states)
        with autocast.disabled(device_type, dtype):
            return self._compute(sequence, states, weights, batch_sizes, unsorted_indices)

    def _compute(
        self,
        sequence: Tensor,
        states: State,
        weights: list[list[Tensor]],
        batch_sizes: Tensor | None,
        unsorted_indices: Tensor | None,
    ) -> tuple[Tensor, ...]:
        self._check_fit(sequence, states, weights[0][0])
        if export.is_leaving(sequence):
            self._check_leaving()
            return self._trace_layers(sequence, states, weights, batch_sizes)
        call = None
        if recorders and not torch.compiler.is_compiling():
            call = self._call_to_record(sequence, states, weights, batch_sizes, unsorted_indices)
        elif recorders and getattr(self._compiled_call_impl, "is_recording", False):
            raise RuntimeError("GradientFlow cannot record a call in a graph of torch.compile")
        elif self.num_layers == 1:
            # As below, in less Python: over a short sequence it is most of the time.
            return self._layer(sequence, states, weights, batch_sizes)
        final_states = []
        for index in range(self.num_layers):
            its = slice(index * self._num_directions, (index + 1) * self._num_directions)
            starts = tuple(state[its] for state in states)
            tap: Any = {} if call is None or call.taps is None else {"tap": call.taps[index]}
            sequence, *finals = self._layer(sequence, starts, weights[its], batch_sizes, **tap)
            final_states.append(finals)
            if self.dropout and index + 1 < self.num_layers:
                sequence = nn.functional.dropout(sequence, self.dropout, self.training)
        results = sequence, *map(torch.cat, zip(*final_states, strict=True))
        if call is not None:
            for recorder in recorders:
                results = recorder.record(call, results)
        return results

    def _call_to_record(
        self,
        sequence: Tensor,
        states: State,
        weights: list[list[Tensor]],
        batch_sizes: Tensor | None,
        unsorted_indices: Tensor | None,
    ) -> RecurrentCall:
        dropout = self.dropout if self.training and self.num_layers > 1 else 0.0
        h0, c0 = (*states, None, None)[:2]
        return RecurrentCall(
            module=self,
            cell=self._cell(),
            input=sequence,
            h0=h0,
            c0=c0,
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
        """Return one for each layer if `_layer` takes any: this package's does."""
        if not type(self)._layer.__module__.startswith("rnn_cuda."):  # it may be another recurrence
            return None
        return [Tap() for _ in range(self.num_layers)]

    def _layer(
        self,
        sequence: Tensor,
        states: State,
        weights: Sequence[list[Tensor]],
        batch_sizes: Tensor | None,
        tap: Tap | None = None,
        constants: Sequence[tuple[Tensor | float, ...]] = (),
    ) -> tuple[Tensor, ...]:
        """Run one layer; arguments and results are those of `functional.layer`."""
        return layer(
            sequence,
            states,
            weights,
            cell=self._cell_name,
            direction="both" if self.bidirectional else "forward",
            batch_sizes=batch_sizes,
            recompute=self.recompute,
            constants=constants,
            tap=tap,
        )

    def _check_leaving(self) -> None:
        """Raise NotImplementedError if no other operators than the kernels compute this."""

    def _trace_layers(
        self,
        sequence: Tensor,
        states: State,
        weights: list[list[Tensor]],
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Run all layers where `export.is_leaving`."""
        raise NotImplementedError

    @property
    def _cell_name(self) -> str:
        """What the operators call the cell."""
        raise NotImplementedError

    def _cell(self) -> Cell:
        """Return the cell; see `rnn_cuda.cells.cell_of`."""
        return cell_named(self._cell_name)

    def _check_states_shape(self, states: State, batch: tuple[int, ...]) -> None:
        """Check states against ``(L * D, *batch, H)``; ``batch`` is empty for unbatched input."""
        expected = (len(self._weight_names), *batch, self.hidden_size)
        for i, state in enumerate(states):
            if state.layout is not torch.strided or state.is_nested:
                check_dense(self._state_names("hx")[i], state)
            if state.shape != expected:
                kind = "batched" if batch else "unbatched"
                axes = ["num_layers * directions", *(["batch"] if batch else []), "hidden_size"]
                raise RuntimeError(
                    f"Expected hidden size {expected} of {self._state_names('hx')[i]} for {kind} "
                    f"input, ({', '.join(axes)}), got {tuple(state.shape)}"
                )

    def _check_fit(self, input: Tensor, states: State, weight: Tensor) -> None:
        """Check features, devices and dtypes of input and states against the first weight."""
        if input.shape[-1] != self.input_size:
            self._refuse_features(input)
        if weight is None:  # setting a parameter to None is allowed
            check_tensor("weight_ih_l0", weight)
        check_input_placement(input, weight)
        for i, state in enumerate(states):
            check_hx_placement(state, input, self._state_names("hx")[i])

    def _refuse_features(self, input: Tensor) -> NoReturn:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {self.input_size}, got {input.shape[-1]}"
        )


class _FlatWeights(list[Any]):
    """What torch's ``_flat_weights`` is: every weight; one that is set in here is the layer's."""

    def __init__(self, module: RecurrentStack) -> None:
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
