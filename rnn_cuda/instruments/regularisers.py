"""Loss terms that hold gradients up: Pascanu's Omega and gradient flossing.

Shape legend: T time steps, B batch, H hidden size, S size of the carried state, K exponents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rnn_cuda.cells.elman import activation_derivative
from rnn_cuda.instruments.adjoint import check_states
from rnn_cuda.instruments.lyapunov import exponents_of, prepare
from rnn_cuda.linear_algebra import normalised
from rnn_cuda.trajectory import WIDE, Recurrent, State

# The derivative of a QR decomposition divides by R once more, so R is kept better conditioned than
# for the exponents alone.
_SPREAD = 1e4


def omega(
    adjoint: Tensor,
    h: Tensor,
    weight_hh: Tensor,
    *,
    nonlinearity: str = "tanh",
    form: str = "paper",
    bound: float = 1e-20,
) -> Tensor:
    r"""Return the regulariser of Pascanu, Mikolov and Bengio (2013) for an Elman RNN.

    It asks every step to hand the adjoint on at its norm. With the total adjoint a_t = dL/dh_t,
    delta_t = f'(h_t) a_t and the step gain q_t = |U^T delta_t| / |a_t|:

    * ``"paper"`` (eq. 9): sum over t of (q_t - 1)^2, mean over the samples. A step with a_t = 0
      adds nothing. The derivative goes through ``adjoint`` and ``h`` as far as they have a graph;
      the paper holds both constant ("immediate" derivative): detach them for that.
    * ``"code"``, what the authors' published program does: mean of (q_t^2 - 1)^2 over the active
      pairs (t, sample), those with |a_t|^2 >= ``bound``, ``adjoint`` and ``h`` held constant.
      0 if none is active.

    (The paper writes the recurrence for the state before f; like the program, this takes h.)

    Args:
        adjoint: every a_t, ``(T, B, H)`` (from :func:`total_adjoint`, which is differentiable, or
            from what `GradientFlow` records).
        h: every h_t, of that shape.
        weight_hh: U, ``(H, H)``.
        nonlinearity: f, one of ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"identity"``,
            ``"softplus"``.
        form: ``"paper"`` or ``"code"``.
        bound: for the code's form; the program's own value by default.

    Returns:
        A scalar, computed in float64 whatever the dtypes, so that adjoints whose squares leave the
        range of float32 count as what they are.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what was expected
            and what was given.

    Cost: one matrix product, 2 T B H^2 operations, and memory for T B H float64 numbers.

    """
    check_states(nonlinearity, weight_hh, adjoint=adjoint, h=h)
    if form not in ("paper", "code"):
        raise ValueError(f"form: expected 'paper' or 'code', got {form!r}")
    if form == "code":
        adjoint, h = adjoint.detach(), h.detach()
    direction, log_norm = normalised(adjoint.to(WIDE))
    travelled = activation_derivative(h.to(WIDE), nonlinearity) * direction @ weight_hh.to(WIDE)
    if form == "code":
        active = log_norm >= math.log(bound) / 2
        terms = (travelled.square().sum(-1) - 1).square() * active
        return terms.sum() / active.sum().clamp(min=1)
    gain = torch.linalg.vector_norm(travelled, dim=-1)
    return ((gain - 1).square() * (log_norm > -math.inf)).sum() / adjoint.shape[1]


def gradient_flossing(
    module: Recurrent,
    input: Tensor,
    count: int,
    hx: State | None = None,
    *,
    warmup: int = 0,
    layer: int = 0,
    reverse: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the mean of lambda_i^2 over the ``count`` largest Lyapunov exponents and the samples.

    As a loss it draws the exponents, and with them the singular values of long Jacobian products,
    towards the value where gradients neither vanish nor explode (Engelken, 2023, "Gradient
    flossing"). Differentiable in the parameters of the module (and in ``input`` and ``hx``),
    through the trajectory, the tangents and the QR decompositions.

    Args:
        module: as in :func:`lyapunov_exponents`, as are the other arguments.
        input: the sequence.
        count: K, 1 to S.
        hx: initial states.
        warmup: how many steps at the beginning do not count.
        layer: which layer.
        reverse: whether its backward direction is meant.
        generator: where the first Q is drawn from.

    Returns:
        A float64 scalar.

    Raises:
        TypeError, ValueError: as in :func:`lyapunov_exponents`; ValueError too if an exponent is
            -inf, for then the loss has no gradient.

    Cost: that of :func:`lyapunov_exponents`, about three times with the backward pass; memory for
    all K * S * T * B tangents.

    """
    trajectory, warmup = prepare(module, input, hx, count, warmup, layer, reverse)
    exponents = exponents_of(trajectory, count, warmup, _SPREAD, generator)
    if exponents.isinf().any():
        finite = int(exponents.isfinite().all(0).sum())
        raise ValueError(
            f"count: expected at most {finite}, the number of exponents that are finite for every "
            f"sample; got {count}"
        )
    return exponents.square().mean()
