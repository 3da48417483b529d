"""A call of a multi-layer recurrent module, kept so that its adjoints can be computed afterwards.

What a module returns are the states of its last layer. Those of the layers below are had by running
these once more, one at a time, with the same functions and the same dropout masks: to the bit what
the call computed, on a CPU.

Shape legend: as in ``_sweep.py``; L layers, D directions.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnn_cuda import autocast
from rnn_cuda.instruments._sweep import Adjoints, LayerRun, Wanted, sweep
from rnn_cuda.modules import ElmanStack, FusedRNN
from rnn_cuda.reference import compute_dtype
from rnn_cuda.residual import ResidualRNN

Recurrent = nn.RNN | nn.LSTM | nn.GRU | FusedRNN | ResidualRNN

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def kind_of(module: Recurrent) -> str:
    """``"lstm"``, ``"gru"``, or the nonlinearity of an Elman RNN."""
    if isinstance(module, nn.LSTM | nn.GRU):
        return module.mode.lower()
    return module.nonlinearity


def layer_names(module: Recurrent) -> list[str]:
    """Name layers and directions in the order of ``h_n``: ``l0``, ``l0_reverse``, ``l1``, .."""
    suffixes = ("", "_reverse") if module.bidirectional else ("",)
    return [f"l{layer}{suffix}" for layer in range(module.num_layers) for suffix in suffixes]


def has_dropout(module: Recurrent) -> bool:
    """Whether the module's next call draws dropout masks between its layers."""
    return module.training and module.dropout > 0 and module.num_layers > 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a module's tensors are turned into sequences and states in the order of processing."""

    time_steps: int
    batch: int
    batched: bool = True
    batch_first: bool = False
    # Of a packed sequence:
    batch_sizes: Tensor | None = None
    sorted_indices: Tensor | None = None
    unsorted_indices: Tensor | None = None

    @classmethod
    def of(cls, module: Recurrent, input: Tensor | PackedSequence) -> Layout:
        if isinstance(input, PackedSequence):
            _, sizes, *order = input
            return cls(len(sizes), int(sizes[0]), True, False, sizes, *order)
        if input.dim() == 2:
            return cls(input.shape[0], 1, batched=False)
        T, B = input.shape[:2][::-1] if module.batch_first else input.shape[:2]
        return cls(T, B, batch_first=module.batch_first)

    def sequence(self, tensor: Tensor) -> Tensor:
        """``(T, B, features)``, or the rows ``(N, features)`` of a packed sequence."""
        if not self.batched:
            return tensor.unsqueeze(1)
        return tensor.transpose(0, 1) if self.batch_first else tensor

    def states(self, tensor: Tensor | None) -> Tensor | None:
        """``(L * D, B, features)``; of a packed sequence, in the order of its rows."""
        if tensor is None:
            return None
        if not self.batched:
            return tensor.unsqueeze(1)
        order = self.sorted_indices
        return tensor if order is None else tensor.index_select(1, order)

    def by_step_and_sample(self, rows: Tensor) -> Tensor:
        """From rows to ``(T, B, ..)``, the caller's samples; NaN behind a sample's end."""
        if self.batch_sizes is None:
            return rows.view(self.time_steps, self.batch, *rows.shape[1:])
        packed = PackedSequence(rows, self.batch_sizes, self.sorted_indices, self.unsorted_indices)
        return nn.utils.rnn.pad_packed_sequence(packed, padding_value=torch.nan)[0]


