"""A call of a multi-layer recurrent module, kept so that a backward pass can find its adjoints.

What a module returns are the states of its last layer. Lower layers are recomputed, one at a time,
by the functions and with the dropout masks of the call: to the bit what it computed, on a CPU.

Shape legend: as in ``_sweep.py``; L layers, D directions.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnn_cuda import autocast
from rnn_cuda._adjoint import RecurrentCall
from rnn_cuda.instruments._sweep import Adjoints, LayerRun, Wanted, sweep
from rnn_cuda.modules import ElmanStack
from rnn_cuda.reference import compute_dtype
from rnn_cuda.residual import ResidualRNN

TORCH_RECURRENCES: dict[Callable[..., Any], str] = {
    torch._VF.rnn_tanh: "tanh",
    torch._VF.rnn_relu: "relu",
    torch._VF.lstm: "lstm",
    torch._VF.gru: "gru",
}
"""What the ``forward`` of torch's recurrent modules calls, and the kind of each."""

_FUNCTIONS = {kind: function for function, kind in TORCH_RECURRENCES.items()}
_OPTIONS = ("has_biases", "num_layers", "dropout", "train", "bidirectional")
_DENSE = ("input", "hx", "params", *_OPTIONS, "batch_first")
_PACKED = ("data", "batch_sizes", "hx", "params", *_OPTIONS)


def by_step_and_sample(
    rows: Tensor,
    batch_sizes: Tensor | None,
    unsorted_indices: Tensor | None,
    shape: Sequence[int] = (),
) -> Tensor:
    """From rows ``(N, ..)`` to ``(T, B, ..)``, the caller's samples; NaN behind a sample's end.

    ``shape`` is (T, B) where the rows are not those of a packed sequence.
    """
    if batch_sizes is None:
        return rows.reshape(*shape, *rows.shape[1:])
    packed = PackedSequence(rows, batch_sizes, None, unsorted_indices)
    return nn.utils.rnn.pad_packed_sequence(packed, padding_value=torch.nan)[0]


def torch_call(
    module: nn.Module,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    unsorted_indices: Callable[[Tensor], Tensor | None],
) -> tuple[RecurrentCall, bool]:
    """Describe a call of one of `TORCH_RECURRENCES`; also return whether it is batch first.

    Its random state is left to the caller. ``unsorted_indices`` is asked for those that belong to
    packed ``batch_sizes``.
    """
    second = kwargs["batch_sizes"] if "batch_sizes" in kwargs else args[1]
    is_packed = isinstance(second, Tensor) and second.dim() == 1  # states have three dimensions
    given = dict(zip(_PACKED if is_packed else _DENSE, args, strict=False)) | kwargs
    batch_sizes, batch_first = given.get("batch_sizes"), given.get("batch_first", False)
    input = given["data"] if batch_sizes is not None else given["input"]
    hx, params, num_layers = given["hx"], given["params"], given["num_layers"]
    kind = TORCH_RECURRENCES[function]
    h0, c0 = hx if kind == "lstm" else (hx, None)
    per_group = len(params) // (num_layers * (2 if given["bidirectional"] else 1))
    dropout = given["dropout"] if given["train"] and num_layers > 1 else 0.0
    call = RecurrentCall(
        module=module,
        kind=kind,
        input=input.transpose(0, 1) if batch_first else input,
        h0=h0,
        c0=c0,
        weights=[list(params[i : i + per_group]) for i in range(0, len(params), per_group)],
        bidirectional=given["bidirectional"],
        has_biases=given["has_biases"],
        training=given["train"],
        dropout=dropout,
        batch_sizes=batch_sizes,
        unsorted_indices=None if batch_sizes is None else unsorted_indices(batch_sizes),
        autocast_dtype=autocast.active_dtype(input.device.type),
    )
    return call, batch_first


