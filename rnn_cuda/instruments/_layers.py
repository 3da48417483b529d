"""From a module to the `Steps` of one of its layers and directions, with all checks of arguments.

Shape legend: T time steps, B batch, I input size, L layers, D directions.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from rnn_cuda.arguments import check_bool, check_int, check_tensor, type_name
from rnn_cuda.instruments._steps import ElmanSteps, GRUSteps, LSTMSteps, ResidualSteps, Steps
from rnn_cuda.modules import FusedRNN
from rnn_cuda.residual import AntisymmetricRNN, LeakyRNN

Recurrent: TypeAlias = FusedRNN | LeakyRNN | AntisymmetricRNN | nn.RNN | nn.GRU | nn.LSTM
State: TypeAlias = Tensor | tuple[Tensor, Tensor]

WIDE = torch.float64
"""What the instruments compute in, whatever the layer's dtype."""


def steps_of(
    module: Recurrent, input: Tensor, hx: State | None, *, layer: int, reverse: bool
) -> Steps:
    """Run ``module`` up to ``layer`` in float64, without dropout, and return the steps of it.

    Differentiable in the parameters, ``input`` and ``hx``.

    Raises:
        TypeError: ``module`` is none of these layers, or an argument is of the wrong type (a
            PackedSequence, for instance: pad it or take one sample at a time).
        ValueError: there is no such layer or direction, or a shape or device does not fit.

    """
    if not isinstance(module, Recurrent):
        raise TypeError(
            "module should be a FusedRNN, LeakyRNN, AntisymmetricRNN, nn.RNN, nn.GRU or nn.LSTM, "
            f"got: {type_name(module)}"
        )
    check_int("layer", layer)
    check_bool("reverse", reverse)
    if not 0 <= layer < module.num_layers:
        raise ValueError(
            f"layer: expected 0 to {module.num_layers - 1}, as module has {module.num_layers} "
            f"layers; got {layer}"
        )
    if reverse and not module.bidirectional:
        raise ValueError("reverse: expected False, as module is not bidirectional; got True")
    x = _time_first(module, input)
    start = _initial_states(module, hx, x)
    directions = 2 if module.bidirectional else 1
    for below in range(layer):
        outputs = []
        for direction in range(directions):
            output = _steps(module, below, direction == 1, x, start).output
            outputs.append(output.flip(0) if direction == 1 else output)
        x = torch.cat(outputs, dim=-1)
    return _steps(module, layer, reverse, x, start)


def _time_first(module: Recurrent, input: Tensor) -> Tensor:
    """Check ``input``; return it as ``(T, B, I)`` in float64."""
    check_tensor("input", input)
    batch_first = module.batch_first and input.ndim == 3
    expected = f"{'(B, T' if batch_first else '(T, B'}, {module.input_size})"
    if input.ndim not in (2, 3) or input.shape[-1] != module.input_size or 0 in input.shape[:-1]:
        raise ValueError(
            f"input: expected shape {expected} or (T, {module.input_size}), with at least one time "
            f"step and sample; got {tuple(input.shape)}"
        )
    weight = module.weight_ih_l0
    if input.device != weight.device or not input.is_floating_point():
        raise ValueError(
            f"input: expected a floating-point tensor on {weight.device}, as the parameters are; "
            f"got {input.dtype} on {input.device}"
        )
    if input.ndim == 2:
        input = input.unsqueeze(1)
    elif batch_first:
        input = input.transpose(0, 1)
    return input.to(WIDE)


def _initial_states(module: Recurrent, hx: State | None, x: Tensor) -> tuple[Tensor, ...]:
    """Check ``hx``; return h_0, and c_0 for an LSTM, as ``(L * D, B, features)`` in float64."""
    count, batch = module.num_layers * (2 if module.bidirectional else 1), x.shape[1]
    sizes = [module.proj_size or module.hidden_size]
    if isinstance(module, nn.LSTM):
        sizes.append(module.hidden_size)
        if hx is not None and not (isinstance(hx, tuple | list) and len(hx) == 2):
            raise TypeError(f"hx should be a tuple (h_0, c_0) for an LSTM, got: {type_name(hx)}")
        parts = (None, None) if hx is None else hx
    else:
        parts = (hx,)
    states = []
    for name, part, size in zip(("h_0", "c_0"), parts, sizes, strict=False):
        if part is None:
            states.append(x.new_zeros(count, batch, size))
            continue
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} of hx should be a Tensor, got: {type_name(part)}")
        given = part.unsqueeze(1) if part.ndim == 2 and batch == 1 else part
        if given.shape != (count, batch, size) or given.device != x.device:
            raise ValueError(
                f"{name} of hx: expected shape {(count, batch, size)} on {x.device}, "
                f"got {tuple(part.shape)} on {part.device}"
            )
        states.append(given.to(WIDE))
    return tuple(states)


def _steps(
    module: Recurrent, layer: int, reverse: bool, x: Tensor, start: tuple[Tensor, ...]
) -> Steps:
    """Run one layer and direction over ``x``, which is in the order of time."""
    suffix = f"l{layer}{'_reverse' if reverse else ''}"
    index = 2 * layer + reverse if module.bidirectional else layer

    def parameter(kind: str) -> Tensor:
        return getattr(module, f"{kind}_{suffix}").to(WIDE)

    weight_ih, weight_hh = parameter("weight_ih"), parameter("weight_hh")
    if module.bias:
        bias_ih, bias_hh = parameter("bias_ih"), parameter("bias_hh")
    else:
        bias_ih = bias_hh = weight_ih.new_zeros(weight_ih.shape[0])
    if reverse:
        x = x.flip(0)
    h0 = start[0][index]
    if isinstance(module, nn.LSTM):
        projection = parameter("weight_hr") if module.proj_size else None
        c0 = start[1][index]
        return LSTMSteps(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, projection)
    if isinstance(module, nn.GRU):
        return GRUSteps(x, h0, weight_ih, weight_hh, bias_ih, bias_hh)
    if isinstance(module, LeakyRNN | AntisymmetricRNN):
        keep, rate, matrix = module._coefficients(weight_hh)
        bias = bias_ih + bias_hh
        return ResidualSteps(x, h0, weight_ih, matrix, bias, module.nonlinearity, keep, rate)
    return ElmanSteps(x, h0, weight_ih, weight_hh, bias_ih + bias_hh, module.nonlinearity)
