"""Total adjoints, contributions of a lag, memory horizons and Omega, against autograd."""

import math

import pytest
import torch
from torch import nn

from rnn_cuda import FusedRNN
from rnn_cuda.cells.elman import NONLINEARITIES, activation, activation_derivative
from rnn_cuda.functional import elman_rnn
from rnn_cuda.instruments import (
    adjoint as adjoint_module,
)
from rnn_cuda.instruments import (
    jacobian_norm,
    lag_contribution,
    memory_horizon,
    omega,
    total_adjoint,
)

pytestmark = pytest.mark.usefixtures("one_thread")
T, B, I, H = 8, 3, 2, 4


def problem(nonlinearity="tanh", reverse=False, seed=0):
    """An Elman layer and a loss on two of its steps; every h_t a tensor of its own as well."""
    torch.manual_seed(seed)
    x, h0 = torch.randn(T, B, I).double(), torch.randn(B, H).double()
    w, u = torch.randn(H, I).double(), torch.randn(H, H).double() / 2
    b = torch.full((H,), 0.5, dtype=torch.float64)
    target = torch.randn(B, H).double()
    u.requires_grad_()

    def loss(h):
        early, late = (h[4], h[-1]) if not reverse else (h[3], h[0])
        return (late - target).square().sum() + early.sin().sum()

    order = range(T - 1, -1, -1) if reverse else range(T)
    h, states, terms = h0, {}, []
    for t in order:
        z = x[t] @ w.T + h @ u.T + b
        z.retain_grad()
        h = activation(z, nonlinearity)
        h.retain_grad()
        states[t] = h
        terms.append((t, z))
    loss(torch.stack([states[t] for t in range(T)])).backward()
    adjoints = torch.stack([states[t].grad for t in range(T)])
    deltas = torch.stack([z.grad for _, z in sorted(terms, key=lambda term: term[0])])
    u_grad, u = u.grad, u.detach().requires_grad_()
    output, _ = elman_rnn(x, h0, w, u, b, nonlinearity=nonlinearity, reverse=reverse)
    return {
        "loss": loss,
        "output": output,
        "u": u,
        "h0": h0,
        "adjoints": adjoints,
        "deltas": deltas,
        "u_grad": u_grad,
    }