@dataclasses.dataclass(frozen=True)
class StackCall:
    """One call of a module. Tensors are detached, and in the order of processing (`Layout`)."""

    module: Recurrent
    layout: Layout
    input: Tensor  # (T, B, I) or (N, I)
    h0: Tensor | None  # (L * D, B, P)
    c0: Tensor | None  # (L * D, B, H)
    output: Tensor  # (T, B, D * P) or (N, D * P)
    training: bool
    weights: list[list[Tensor]]  # of each layer and direction
    names: list[str]  # of the weights of each
    random_state: Tensor | None  # before the call, where it drew dropout masks
    autocast_dtype: torch.dtype | None
    versions: list[tuple[Tensor, int]]  # of all but the output
    output_version: int

    @classmethod
    def of(
        cls,
        module: Recurrent,
        input: Tensor | PackedSequence,
        hx: Any,
        output: Tensor | PackedSequence,
        random_state: Tensor | None,
    ) -> StackCall:
        if isinstance(module, FusedRNN) and type(module)._layer is not FusedRNN._layer:
            raise TypeError(
                f"GradientFlow does not know the recurrence of a {type(module).__name__}, a "
                "FusedRNN that overrides _layer"
            )
        layout = Layout.of(module, input)
        x = (input.data if isinstance(input, PackedSequence) else input).detach()
        y = (output.data if isinstance(output, PackedSequence) else output).detach()
        h0, c0 = hx if isinstance(hx, tuple) else (hx, None)
        h0, c0 = (None if s is None else s.detach() for s in (h0, c0))
        names: list[str] = list(_NAMES[: 4 if module.bias else 2])
        if module.proj_size:
            names.append(_NAMES[4])
        weights = [[w.detach() for w in group] for group in _weights(module, len(names))]
        kept = [t for t in (x, h0, c0) if t is not None] + [w for g in weights for w in g]
        return cls(
            module=module,
            layout=layout,
            input=layout.sequence(x),
            h0=layout.states(h0),
            c0=layout.states(c0),
            output=layout.sequence(y),
            training=module.training,
            weights=weights,
            names=names,
            random_state=random_state,
            autocast_dtype=autocast.active_dtype(x.device.type),
            versions=[(t, t._version) for t in kept],
            output_version=y._version,
        )

    @property
    def directions(self) -> int:
        return 2 if self.module.bidirectional else 1

    def adjoints(
        self,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        *,
        vectors: bool,
        cell_total: bool,
    ) -> list[Adjoints]:
        """Return the adjoints of every layer and direction, given the gradients of the results.

        Where ``vectors`` is false, those of the hidden states may be missing, but for their norms;
        ``cell_total`` asks for that of `Adjoints`.

        Raises:
            RuntimeError: what the call computed with was modified in place since.

        """
        if any(tensor._version != version for tensor, version in self.versions):
            raise RuntimeError(
                "GradientFlow computes the adjoints of a torch.nn module after its backward pass, "
                "but its input, initial state or a weight was modified in place since the forward "
                "pass"
            )
        inputs, outputs, masks = self._replay()
        wide = compute_dtype(self.output.dtype)

        def widened(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(wide)

        direct = None if grad_output is None else widened(self.layout.sequence(grad_output))
        grad_h_n, grad_c_n = (widened(self.layout.states(g)) for g in (grad_h_n, grad_c_n))
        found = []
        for layer in reversed(range(self.module.num_layers)):
            of_layer = []
            size = outputs[layer].shape[-1] // self.directions
            for direction in range(self.directions):
                index = layer * self.directions + direction
                columns = slice(direction * size, (direction + 1) * size)
                weights = {
                    name: autocast.cast(w, self.autocast_dtype).to(wide)
                    for name, w in zip(self.names, self.weights[index], strict=True)
                }
                keep, rate = 0.0, 1.0
                if isinstance(self.module, ResidualRNN):
                    A = weights["weight_hh"]
                    keep, rate, weights["weight_hh"] = self.module._coefficients(A)
                run = LayerRun(
                    kind=kind_of(self.module),
                    input=inputs[layer].to(wide),
                    output=outputs[layer][..., columns].to(wide),
                    h0=widened(_at(self.h0, index)),
                    c0=widened(_at(self.c0, index)),
                    weights=weights,
                    reverse=direction == 1,
                    batch_sizes=self.layout.batch_sizes,
                    batch=self.layout.batch,
                    keep=keep,
                    rate=rate,
                )
                its_direct = None if direct is None else direct[..., columns]
                finals = _at(grad_h_n, index), _at(grad_c_n, index)
                wanted = Wanted(vectors, layer > 0, cell_total)
                of_layer.append(sweep(run, its_direct, *finals, wanted))
            found = of_layer + found
            if layer > 0:
                total = sum(a.input for a in of_layer if a.input is not None)
                direct = torch.as_tensor(total).view(inputs[layer].shape)
                mask = masks[layer - 1]
                direct = direct if mask is None else direct * mask
        return found

    def _replay(self) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """Every layer's input and output, and the dropout masks (scaled) between them."""
        inputs, outputs, masks = [self.input], [], []
        with self._as_it_ran():
            last = self.module.num_layers - 1
            for layer in range(last):
                outputs.append(self._run_layer(layer, inputs[layer]))
                mask = None
                if self.random_state is not None:
                    ones = torch.ones_like(outputs[layer])
                    mask = torch.dropout(ones, self.module.dropout, True)
                masks.append(mask)
                inputs.append(outputs[layer] if mask is None else outputs[layer] * mask)
            modified = self.output._version != self.output_version
            outputs.append(self._run_layer(last, inputs[last]) if modified else self.output)
        return inputs, outputs, masks

    @contextlib.contextmanager
    def _as_it_ran(self) -> Iterator[None]:
        device, dtype = self.input.device.type, self.autocast_dtype
        with contextlib.ExitStack() as stack:
            if self.random_state is not None:
                stack.enter_context(torch.random.fork_rng(devices=[]))
                torch.set_rng_state(self.random_state)
            if torch.amp.is_autocast_available(device):
                # Without the cache: what is cached under no_grad would lose the caller's gradients.
                stack.enter_context(
                    torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False)
                )
            yield

    def _run_layer(self, layer: int, sequence: Tensor) -> Tensor:
        """Run one layer, in both directions if it has two."""
        indices = range(layer * self.directions, (layer + 1) * self.directions)
        sizes = self.layout.batch_sizes
        if isinstance(self.module, ElmanStack):
            dtype = self.autocast_dtype
            with autocast.disabled(sequence.device.type, dtype):
                directions = self.module._layer(
                    autocast.cast(sequence, dtype),
                    [autocast.cast(_at(self.h0, index), dtype) for index in indices],
                    [[autocast.cast(w, dtype) for w in self.weights[index]] for index in indices],
                    sizes,
                )
            outputs = [output for output, _ in directions]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        weights = [w for index in indices for w in self.weights[index]]
        hx = self._initial_states(indices, sequence)
        options = (self.module.bias, 1, 0.0, self.training, self.module.bidirectional)
        function = getattr(torch._VF, self.module.mode.lower())
        if sizes is None:
            return function(sequence, hx, weights, *options, False)[0]
        return function(sequence, sizes, hx, weights, *options)[0]

    def _initial_states(self, indices: Sequence[int], like: Tensor) -> Any:
        H, P = self.module.hidden_size, self.module.proj_size or self.module.hidden_size

        def of_layer(states: Tensor | None, size: int) -> Tensor:
            if states is None:
                return like.new_zeros(len(indices), self.layout.batch, size)
            return states[indices[0] : indices[-1] + 1]

        h0 = of_layer(self.h0, P)
        return (h0, of_layer(self.c0, H)) if isinstance(self.module, nn.LSTM) else h0


def _at(states: Tensor | None, index: int) -> Tensor | None:
    return None if states is None else states[index]


def _weights(module: Recurrent, per_layer: int) -> list[list[Tensor]]:
    """The weights of each layer and direction, as the module's last call had them."""
    if isinstance(module, ElmanStack):
        with torch.no_grad(), _settled(module):
            return module.all_weights
    flat: list[Any] = module._flat_weights
    return [flat[i : i + per_layer] for i in range(0, len(flat), per_layer)]


@contextlib.contextmanager
def _settled(module: nn.Module) -> Iterator[None]:
    """Keep parametrizations from learning when they are read (spectral norm iterates)."""
    parametrizations = getattr(module, "parametrizations", None)
    training = [m for m in parametrizations.modules() if m.training] if parametrizations else []
    for each in training:
        each.training = False
    try:
        yield
    finally:
        for each in training:
            each.training = True
