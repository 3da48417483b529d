"""Total adjoints, contributions of a lag, memory horizons and Omega, against autograd."""

import math
from types import SimpleNamespace

import pytest
import torch

from rnn_cuda.cells.elman import NONLINEARITIES, activation, activation_derivative
from rnn_cuda.functional import elman_rnn
from rnn_cuda.instruments import lag_contribution, memory_horizon, omega, total_adjoint

pytestmark = pytest.mark.usefixtures("one_thread")
T, B, I, H = 8, 3, 2, 4


def problem(nonlinearity="tanh", reverse=False):
    """An Elman layer and a loss on two of its steps; every h_t a tensor of its own as well."""
    torch.manual_seed(0)
    x, h0 = torch.randn(T, B, I).double(), torch.randn(B, H).double()
    w, u = torch.randn(H, I).double(), torch.randn(H, H).double() / 2
    b, target = torch.full((H,), 0.5, dtype=torch.float64), torch.randn(B, H).double()
    u.requires_grad_()

    def loss(h):
        early, late = (h[3], h[0]) if reverse else (h[4], h[-1])
        return (late - target).square().sum() + early.sin().sum()

    h, sums, states = h0, [None] * T, [None] * T
    for t in range(T - 1, -1, -1) if reverse else range(T):
        sums[t] = x[t] @ w.T + h @ u.T + b
        h = states[t] = activation(sums[t], nonlinearity)
    of_sums = torch.autograd.grad(loss(torch.stack(states)), [*sums, *states, u])
    deltas, adjoints = torch.stack(of_sums[:T]), torch.stack(of_sums[T:-1])
    output, _ = elman_rnn(x, h0, w, u, b, nonlinearity=nonlinearity, reverse=reverse)
    (direct,) = torch.autograd.grad(loss(output), output, retain_graph=True)
    return SimpleNamespace(
        loss=loss,
        output=output,
        direct=direct,
        x=x,
        w=w,
        u=u,
        h0=h0,
        adjoints=adjoints,
        deltas=deltas,
        u_grad=of_sums[-1],
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_the_total_adjoint_is_that_of_an_unrolled_cell(nonlinearity, reverse):
    p = problem(nonlinearity, reverse)
    found = total_adjoint(p.direct, p.output, p.u, nonlinearity=nonlinearity, reverse=reverse)
    torch.testing.assert_close(found, p.adjoints, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(p.direct, p.adjoints, rtol=0.1)  # the direct part is not it


@pytest.mark.parametrize("reverse", [False, True])
def test_contributions_are_the_norms_of_the_terms_of_the_gradient(reverse):
    p = problem(reverse=reverse)
    h, delta = p.output.detach(), p.deltas
    before = torch.cat([h[1:], p.h0[None]]) if reverse else torch.cat([p.h0[None], h[:-1]])
    terms = torch.einsum("tbi,tbj->tbij", delta, before)
    torch.testing.assert_close(terms.sum((0, 1)), p.u_grad, rtol=1e-12, atol=1e-14)
    found = lag_contribution(delta, h, p.h0, reverse=reverse)
    torch.testing.assert_close(found, torch.linalg.matrix_norm(terms), rtol=1e-13, atol=0)
    without = lag_contribution(delta, h, reverse=reverse)
    assert (without[-1 if reverse else 0] == 0).all()
    assert (without != found).sum() == B
    # A gated layer's delta has its gates side by side.
    of_gates = lag_contribution(torch.cat([delta, -delta, 2 * delta], -1), h, p.h0, reverse=reverse)
    torch.testing.assert_close(of_gates, 6**0.5 * found, rtol=1e-13, atol=0)


def test_contributions_do_not_underflow_before_the_gradients_do():
    delta, h = torch.full((3, 1, 2), 1e-30), torch.full((3, 1, 2), 0.5)
    found = lag_contribution(delta, h)
    assert found[:, 0].tolist() == [0, *[pytest.approx(1e-30, rel=1e-6)] * 2]
    tiny = lag_contribution(delta.double() * 1e-200, h)
    assert float(tiny[1, 0]) == pytest.approx(1e-230, rel=1e-6)


def test_the_memory_horizon_is_the_furthest_lag_above_the_threshold():
    profile = torch.tensor([[1e-9, 0.0], [1e-2, 0.0], [1e-5, 5e-4], [1e-1, 0.5], [1.0, 1.0]])
    assert memory_horizon(profile).tolist() == [3, 1]
    assert memory_horizon(profile, 0.05).tolist() == [1, 1]
    assert memory_horizon(profile.flip(0), reverse=True).tolist() == [3, 1]
    assert int(memory_horizon(profile[:, 0])) == 3
    assert memory_horizon(profile, 1e-30).tolist() == [4, 2]
    assert int(memory_horizon(torch.tensor([1.0, 0.0]))) == -1
    assert int(memory_horizon(torch.tensor([1e-300, 1e-310], dtype=torch.float64))) == 1


# ---- Omega ---------------------------------------------------------------------------------------


def paper_omega(u, adjoints, h, derivative):
    """Eq. 9 as it stands, one step and one sample at a time."""
    total = 0.0
    for t in range(T):
        for b in range(B):
            step = torch.diag(derivative[t, b]) @ u  # dh_t / dh_{t-1}
            total = total + ((adjoints[t, b] @ step).norm() / adjoints[t, b].norm() - 1) ** 2
    return total / B


@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid", "identity", "softplus"])
def test_the_papers_form_is_equation_nine(nonlinearity):
    p = problem(nonlinearity)
    h = p.output.detach()
    found = omega(p.adjoints, h, p.u, nonlinearity=nonlinearity)
    expected = paper_omega(p.u, p.adjoints, h, activation_derivative(h, nonlinearity))
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, p.u)
    (immediate,) = torch.autograd.grad(expected, p.u)  # adjoints and h constant, as in eq. 10
    torch.testing.assert_close(gradient, immediate)


def code_omega(u, adjoints, h, bound):
    """What the published program computes, in its own layout: rows times the transpose."""
    w_hh = u.T
    passed = ((adjoints * (1 - h**2)) @ w_hh.T).square().sum(2)
    arriving = adjoints.square().sum(2)
    active = arriving >= bound
    terms = (torch.where(active, passed / torch.where(active, arriving, 1), 1) - 1) ** 2
    return terms.mean(1).sum() / active.double().mean(1).sum()


def test_the_codes_form_is_that_of_the_published_program():
    p = problem()
    h, adjoints = p.output, p.adjoints.clone()
    adjoints[1, 2] *= 1e-12  # below the bound on its square
    adjoints[2, 0] = 0
    found = omega(adjoints.requires_grad_(), h, p.u, form="code")
    constant = adjoints.detach(), h.detach()
    expected = code_omega(p.u, *constant, 1e-20)
    torch.testing.assert_close(found, expected)
    assert not math.isclose(found.item(), omega(*constant, p.u).item())
    gradient, none = torch.autograd.grad(found, (p.u, adjoints), allow_unused=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, p.u)[0])
    assert none is None