def direct_part(p, **options):
    return torch.autograd.grad(p["loss"](p["output"]), p["output"], **options)[0]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_the_total_adjoint_is_that_of_an_unrolled_cell(nonlinearity, reverse):
    p = problem(nonlinearity, reverse)
    direct = direct_part(p)
    found = total_adjoint(direct, p["output"], p["u"], nonlinearity=nonlinearity, reverse=reverse)
    torch.testing.assert_close(found, p["adjoints"], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(direct, p["adjoints"], rtol=0.1)  # the direct part is not it


def test_the_total_adjoint_agrees_with_the_jacobian():
    torch.manual_seed(0)
    rnn, x = FusedRNN(I, H), torch.randn(T, B, I)
    norms = 10 ** jacobian_norm(rnn, x, lags=range(T))
    output, _ = rnn(x)
    squares = torch.zeros(T, B).double()
    for unit in range(H):
        direct = torch.zeros_like(output)
        direct[-1, :, unit] = 1
        adjoint = total_adjoint(direct, output.detach(), rnn.weight_hh_l0.detach())
        squares += adjoint.double().square().sum(-1)
    torch.testing.assert_close(squares.flip(0).sqrt(), norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
def test_contributions_are_the_norms_of_the_terms_of_the_gradient(reverse):
    p = problem(reverse=reverse)
    h, delta = p["output"].detach(), p["deltas"]
    before = torch.cat([h[1:], p["h0"][None]]) if reverse else torch.cat([p["h0"][None], h[:-1]])
    terms = torch.einsum("tbi,tbj->tbij", delta, before)
    torch.testing.assert_close(terms.sum((0, 1)), p["u_grad"], rtol=1e-12, atol=1e-14)
    found = lag_contribution(delta, h, p["h0"], reverse=reverse)
    torch.testing.assert_close(found, torch.linalg.matrix_norm(terms), rtol=1e-13, atol=0)
    without = lag_contribution(delta, h, reverse=reverse)
    first = -1 if reverse else 0
    assert (without[first] == 0).all()
    assert (without != found).sum() == B


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_contributions_of_a_gated_layer_take_the_gates_side_by_side(kind):
    """The adjoint of U h_{t-1} + b_hh, by way of a bias of its own for every step."""
    torch.manual_seed(0)
    layer = kind(I, H).double()
    x = torch.randn(T, B, I).double()
    gates = layer.bias_hh_l0.numel()
    biases = layer.bias_hh_l0.detach().repeat(T, B, 1).requires_grad_()
    outputs = []
    for b in range(B):
        state, rows = None, []
        for t in range(T):
            weights = {**dict(layer.named_parameters()), "bias_hh_l0": biases[t, b]}
            row, state = torch.func.functional_call(
                layer, weights, (x[t : t + 1, b : b + 1], state)
            )
            rows.append(row)
        outputs.append(torch.cat(rows))
    output = torch.cat(outputs, dim=1)
    (delta,) = torch.autograd.grad(output[-1].square().sum(), biases)
    assert delta.shape == (T, B, gates)
    plain, _ = layer(x)
    (of_u,) = torch.autograd.grad(plain[-1].square().sum(), layer.weight_hh_l0)
    terms = torch.einsum("tbi,tbj->tbij", delta[1:], plain.detach()[:-1])
    torch.testing.assert_close(terms.sum((0, 1)), of_u)
    found = lag_contribution(delta, plain)
    torch.testing.assert_close(found[1:], torch.linalg.matrix_norm(terms))


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


@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid", "identity"])
def test_the_papers_form_is_equation_nine(nonlinearity):
    p = problem(nonlinearity)
    h = p["output"].detach()
    found = omega(p["adjoints"], h, p["u"], nonlinearity=nonlinearity)
    expected = paper_omega(p["u"], p["adjoints"], h, activation_derivative(h, nonlinearity))
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, p["u"])
    (immediate,) = torch.autograd.grad(expected, p["u"])  # adjoints and h constant, as in eq. 10
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
    h, adjoints = p["output"], p["adjoints"].clone()
    adjoints[1, 2] *= 1e-12  # below the bound on its square
    adjoints[2, 0] = 0
    found = omega(adjoints.requires_grad_(), h, p["u"], form="code")
    constant = adjoints.detach(), h.detach()
    expected = code_omega(p["u"], *constant, 1e-20)
    torch.testing.assert_close(found, expected)
    assert not math.isclose(found.item(), omega(*constant, p["u"]).item())
    (gradient,) = torch.autograd.grad(found, p["u"])
    (same,) = torch.autograd.grad(expected, p["u"])
    torch.testing.assert_close(gradient, same)
    assert torch.autograd.grad(
        omega(adjoints, h, p["u"], form="code"), adjoints, allow_unused=True
    ) == (None,)


def test_omega_by_way_of_the_total_adjoint_is_differentiable_in_u():
    p = problem()
    torch.manual_seed(1)
    x, w = torch.randn(T, B, I).double(), torch.randn(H, I).double()

    def regulariser(u):
        h, _ = elman_rnn(x, p["h0"], w, u)
        (direct,) = torch.autograd.grad(p["loss"](h), h, create_graph=True)
        return omega(total_adjoint(direct, h, u), h, u)

    u = p["u"]
    assert torch.autograd.gradcheck(regulariser, (u,))
    (full,) = torch.autograd.grad(regulariser(u), u)
    h, _ = elman_rnn(x, p["h0"], w, u)
    (direct,) = torch.autograd.grad(p["loss"](h), h)
    constant = total_adjoint(direct, h, u).detach(), h.detach()
    (immediate,) = torch.autograd.grad(omega(*constant, u), u)
    assert not torch.allclose(full, immediate, rtol=0.01)


def test_the_gradient_check_notices_an_adjoint_that_is_the_direct_part_only(monkeypatch):
    p = problem()
    right = omega(total_adjoint(direct_part(p), p["output"], p["u"]), p["output"], p["u"])
    torch.testing.assert_close(right, omega(p["adjoints"], p["output"], p["u"]))
    monkeypatch.setattr(
        adjoint_module, "linear_recurrence", lambda d, g, m, **_: torch.zeros_like(g)
    )
    wrong = omega(total_adjoint(direct_part(p), p["output"], p["u"]), p["output"], p["u"])
    assert abs(float(wrong.detach()) / float(right.detach()) - 1) > 0.01


def test_omega_counts_adjoints_whose_squares_leave_the_range():
    p = problem()
    h, u = p["output"].detach(), p["u"].detach()
    expected = float(omega(p["adjoints"], h, u))
    small = omega((p["adjoints"] * 1e-35).float(), h, u)
    assert float(small) == pytest.approx(expected, rel=1e-2)  # float32 itself is short of digits
    assert float(omega(p["adjoints"] * 1e-250, h, u)) == pytest.approx(expected, rel=1e-12)
    assert float(omega(p["adjoints"] * 1e250, h, u)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_steps_without_an_adjoint_add_nothing_and_keep_the_gradient_finite(form):
    p = problem("relu")
    adjoints, h = p["adjoints"].clone(), p["output"].detach().clone()
    adjoints[:4] = 0
    h[5] = 0  # nothing passes: the gain is 0
    found = omega(adjoints.requires_grad_(), h, p["u"], nonlinearity="relu", form=form)
    assert found.isfinite()
    (gradient,) = torch.autograd.grad(found, p["u"])
    assert gradient.isfinite().all()
    later = slice(4, None)
    alone = omega(adjoints[later], h[later], p["u"], nonlinearity="relu", form=form)
    torch.testing.assert_close(found, alone)
    nothing = omega(adjoints[:4], h[:4], p["u"], nonlinearity="relu", form=form)
    assert float(nothing.detach()) == 0


STATE, U = torch.zeros(4, 2, 3), torch.eye(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: total_adjoint([1], STATE, U), TypeError, "direct should be a Tensor, got: list"),
        (lambda: total_adjoint(STATE, STATE[1:], U), ValueError, r"h: expected shape \(4, 2, 3\)"),
        (lambda: total_adjoint(STATE, STATE, U[1:]), ValueError, r"weight_hh: .*\(H, H\)"),
        (lambda: total_adjoint(STATE, STATE, U, reverse=1), TypeError, "reverse should be"),
        (
            lambda: total_adjoint(STATE, STATE, U, nonlinearity="gelu"),
            ValueError,
            "Unknown nonlinearity 'gelu'",
        ),
        (lambda: omega(STATE[0], STATE, U), ValueError, r"adjoint: expected shape \(T, B, 3\)"),
        (lambda: omega(STATE, STATE, U, form="theano"), ValueError, "form: expected 'paper' or"),
        (lambda: lag_contribution(STATE, STATE[:2]), ValueError, r"delta: expected \(T, B\) ="),
        (lambda: lag_contribution(STATE[0], STATE), ValueError, "delta: expected three"),
        (lambda: lag_contribution(STATE, STATE, STATE), ValueError, r"h0: expected shape \(2, 3\)"),
        (lambda: memory_horizon(torch.zeros(0, 2)), ValueError, "profile: expected shape"),
        (lambda: memory_horizon(torch.tensor([-1.0])), ValueError, "profile: expected norms"),
        (lambda: memory_horizon(torch.ones(3), 0), ValueError, "threshold: expected .* got 0"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
