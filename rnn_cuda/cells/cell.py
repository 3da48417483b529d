"""What a recurrent cell is: one time step, and its derivative within a unit.

A cell is elementwise. What multiplies matrices is outside: a layer hands it the sums ``W x_t + b``
and ``U h_{t-1} + b``, with a block of H columns for each gate.

Shape legend: H hidden size, G gates; leading dimensions are the caller's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

State = tuple[Tensor, ...]
"""What a layer carries from step to step: ``(h,)``, or ``(h, c)``."""


class Linearisation(NamedTuple):
    r"""The derivative of a step within each unit: one small matrix, read off what the step did.

    ``z`` are the sums ``U h_{t-1} + b``, ``v`` is the value that a unit carries on its own: c in a
    cell that has one, else h itself.

        dv_t = keep dv_{t-1} + sum over gates of gain dz
        dh_t = dv_t, or exposure dv_t + output_gain dz of the last gate

    """

    gain: Tensor
    """``(.., G, H)``, without the last gate if that has ``output_gain``."""
    keep: Tensor | float = 0.0
    """``(.., H)``."""
    exposure: Tensor | None = None
    """``(.., H)``; None where h is v, as is `output_gain`."""
    output_gain: Tensor | None = None
    """``(.., H)``, of the last gate, which acts on h past v."""
    input_gain: Tensor | None = None
    """The ``gain`` of the sums ``W x_t + b`` if that is another."""

    def push(self, sums: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        """Return dh_t and dv_t, given dz ``(.., G, H)`` and dv_{t-1} ``(.., H)``."""
        inner = sums if self.output_gain is None else sums[..., :-1, :]
        carried = self.keep * carried + (self.gain * inner).sum(-2)
        if self.exposure is None or self.output_gain is None:
            return carried, carried
        return self.exposure * carried + self.output_gain * sums[..., -1, :], carried

    def pull(self, hidden: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        """Return the adjoints of z ``(.., G * H)`` and of v_{t-1}, given those of h_t and v_t.

        That of v_t leaves out what v_t does through h_t; where h is v, only ``hidden`` counts.
        """
        total = self.total(hidden, carried)
        delta = (self.gain * total.unsqueeze(-2)).flatten(-2)
        if self.output_gain is not None:
            delta = torch.cat([delta, self.output_gain * hidden], dim=-1)
        return delta, self.keep * total

    def total(self, hidden: Tensor, carried: Tensor) -> Tensor:
        """Return the adjoint of v_t with what it does through h_t."""
        return hidden if self.exposure is None else carried.addcmul(hidden, self.exposure)

    def for_input(self) -> Linearisation:
        """Return the same for the sums ``W x_t + b`` in place of ``U h_{t-1} + b``."""
        return self if self.input_gain is None else self._replace(gain=self.input_gain)

    def steps(self, split: Callable[[Tensor], Iterable[Tensor]]) -> list[Linearisation]:
        """Return the parts into which ``split`` takes each tensor."""
        parts: Any = [split(part) if isinstance(part, Tensor) else repeat(part) for part in self]
        return [Linearisation(*each) for each in zip(*parts, strict=False)]


class Weights(NamedTuple):
    """What a layer and direction computes with."""

    ih: Tensor
    """``(G * H, I)``."""
    hh: Tensor
    """``(G * H, P)``, P the size of the state h_t."""
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    projection: Tensor | None = None
    """``(P, H)``, if ``h_t`` is projected."""

    def input_sums(self, x: Tensor) -> Tensor:
        """Return ``W x + b_ih``."""
        return linear(x, self.ih, self.bias_ih)

    def recurrent_sums(self, h: Tensor) -> Tensor:
        """Return ``U h + b_hh``."""
        return linear(h, self.hh, self.bias_hh)

    def project(self, h: Tensor) -> Tensor:
        """Return what a layer publishes of h ``(.., H)``: ``(.., P)``."""
        return h if self.projection is None else h @ self.projection.mT

    def pull_projection(self, adjoint: Tensor) -> Tensor:
        """Return the adjoint before the projection of what has ``adjoint`` behind it."""
        return adjoint if self.projection is None else adjoint @ self.projection


class Cell(ABC):
    """One recurrent cell. Everything that runs, initialises or measures a layer asks its cell."""

    gate_names: ClassVar[tuple[str, ...]] = ()
    """In the order of the weights' blocks; empty if the one block is no gate."""
    keeping_gate: ClassVar[str | None] = None
    """The gate that, open, keeps the state."""
    admitting_gate: ClassVar[str | None] = None
    """The gate that lets the new in, where that is not the keeping one."""
    has_cell_state: ClassVar[bool] = False
    """Whether the state is ``(h, c)``."""
    saved_values: ClassVar[int] = 0
    """How many values of a unit the native forward pass saves for its backward pass."""
    constants: ClassVar[int] = 0
    """How many numbers of its own a unit has, besides its weights."""
    keeps_sums_apart: ClassVar[bool] = False
    """Whether `gates` takes the two sums for more than their total."""
    is_linear_recurrence: ClassVar[bool] = False
    """Whether the linearised step is ``y_t = d_t (g_t + U y_{t-1})``, with d_t read off h_t.

    Then the native recurrences run it, given the cell's `nonlinearity` and `derivative`.
    """
    nonlinearity: str

    @property
    def blocks(self) -> int:
        """G, the blocks of H rows in the weights."""
        return max(1, len(self.gate_names))

    @property
    def operator_name(self) -> str | None:
        """What the operators call it, if there is a kernel for it."""
        return None

    @property
    def states(self) -> int:
        """What a layer carries: h, and c if the cell has it."""
        return 2 if self.has_cell_state else 1

    @property
    def adjoints(self) -> int:
        """How many total adjoints a backward pass knows.

        That of h_t; of a cell that has c then also that of c_t, and the part of it that c_t does
        not owe to h_t, the adjoint of c_t with h_t held fixed.
        """
        return 3 if self.has_cell_state else 1

    def with_constants(self, *constants: Tensor | float) -> Cell:
        """Return the cell with these in place of its own."""
        return self

    def constant_tensors(self, like: Tensor) -> list[Tensor]:
        """Return its constants as the operators take them beside ``like`` ``(.., H)``."""
        return []

    def constant_factors(self, gates: tuple[Tensor, ...], before: Tensor) -> list[Tensor]:
        """Return dv_t by each constant, of a step that had these gates and v_{t-1}."""
        return []

    @abstractmethod
    def gates(self, input_sums: Tensor, recurrent_sums: Tensor) -> tuple[Tensor, ...]:
        """Return the activations, in the order of `gate_names`, and what else `linearise` needs."""

    def kept_share(self, gates: tuple[Tensor, ...]) -> Tensor:
        """Return dv_t/dv_{t-1} where the gates are held, of a cell that carries c: a gate."""
        raise NotImplementedError

    @abstractmethod
    def carry(self, gates: tuple[Tensor, ...], carried: Tensor) -> Tensor:
        """Return v_t, given v_{t-1}: c if the cell has one, else h."""

    def publish(self, gates: tuple[Tensor, ...], carried: Tensor) -> Tensor:
        """Return h_t, given v_t; before a projection."""
        return carried

    @abstractmethod
    def linearise(self, gates: tuple[Tensor, ...], before: Tensor, after: Tensor) -> Linearisation:
        """Return the derivative of a step that had these gates, and v_{t-1} and v_t."""

    def derivative(self, h: Tensor) -> Tensor:
        """Return d_t of a linear recurrence, given h_t."""
        raise NotImplementedError

    def step(self, input_sums: Tensor, recurrent_sums: Tensor, carried: Tensor) -> State:
        """Take one time step from v_{t-1}; return ``(h_t,)`` or ``(h_t, c_t)``."""
        gates = self.gates(input_sums, recurrent_sums)
        carried = self.carry(gates, carried)
        return (self.publish(gates, carried), carried) if self.has_cell_state else (carried,)
