"""Elman RNNs whose state has a path of its own from step to step: leaky and antisymmetric.

Both are ``h_t = keep * h_{t-1} + rate * f(W x_t + A h_{t-1} + b)``. The native kernel computes
``f(...)`` alone, with one f for all units, and the part that is carried on without f cannot be
folded into that for a bounded f. So these modules run in plain PyTorch, one time step at a time:
with everything that `FusedRNN` takes, as differentiable as it is, and as slow as a loop. They are
no `FusedRNN`. The instruments take them.

Shape legend: T time steps, B batch, I input size, H hidden size, N = sum(batch_sizes) packed rows.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rnn_cuda import _expanded_weights
from rnn_cuda.cells import Leaky, State
from rnn_cuda.functional import check_layer
from rnn_cuda.modules import ElmanStack
from rnn_cuda.reference import compute_dtype, join_directions, run_cell


class ResidualRNN(ElmanStack):
    """What the two have in common; a subclass says what keep, rate and A are."""

    def _layer(
        self,
        sequence: Tensor,
        states: State,
        weights: Sequence[list[Tensor]],
        batch_sizes: Tensor | None,
        tap: Any = None,
    ) -> tuple[Tensor, ...]:
        check_layer(sequence, states, weights, self._cell_name, batch_sizes)
        if any(map(_expanded_weights.are_among, (*weights, states))):
            raise TypeError(
                f"weights: expected plain tensors, got ExpandedWeights, and {type(self).__name__} "
                "takes none; for gradients per sample use torch.func.vmap(torch.func.grad(...))"
            )
        return join_directions(
            self._direction(sequence, [state[d] for state in states], its, batch_sizes, d == 1)
            for d, its in enumerate(weights)
        )

    def _direction(
        self,
        sequence: Tensor,
        states: Sequence[Tensor],
        weights: list[Tensor],
        batch_sizes: Tensor | None,
        reverse: bool,
    ) -> tuple[State, State]:
        wide = compute_dtype(sequence.dtype)
        weight_ih, weight_hh, *biases = (weight.to(wide) for weight in weights)
        input_sums = sequence.flatten(0, -2).to(wide) @ weight_ih.T + sum(biases)
        batch = sequence.shape[1] if batch_sizes is None else int(batch_sizes[0])
        start = tuple(states) or (sequence.new_zeros(batch, self.hidden_size),)
        options: Any = {"reverse": reverse, "batch_sizes": batch_sizes}
        matrix = self._recurrent_matrix(weight_hh)
        (output,), finals = run_cell(self._cell(), input_sums, start, matrix, **options)
        return (output.view(*sequence.shape[:-1], self.hidden_size),), finals

    def _cell(self) -> Leaky:
        return Leaky(self.nonlinearity, *self._coefficients())


class LeakyRNN(ResidualRNN):
    r"""Elman RNN of leaky integrators: a share ``leak`` of the state is renewed at each step.

    .. math:: h_t = (1 - a)\, h_{t-1} + a\, f(W x_t + U h_{t-1} + b), \qquad a = \mathrm{leak}

    A unit averages over about ``1 / a`` steps. The step's Jacobian is
    :math:`(1 - a) I + a\, \mathrm{diag}(f') U`, so the path past f alone carries
    :math:`(1 - a)^k` of the gradient over a lag of k. It runs as a loop over time in PyTorch.

    Source: Jaeger, Lukosevicius, Popovici & Siewert, 2007 (leaky integrator units).

    Args:
        *args: those of `FusedRNN`.
        leak: a, above 0 and at most 1; 1 is the plain Elman RNN. The default remembers ten steps.
        **kwargs: those of `FusedRNN`.

    Inputs, outputs, parameters, errors: those of `FusedRNN`. Further:

    Raises:
        ValueError: ``leak`` is not a number in (0, 1].

    """

    def __init__(self, *args: Any, leak: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not _is_number(leak) or not 0 < leak <= 1:
            raise ValueError(f"leak: expected a number above 0 and at most 1, got {leak!r}")
        self.leak = float(leak)

    def _coefficients(self) -> tuple[float, float]:
        return 1 - self.leak, self.leak

    def extra_repr(self) -> str:
        """Return the arguments of `FusedRNN` that differ from their defaults, and ``leak``."""
        return f"{super().extra_repr()}, leak={self.leak}"


class AntisymmetricRNN(ResidualRNN):
    r"""Elman RNN as an Euler step of a differential equation that neither grows nor decays.

    .. math:: h_t = h_{t-1} + \epsilon\, f\big((M - M^\top - \gamma I)\, h_{t-1} + W x_t + b\big)

    The eigenvalues of :math:`M - M^\top` are imaginary, so the equation's Jacobian only turns the
    state; gamma damps what the Euler step adds. M is ``weight_hh``: its symmetric part counts for
    nothing and gets no gradient. The paper's gated variant is not here. It runs as a loop over time
    in PyTorch.

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
