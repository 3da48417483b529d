"""The trajectory of one layer and direction, and products with its one-step Jacobians.

Every instrument that looks at Jacobian products sees a layer as a map s_t = F_t(s_{t-1}) of the
state s that it carries: h for an Elman RNN and a GRU, (h, c) side by side for an LSTM. Time is
counted in the order of processing, so that for a reverse direction s_1 belongs to the last element
of the sequence; s_0 is the initial state.

Shape legend: T time steps, B batch, H hidden size, S size of the carried state, K vectors per
sample, G gates. Blocks of vectors are (B, K, S), one vector a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from rnn_cuda.functional import elman_rnn, linear_recurrence
from rnn_cuda.reference import activation, activation_derivative


class Steps(ABC):
    """What the instruments ask of a layer and direction.

    Attributes:
        states: s_0 .. s_T, ``(T + 1, B, S)``.
        gates: the activations of each gate by name, ``(T, B, H)``; empty without gates.

    """

    states: Tensor
    gates: dict[str, Tensor]

    @property
    def length(self) -> int:
        """T."""
        return self.states.shape[0] - 1

    @property
    def batch(self) -> int:
        """B."""
        return self.states.shape[1]

    @property
    def size(self) -> int:
        """S."""
        return self.states.shape[2]

    @property
    def output(self) -> Tensor:
        """What the layer above sees, in the order of processing."""
        return self.states[1:]

    @abstractmethod
    def push(self, block: Tensor, start: int, stop: int) -> Tensor:
        """Return ``J_stop ... J_{start+1} v`` for each row v, with J_t = ds_t/ds_{t-1}."""

    @abstractmethod
    def pull_each(self, block: Tensor, start: int, stop: int) -> Tensor:
        """Return ``J_{i+1}^T ... J_stop^T v`` for i = start .. stop - 1: ``(i, B, K, S)``."""

    def pull(self, block: Tensor, start: int, stop: int) -> Tensor:
        """Return the last of :meth:`pull_each`, that for i = start."""
        return self.pull_each(block, start, stop)[0]


class ElmanSteps(Steps):
    """h_t = f(W x_t + U h_{t-1} + b): J_t = diag(f'(h_t)) U, so products are linear recurrences."""

    def __init__(
        self,
        x: Tensor,
        h0: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor,
        nonlinearity: str,
    ) -> None:
        h, _ = elman_rnn(x, h0, weight_ih, weight_hh, bias, nonlinearity=nonlinearity)
        self.states = torch.cat([h0.unsqueeze(0), h])
        self.gates = {}
        self._gain = activation_derivative(h, nonlinearity)  # f'(h_t), (T, B, H)
        self._weight = weight_hh

    def _gain_of(self, block: Tensor, start: int, stop: int) -> Tensor:
        """Return f' of the steps after ``start``, once for each row: ``(steps, B * K, H)``."""
        gain = self._gain[start:stop].unsqueeze(2)
        return gain.expand(-1, -1, block.shape[1], -1).flatten(1, 2)  # for B = 1 a view

    def push(self, block: Tensor, start: int, stop: int) -> Tensor:
        gain = self._gain_of(block, start, stop)
        none = gain.new_zeros(self.size).expand_as(gain)
        y = linear_recurrence(gain, none, self._weight, block.flatten(0, 1))
        return y[-1].view_as(block)

    def _deltas(self, block: Tensor, start: int, stop: int) -> Tensor:
        """Return the rows times diag(f'(h_t)) after the steps above t: ``(steps, B * K, H)``."""
        gain = self._gain_of(block, start, stop)
        arriving = gain.new_zeros(gain.shape)
        arriving[-1] = block.flatten(0, 1)
        return linear_recurrence(gain, arriving, self._weight.mT, reverse=True)

    def pull_each(self, block: Tensor, start: int, stop: int) -> Tensor:
        return (self._deltas(block, start, stop) @ self._weight).view(-1, *block.shape)

    def pull(self, block: Tensor, start: int, stop: int) -> Tensor:
        return (self._deltas(block, start, stop)[0] @ self._weight).view_as(block)


class ResidualSteps(Steps):
    """h_t = keep h_{t-1} + rate f(W x_t + A h_{t-1} + b): J_t = keep I + rate diag(f'(z_t)) A."""

    def __init__(
        self,
        x: Tensor,
        h0: Tensor,
        weight_ih: Tensor,
        matrix: Tensor,
        bias: Tensor,
        nonlinearity: str,
        keep: float,
        rate: float,
    ) -> None:
        self._matrix, self._keep = matrix, keep
        h, states, gains = h0, [h0], []
        for of_input in x @ weight_ih.mT + bias:
            f = activation(of_input + h @ matrix.mT, nonlinearity)
            h = keep * h + rate * f
            states.append(h)
            gains.append(rate * activation_derivative(f, nonlinearity).unsqueeze(1))
        self.states = torch.stack(states)
        self.gates = {}
        self._gain = gains  # each (B, 1, H)

    def push(self, block: Tensor, start: int, stop: int) -> Tensor:
        for t in range(start, stop):
            block = self._keep * block + self._gain[t] * (block @ self._matrix.mT)
        return block

    def pull_each(self, block: Tensor, start: int, stop: int) -> Tensor:
        pulled = []
        for t in range(stop - 1, start - 1, -1):
            block = self._keep * block + (self._gain[t] * block) @ self._matrix
            pulled.append(block)
        return torch.stack(pulled[::-1])


class GRUSteps(Steps):
    """torch.nn.GRU: h_t = (1 - z) n + z h_{t-1}, n = tanh(W x + b_x + r (U h_{t-1} + b_h)).

    A tangent v of h_{t-1} becomes z v + sum over gates of coefficient * (U_gate v).
    """

    def __init__(
        self,
        x: Tensor,
        h0: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
    ) -> None:
        self._weight = weight_hh
        trajectory = []
        h = h0
        for of_input in x @ weight_ih.mT + bias_ih:
            of_r, of_z, of_n = of_input.chunk(3, dim=-1)
            from_r, from_z, from_n = (h @ weight_hh.mT + bias_hh).chunk(3, dim=-1)
            r, z = torch.sigmoid(of_r + from_r), torch.sigmoid(of_z + from_z)
            n = torch.tanh(of_n + r * from_n)
            h = n + z * (h - n)
            trajectory.append((h, r, z, n, from_n))
        h, r, z, n, from_n = (torch.stack(each) for each in zip(*trajectory, strict=True))
        self.states = torch.cat([h0.unsqueeze(0), h])
        self.gates = {"reset": r, "update": z, "new": n}
        to_n = (1 - z) * (1 - n * n)  # dh_t / d(argument of n's tanh)
        to_z = (self.states[:-1] - n) * z * (1 - z)
        # Taken apart once: indexing a step in each push would make its derivative cost T^2.
        coefficients = torch.stack([to_n * from_n * r * (1 - r), to_z, to_n * r], dim=2)
        self._coefficients = coefficients.unsqueeze(2).unbind()  # each (B, 1, 3, H)
        self._carry = z.unsqueeze(2).unbind()  # each (B, 1, H)

    def push(self, block: Tensor, start: int, stop: int) -> Tensor:
        for t in range(start, stop):
            of_gates = (block @ self._weight.mT).unflatten(-1, (3, self.size))
            mixed = (self._coefficients[t] * of_gates).sum(-2)
            block = mixed + self._carry[t] * block
        return block

    def pull_each(self, block: Tensor, start: int, stop: int) -> Tensor:
        pulled = []
        for t in range(stop - 1, start - 1, -1):
            of_gates = self._coefficients[t] * block.unsqueeze(-2)
            block = of_gates.flatten(-2) @ self._weight + self._carry[t] * block
            pulled.append(block)
        return torch.stack(pulled[::-1])


class LSTMSteps(Steps):
    """torch.nn.LSTM: c_t = f c_{t-1} + i g, h_t = P (o tanh(c_t)), P a projection if there is one.

    The carried state is (h, c): dh_T/dh_t alone leaves out the path through c, which is what an
    LSTM is for.
    """

    def __init__(
        self,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
        weight_hr: Tensor | None,
    ) -> None:
        self._weight, self._projection = weight_hh, weight_hr
        self._split = (h0.shape[-1], c0.shape[-1])
        trajectory = []
        h, c = h0, c0
        for of_input in x @ weight_ih.mT + (bias_ih + bias_hh):
            i, f, g, o = (of_input + h @ weight_hh.mT).chunk(4, dim=-1)
            i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
            c = f * c + i * g
            h = self._project(o * torch.tanh(c))
            trajectory.append((h, c, i, f, g, o))
        h, c, i, f, g, o = (torch.stack(each) for each in zip(*trajectory, strict=True))
        start = torch.cat([h0, c0], dim=-1).unsqueeze(0)
        self.states = torch.cat([start, torch.cat([h, c], dim=-1)])
        self.gates = {"input": i, "forget": f, "cell": g, "output": o}
        c_before, tanh_c = self.states[:-1, :, h0.shape[-1] :], torch.tanh(c)
        # dc_t and dh_t / d(arguments of the gates), in torch's order i, f, g, o
        to_c = torch.stack([g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g)], dim=2)
        self._to_c = to_c.unsqueeze(2).unbind()  # each (B, 1, 3, H), taken apart as in a GRU
        self._to_h = (tanh_c * o * (1 - o)).unsqueeze(2).unbind()
        self._carry = f.unsqueeze(2).unbind()
        self._exposure = (o * (1 - tanh_c * tanh_c)).unsqueeze(2).unbind()  # dh_t / dc_t

    @property
    def output(self) -> Tensor:
        return self.states[1:, :, : self._split[0]]

    def _project(self, h: Tensor) -> Tensor:
        return h if self._projection is None else h @ self._projection.mT

    def push(self, block: Tensor, start: int, stop: int) -> Tensor:
        h, c = block.split(self._split, dim=-1)
        for t in range(start, stop):
            of_gates = (h @ self._weight.mT).unflatten(-1, (4, self._split[1]))
            mixed = (self._to_c[t] * of_gates[..., :3, :]).sum(-2)
            c = self._carry[t] * c + mixed
            of_output = self._to_h[t] * of_gates[..., 3, :]
            h = self._project(of_output + self._exposure[t] * c)
        return torch.cat([h, c], dim=-1)

    def pull_each(self, block: Tensor, start: int, stop: int) -> Tensor:
        pulled = []
        h, c = block.split(self._split, dim=-1)
        for t in range(stop - 1, start - 1, -1):
            if self._projection is not None:
                h = h @ self._projection
            c = c + self._exposure[t] * h
            to_c = self._to_c[t] * c.unsqueeze(-2)
            to_h = self._to_h[t] * h
            h = torch.cat([to_c.flatten(-2), to_h], dim=-1) @ self._weight
            c = self._carry[t] * c
            pulled.append(torch.cat([h, c], dim=-1))
        return torch.stack(pulled[::-1])
