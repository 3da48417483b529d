"""From adjoints to what they say: totals, contributions of a lag, memory horizons.

Shape legend: T time steps, B batch, H hidden size, G rows of the recurrent matrix (H per gate).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnn_cuda.arguments import check_bool, check_nonlinearity, check_tensor
from rnn_cuda.functional import linear_recurrence
from rnn_cuda.instruments._layers import WIDE
from rnn_cuda.instruments._segments import normalised
from rnn_cuda.reference import activation_derivative


def total_adjoint(
    direct: Tensor,
    h: Tensor,
    weight_hh: Tensor,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
) -> Tensor:
    r"""Return the total adjoint a_t = dL/dh_t of an Elman RNN, given its direct part.

    Autograd's gradient with respect to an RNN's output holds only what arrives at step t directly,
    c_t. What passes through later states comes on top: a_t = c_t + U^T (f'(h_{t+1}) a_{t+1}), one
    linear recurrence against time (the backpropagation through time of Werbos, 1990).

    Differentiable in every tensor: with ``create_graph=True`` in the call that made ``direct``, the
    result is a differentiable function of U, and can stand in a loss (:func:`omega`).

    Args:
        direct: c_t, ``(T, B, H)``, as from ``torch.autograd.grad(loss, output)``.
        h: every h_t, of that shape: the output of the layer and direction.
        weight_hh: U, ``(H, H)``.
        nonlinearity: f, one of ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"identity"``.
        reverse: whether the layer runs from the last time step to the first.

    Returns:
        ``(T, B, H)``, in the dtype of ``direct``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what was expected
            and what was given.

    Cost: one call of `linear_recurrence` and one matrix product; 3 T B H numbers.

    """
    check_states(nonlinearity, weight_hh, direct=direct, h=h)
    check_bool("reverse", reverse)
    delta = linear_recurrence(
        activation_derivative(h, nonlinearity), direct, weight_hh.mT, reverse=not reverse
    )
    return direct + _shifted(delta @ weight_hh, None, later=not reverse)


@torch.no_grad()
def lag_contribution(
    delta: Tensor, h: Tensor, h0: Tensor | None = None, *, reverse: bool = False
) -> Tensor:
    r"""Return how much every time step adds to the gradient of the recurrent matrix.

    dL/dU is the sum over t of delta_t h_{t-1}^T, with delta_t = dL/dz_t (z_t what f is applied to).
    Each term has rank one, so its Frobenius norm is |delta_t| |h_{t-1}|, exactly, without forming
    it.

    Args:
        delta: ``(T, B, G)``. For an Elman RNN ``f'(h) * total_adjoint(...)``; for a gated layer the
            adjoints of whatever is U h_{t-1} + b_hh, all gates side by side.
        h: every h_t of the layer and direction, ``(T, B, H)``.
        h0: initial state ``(B, H)``; None for zeros.
        reverse: whether the layer runs from the last time step to the first.

    Returns:
        ``(T, B)``, float64. Zero where h_{t-1} or delta_t is.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what was expected
            and what was given.

    Cost: T B (G + H) operations and float64 numbers.

    """
    for name, value in (("delta", delta), ("h", h)):
        check_tensor(name, value)
        if value.ndim != 3 or 0 in value.shape:
            raise ValueError(
                f"{name}: expected three dimensions (T, B, features), none of them 0; "
                f"got {tuple(value.shape)}"
            )
    check_bool("reverse", reverse)
    if delta.shape[:2] != h.shape[:2]:
        raise ValueError(
            f"delta: expected (T, B) = {tuple(h.shape[:2])} as h has, got {tuple(delta.shape[:2])}"
        )
    if h0 is not None:
        check_tensor("h0", h0)
        if h0.shape != h.shape[1:]:
            raise ValueError(f"h0: expected shape {tuple(h.shape[1:])}, got {tuple(h0.shape)}")
        h0 = h0.to(WIDE)
    before = _shifted(h.to(WIDE), h0, later=reverse)
    return (normalised(delta.to(WIDE))[1] + normalised(before)[1]).exp()


@torch.no_grad()
def memory_horizon(profile: Tensor, threshold: float = 1e-3, *, reverse: bool = False) -> Tensor:
    r"""Return the largest lag whose adjoint is more than ``threshold`` times that of the last step.

    The largest k with |a_{T-k}| / |a_T| > threshold, where T is the last step processed. All lags
    are looked at: a profile that dips and rises again counts with its furthest part.

    Args:
        profile: norms of dL/dh_t, ``(T, ...)``, such as `GradientFlow` records.
        threshold: the ratio, above 0.
        reverse: whether the layer runs from the last time step to the first, so that ``profile[0]``
            belongs to the last step processed.

    Returns:
        int64 of the shape of ``profile[0]``; -1 where no lag is (the last step's norm is 0, and
        there is nothing to compare with, or ``threshold`` >= 1).

    Raises:
        TypeError, ValueError: an argument does not fit, or ``profile`` has negative entries or NaN.

    Cost: a few passes over ``profile``.

    """
    check_tensor("profile", profile)
    check_bool("reverse", reverse)
    if profile.ndim == 0 or profile.shape[0] == 0:
        raise ValueError(f"profile: expected shape (T, ...) with T > 0, got {tuple(profile.shape)}")
    if not bool((profile >= 0).all()):
        raise ValueError("profile: expected norms, got a negative entry or NaN")
    if not threshold > 0:
        raise ValueError(f"threshold: expected a number above 0, got {threshold}")
    by_lag = (profile if reverse else profile.flip(0)).to(WIDE)
    reached = by_lag / by_lag[0] > threshold  # 0 / 0 is NaN, and not above
    lags = torch.arange(len(by_lag), device=profile.device).view(-1, *[1] * (profile.ndim - 1))
    return torch.where(reached & (by_lag[0] > 0), lags, -1).amax(0)


def check_states(nonlinearity: str, weight_hh: Tensor, **states: Tensor) -> None:
    """Check tensors of one shape (T, B, H), named, and U (H, H) with the device of each."""
    check_nonlinearity(nonlinearity)
    check_tensor("weight_hh", weight_hh)
    shape = weight_hh.shape
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"weight_hh: expected shape (H, H), got {tuple(shape)}")
    expected = None
    for name, value in states.items():
        check_tensor(name, value)
        if value.ndim != 3 or value.shape[2] != shape[0] or 0 in value.shape:
            raise ValueError(
                f"{name}: expected shape (T, B, {shape[0]}) with at least one time step and "
                f"sample, got {tuple(value.shape)}"
            )
        if expected is not None and value.shape != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
        if value.device != weight_hh.device:
            raise ValueError(
                f"{name}: expected a tensor on {weight_hh.device} as weight_hh is, "
                f"got {value.device}"
            )
        expected = tuple(value.shape)


def _shifted(rows: Tensor, start: Tensor | None, *, later: bool) -> Tensor:
    """Return at each t the row of t + 1 if ``later``, else that of t - 1; ``start`` fills in."""
    fill = (torch.zeros_like(rows[0]) if start is None else start).unsqueeze(0)
    return torch.cat([rows[1:], fill]) if later else torch.cat([fill, rows[:-1]])