class StackCall:
    """A `RecurrentCall` with its output, detached: what a backward pass needs to find adjoints.

    It keeps no graph, and no copies either: whoever modifies a weight in place is noticed.
    """

    def __init__(self, call: RecurrentCall, output: Tensor) -> None:
        """``output`` is ``(T, B, D * P)``, or packed ``(N, D * P)``."""

        def detached(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.detach()

        self.call = call = dataclasses.replace(
            call,
            module=_as_it_is(call.module),
            input=call.input.detach(),
            h0=detached(call.h0),
            c0=detached(call.c0),
            weights=[[weight.detach() for weight in group] for group in call.weights],
        )
        self._output = output.detach()
        self._output_version = output._version
        states = [state for state in (call.h0, call.c0) if state is not None]
        kept = [call.input, *states, *(weight for group in call.weights for weight in group)]
        self._versions = [(tensor, tensor._version) for tensor in kept]
        self._weight_names = ["weight_ih", "weight_hh"]
        self._weight_names += ["bias_ih", "bias_hh"] if call.has_biases else []
        if len(call.weights[0]) > len(self._weight_names):
            self._weight_names.append("weight_hr")

    def adjoints(
        self, grads: Sequence[Tensor | None], name: str, *, vectors: bool, cell_total: bool
    ) -> list[Adjoints]:
        """Return the adjoints of every layer and direction.

        Args:
            grads: of output, h_n and, for an LSTM, c_n; None stands for zeros.
            name: of the module, for errors.
            vectors: if false, those of the hidden states may be missing, but for their norms.
            cell_total: whether to find that of `Adjoints`.

        Raises:
            RuntimeError: what the call computed with was modified in place since, or is gone.

        """
        self._check_unchanged(name)
        call, wide = self.call, compute_dtype(self._output.dtype)

        def widened(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(wide)

        inputs, outputs, masks = self._replay()
        direct, grad_h_n, grad_c_n = (widened(grad) for grad in (*grads, None)[:3])
        results: list[Adjoints] = []
        for layer in reversed(range(call.num_layers)):
            per_direction = []
            size = outputs[layer].shape[-1] // call.directions
            for direction in range(call.directions):
                index = layer * call.directions + direction
                columns = slice(direction * size, (direction + 1) * size)
                weights = {
                    name: autocast.cast(weight, call.autocast_dtype).to(wide)
                    for name, weight in zip(self._weight_names, call.weights[index], strict=True)
                }
                keep, rate = 0.0, 1.0
                if isinstance(call.module, ResidualRNN):
                    A = weights["weight_hh"]
                    keep, rate, weights["weight_hh"] = call.module._coefficients(A)
                run = LayerRun(
                    kind=call.kind,
                    input=inputs[layer].to(wide),
                    output=outputs[layer][..., columns].to(wide),
                    h0=widened(_at(call.h0, index)),
                    c0=widened(_at(call.c0, index)),
                    weights=weights,
                    reverse=direction == 1,
                    batch_sizes=call.batch_sizes,
                    batch=_batch(call),
                    keep=keep,
                    rate=rate,
                )
                grad_output = None if direct is None else direct[..., columns]
                finals = _at(grad_h_n, index), _at(grad_c_n, index)
                wanted = Wanted(vectors, layer > 0, cell_total)
                per_direction.append(sweep(run, grad_output, *finals, wanted))
            results = per_direction + results
            if layer > 0:
                total = sum(a.input for a in per_direction if a.input is not None)
                direct = torch.as_tensor(total).view(inputs[layer].shape)
                mask = masks[layer - 1]
                direct = direct if mask is None else direct * mask
        return results

    def _check_unchanged(self, name: str) -> None:
        for tensor, version in self._versions:
            is_gone = tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0
            if is_gone or tensor._version != version:
                fate = "freed" if is_gone else "modified by an inplace operation"
                raise RuntimeError(
                    f"GradientFlow cannot record {name}: its input, an initial state or a weight "
                    f"was {fate} between the forward and the backward pass"
                )

    def _replay(self) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """Every layer's input and output, and the dropout masks (scaled) between them."""
        inputs, outputs, masks = [self.call.input], [], []
        with self._as_it_ran():
            last = self.call.num_layers - 1
            for layer in range(last):
                outputs.append(self._run_layer(layer, inputs[layer]))
                mask = None
                if self.call.random_state is not None:
                    mask = torch.dropout(torch.ones_like(outputs[layer]), self.call.dropout, True)
                masks.append(mask)
                inputs.append(outputs[layer] if mask is None else outputs[layer] * mask)
            modified = self._output._version != self._output_version
            outputs.append(self._run_layer(last, inputs[last]) if modified else self._output)
        return inputs, outputs, masks

    @contextlib.contextmanager
    def _as_it_ran(self) -> Iterator[None]:
        device, dtype = self.call.input.device.type, self.call.autocast_dtype
        with contextlib.ExitStack() as stack:
            if self.call.random_state is not None:
                stack.enter_context(torch.random.fork_rng(devices=[]))
                torch.set_rng_state(self.call.random_state)
            if torch.amp.is_autocast_available(device):
                # Without the cache: what is cached under no_grad would lose the caller's gradients.
                stack.enter_context(
                    torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False)
                )
            yield

    def _run_layer(self, layer: int, sequence: Tensor) -> Tensor:
        """Run one layer, in both directions if it has two."""
        call = self.call
        indices = range(layer * call.directions, (layer + 1) * call.directions)
        if isinstance(call.module, ElmanStack):
            h0 = None if call.h0 is None else call.h0[indices[0] : indices[-1] + 1]
            weights = [call.weights[index] for index in indices]
            return call.module._layer(sequence, h0, weights, call.batch_sizes)[0]
        weights = [weight for index in indices for weight in call.weights[index]]
        states = [s[indices[0] : indices[-1] + 1] for s in (call.h0, call.c0) if s is not None]
        hx = states if call.kind == "lstm" else states[0]
        options = (weights, call.has_biases, 1, 0.0, call.training, call.bidirectional)
        function = _FUNCTIONS[call.kind]
        if call.batch_sizes is None:
            return function(sequence, hx, *options, False)[0]
        return function(sequence, call.batch_sizes, hx, *options)[0]


def _as_it_is(module: nn.Module) -> nn.Module:
    """Return a module with the same attributes, which may be set anew in the other: a leak."""
    # Not copy.copy: what FSDP2 makes of a module cannot be copied.
    same: nn.Module = object.__new__(type(module))
    same.__dict__.update(module.__dict__)
    return same


def _at(states: Tensor | None, index: int) -> Tensor | None:
    return None if states is None else states[index]


def _batch(call: RecurrentCall) -> int:
    return call.input.shape[1] if call.batch_sizes is None else int(call.batch_sizes[0])