def test_omega_by_way_of_the_total_adjoint_is_differentiable_in_u():
    p = problem()

    def regulariser(u):
        h, _ = elman_rnn(p.x, p.h0, p.w, u)
        (direct,) = torch.autograd.grad(p.loss(h), h, create_graph=True)
        return omega(total_adjoint(direct, h, u), h, u)

    assert torch.autograd.gradcheck(regulariser, (p.u,))


def test_omega_counts_adjoints_whose_squares_leave_the_range():
    p = problem()
    h, u = p.output.detach(), p.u.detach()
    expected = float(omega(p.adjoints, h, u))
    small = omega((p.adjoints * 1e-35).float(), h, u)
    assert float(small) == pytest.approx(expected, rel=1e-2)  # float32 itself is short of digits
    for factor in (1e-250, 1e250):
        assert float(omega(p.adjoints * factor, h, u)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_steps_without_an_adjoint_add_nothing_and_keep_the_gradient_finite(form):
    p = problem("relu")
    adjoints, h = p.adjoints.clone(), p.output.detach().clone()
    adjoints[:4] = 0
    h[5] = 0  # nothing passes: the gain is 0
    found = omega(adjoints.requires_grad_(), h, p.u, nonlinearity="relu", form=form)
    assert found.isfinite()
    (gradient,) = torch.autograd.grad(found, p.u)
    assert gradient.isfinite().all()
    alone = omega(adjoints[4:], h[4:], p.u, nonlinearity="relu", form=form)
    torch.testing.assert_close(found, alone)
    nothing = omega(adjoints[:4], h[:4], p.u, nonlinearity="relu", form=form)
    assert float(nothing.detach()) == 0


STATE, U = torch.zeros(4, 2, 3), torch.eye(3)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (total_adjoint, ([1], STATE, U), TypeError, "direct should be a Tensor, got: list"),
        (total_adjoint, (STATE, STATE[1:], U), ValueError, r"h: expected shape \(4, 2, 3\)"),
        (total_adjoint, (STATE, STATE, U[1:]), ValueError, r"weight_hh: .*\(H, H\)"),
        (total_adjoint, (STATE, STATE, U, {"reverse": 1}), TypeError, "reverse should be"),
        (total_adjoint, (STATE, STATE, U, {"nonlinearity": "gelu"}), ValueError, "Unknown .*gelu"),
        (omega, (STATE[0], STATE, U), ValueError, r"adjoint: expected shape \(T, B, 3\)"),
        (omega, (STATE, STATE, U, {"form": "theano"}), ValueError, "form: expected 'paper' or"),
        (lag_contribution, (STATE, STATE[:2]), ValueError, r"delta: expected \(T, B\) ="),
        (lag_contribution, (STATE[0], STATE), ValueError, "delta: expected three"),
        (lag_contribution, (STATE, STATE, STATE), ValueError, r"h0: expected shape \(2, 3\)"),
        (memory_horizon, (torch.zeros(0, 2),), ValueError, "profile: expected shape"),
        (memory_horizon, (torch.tensor([-1.0]),), ValueError, "profile: expected norms"),
        (memory_horizon, (torch.ones(3), 0), ValueError, "threshold: expected .* got 0"),
    ],
)
def test_bad_arguments_are_named(function, arguments, error, message):
    options = arguments[-1] if isinstance(arguments[-1], dict) else {}
    with pytest.raises(error, match=message):
        function(*arguments[: len(arguments) - bool(options)], **options)
