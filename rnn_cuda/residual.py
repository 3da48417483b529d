"""Elman RNNs whose state has a path of its own from step to step: leaky and antisymmetric.

Both are ``h_t = keep * h_{t-1} + rate * f(W x_t + A h_{t-1} + b)``, the leaky cell of the kernels:
with everything that `FusedRNN` takes, as fast and as differentiable as it is; as there, the
backward pass reads ``output``, which must not be modified in place before. They are no `FusedRNN`.
The instruments take them. On CUDA they run in plain PyTorch, one time step at a time.

Shape legend: H hidden size.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rnn_cuda import _expanded_weights
from rnn_cuda.cells import Leaky, State
from rnn_cuda.functional import call_then_check, check_layer
from rnn_cuda.modules import ElmanStack
from rnn_cuda.recording import Tap
from rnn_cuda.reference import compute_dtype


class ResidualRNN(ElmanStack):
    """What the two have in common; a subclass says what keep, rate and A are."""

    def _layer(  # pyright: ignore[reportIncompatibleMethodOverride] (constants are its own)
        self,
        sequence: Tensor,
        states: State,
        weights: Sequence[list[Tensor]],
        batch_sizes: Tensor | None,
        tap: Tap | None = None,
    ) -> tuple[Tensor, ...]:
        if any(map(_expanded_weights.are_among, (*weights, states))):
            raise TypeError(
                f"weights: expected plain tensors, got ExpandedWeights, and {type(self).__name__} "
                "takes none; for gradients per sample use torch.func.vmap(torch.func.grad(...))"
            )
        checked = (sequence, states, weights, self._cell_name, batch_sizes)
        weights = call_then_check(self._with_matrices, (weights,), check_layer, checked)
        constants = [self._constants(sequence)] * len(weights)
        return super()._layer(sequence, states, weights, batch_sizes, tap, constants)

    def _with_matrices(self, weights: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        return [[ih, self._recurrent_matrix(hh), *biases] for ih, hh, *biases in weights]

    def _constants(self, like: Tensor) -> tuple[Tensor | float, ...]:
        """Return keep and rate; those of units in the precision that ``like`` is computed in."""
        return self._coefficients()

    @property
    def _cell_name(self) -> str:
        return f"leaky.{self.nonlinearity}"

    def _cell(self) -> Leaky:
        return Leaky(self.nonlinearity, *self._coefficients())


class LeakyRNN(ResidualRNN):
    r"""Elman RNN of leaky integrators: a share ``leak`` of the state is renewed at each step.

    .. math:: h_t = (1 - a)\, h_{t-1} + a\, f(W x_t + U h_{t-1} + b), \qquad a = \mathrm{leak}

    A unit averages over about ``1 / a`` steps. The step's Jacobian is
    :math:`(1 - a) I + a\, \mathrm{diag}(f') U`, so the path past f alone carries
    :math:`(1 - a)^k` of the gradient over a lag of k.

    Noise is an input: give x further features that hold it, and W the columns that weigh it.

    Source: Jaeger, Lukosevicius, Popovici & Siewert, 2007 (leaky integrator units).

    Args:
        *args: those of `FusedRNN`.
        leak: a, above 0 and at most 1; 1 is the plain Elman RNN. The default remembers ten steps.
            A number, or a tensor ``(H)`` with one for each unit, of every layer and direction: a
            `torch.nn.Parameter` is one of the module's, to be learned; another is a buffer.
        **kwargs: those of `FusedRNN`.

    Inputs, outputs, parameters, errors: those of `FusedRNN`. Further:

    Raises:
        ValueError: ``leak`` is not a number in (0, 1], nor H of them.

    """

    if TYPE_CHECKING:  # TorchScript, which reads annotations, takes the attribute for what it is
        leak: Any

    def __init__(self, *args: Any, leak: float | Tensor = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(leak, Tensor):
            self._set_leak(leak)
        elif not _is_number(leak) or not 0 < leak <= 1:
            raise ValueError(f"leak: expected a number above 0 and at most 1, got {leak!r}")
        else:
            self.leak = float(leak)

    @torch.jit.unused
    def _set_leak(self, leak: Tensor) -> None:
        if leak.shape != (self.hidden_size,) or not leak.is_floating_point():
            raise ValueError(
                f"leak: expected a number, or {self.hidden_size} of them as a floating-point "
                f"tensor, got {leak.dtype} {tuple(leak.shape)}"
            )
        if not bool(((leak > 0) & (leak <= 1)).all()):
            raise ValueError("leak: expected numbers above 0 and at most 1, got others")
        if isinstance(leak, nn.Parameter):
            self.leak = leak
        else:
            self.register_buffer("leak", leak)

    def reset_parameters(self) -> None:
        """Draw every weight anew, as `FusedRNN` does; a leak stays."""
        leak = self._parameters.pop("leak", None)
        super().reset_parameters()
        if leak is not None:
            self._parameters["leak"] = leak

    def _constants(self, like: Tensor) -> tuple[Tensor | float, ...]:
        if isinstance(self.leak, float):
            return super()._constants(like)
        leak = self.leak.to(compute_dtype(like.dtype))  # first: 1 - leak has more digits
        return 1 - leak, leak

    def _cell(self) -> Leaky:
        if isinstance(self.leak, float):
            return super()._cell()
        return Leaky(self.nonlinearity, *self._constants(self.leak))

    def _coefficients(self) -> tuple[float, float]:
        return 1 - self.leak, self.leak  # pyright: ignore[reportReturnType] (TorchScript's type)

    def _check_leaving(self) -> None:
        if isinstance(self.leak, Tensor):
            raise NotImplementedError(
                "a LeakyRNN with a leak for each unit cannot be scripted, traced or exported to "
                "ONNX: give it one leak, or use torch.export"
            )

    def extra_repr(self) -> str:
        """Return the arguments of `FusedRNN` that differ from their defaults, and ``leak``."""
        leak = self.leak if isinstance(self.leak, float) else "per unit"
        return f"{super().extra_repr()}, leak={leak}"


class AntisymmetricRNN(ResidualRNN):
    r"""Elman RNN as an Euler step of a differential equation that neither grows nor decays.

    .. math:: h_t = h_{t-1} + \epsilon\, f\big((M - M^\top - \gamma I)\, h_{t-1} + W x_t + b\big)

    The eigenvalues of :math:`M - M^\top` are imaginary, so the equation's Jacobian only turns the
    state; gamma damps what the Euler step adds. M is ``weight_hh``: its symmetric part counts for
    nothing and gets no gradient. The paper's gated variant is not here.

    Source: Chang, Chen, Haber & Chi, 2019, where f is tanh.

    Args:
        *args: those of `FusedRNN`.
        step_size: epsilon, above 0.
        diffusion: gamma, not negative.
        **kwargs: those of `FusedRNN`.

    Inputs, outputs, parameters, errors: those of `FusedRNN`. Further:

    Raises:
        ValueError: ``step_size`` or ``diffusion`` is out of range.

    """

    def __init__(
        self, *args: Any, step_size: float = 0.1, diffusion: float = 0.01, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if not _is_number(step_size) or step_size <= 0:
            raise ValueError(f"step_size: expected a number above 0, got {step_size!r}")
        if not _is_number(diffusion) or diffusion < 0:
            raise ValueError(f"diffusion: expected a number of at least 0, got {diffusion!r}")
        self.step_size = float(step_size)
        self.diffusion = float(diffusion)

    def _coefficients(self) -> tuple[float, float]:
        return 1.0, self.step_size

    def _recurrent_matrix(self, weight_hh: Tensor) -> Tensor:
        # Not torch.eye, which is no DTensor, nor torch.diag, which ONNX does not have.
        identity = weight_hh.new_ones(self.hidden_size, self.hidden_size).tril().triu()
        return weight_hh - weight_hh.T - self.diffusion * identity

    def extra_repr(self) -> str:
        """Return the arguments of `FusedRNN` that differ from their defaults, and the two more."""
        more = f"step_size={self.step_size}, diffusion={self.diffusion}"
        return f"{super().extra_repr()}, {more}"


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return math.isfinite(value)
