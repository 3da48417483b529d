"""Lyapunov exponents: systems whose exponents are known, published cases, autograd."""

import math

import pytest
import torch
from torch import nn

from rnn_cuda import FusedRNN, backend
from rnn_cuda.instruments import (
    gradient_flossing,
    lyapunov,
    lyapunov_exponents,
    regularisers,
    relaxation_time,
)
from rnn_cuda.trajectory import Trajectory
from tests.unrolled import KINDS, Unrolled, make

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_rnn(u):
    rnn = FusedRNN(1, len(u), nonlinearity="identity", bias=False, dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(u)
    return rnn


class Given(Trajectory):
    """A trajectory with given Jacobians, (T, B, S, S)."""

    def __init__(self, jacobians):
        self.jacobians = jacobians
        self.states = jacobians.new_zeros(len(jacobians) + 1, *jacobians.shape[1:3])

    def push(self, block, start, stop):
        for j in self.jacobians[start:stop]:
            block = block @ j.mT
        return block


def test_a_linear_system_has_the_logarithms_of_its_eigenvalues():
    torch.manual_seed(0)
    angle = torch.tensor(0.7).double()
    turn = 0.9 * torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    blocks = torch.block_diag(
        torch.tensor([[1.3]]), turn, torch.tensor([[-0.5]]), torch.ones(1, 1) / 9
    )
    q = torch.linalg.qr(torch.randn(5, 5).double()).Q
    expected = torch.tensor([1.3, 0.9, 0.9, 0.5, 1 / 9]).double().log()
    x = torch.zeros(400, 3, 1).double()
    normal = lyapunov_exponents(linear_rnn(q @ blocks @ q.T), x, 5, warmup=200)
    torch.testing.assert_close(normal, expected.expand(3, -1), rtol=0, atol=1e-6)

    # Not normal: what a finite trajectory adds goes down with 1 / T.
    skew = torch.randn(5, 5).double()
    u = skew @ blocks @ torch.linalg.inv(skew)
    found = lyapunov_exponents(linear_rnn(u), torch.zeros(4000, 1, 1).double(), 5, warmup=200)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("gain", [1e-20, 1e20])
def test_steps_that_shrink_or_grow_by_twenty_decades_are_taken_a_few_at_a_time(gain):
    u = gain * torch.linalg.qr(torch.randn(4, 4).double()).Q
    found = lyapunov_exponents(linear_rnn(u), torch.zeros(100, 2, 1).double(), 3)
    expected = torch.full((2, 3), math.log(gain), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_the_tent_map_has_the_logarithm_of_its_slope():
    """x' = a min(x, 1 - x) = a h_1 - 2 a h_2 with two relus, h = (relu(x), relu(x - 1/2))."""
    slope = 1.9
    rnn = FusedRNN(1, 2, nonlinearity="relu", dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(torch.tensor([[slope, -2 * slope]] * 2, dtype=torch.float64))
        rnn.bias_hh_l0.copy_(torch.tensor([0, -0.5]))
        rnn.weight_ih_l0.zero_(), rnn.bias_ih_l0.zero_()
    start = torch.tensor([[[0.3, 0.0], [0.7, 0.2]]]).double()
    found = lyapunov_exponents(rnn, torch.zeros(1000, 2, 1).double(), 2, start)
    # A tangent (1, 0) or (1, 1): its first and last norm may differ by the root of two.
    assert bool(((found[:, 0] - math.log(slope)).abs() <= math.log(2) / 2 / 900 + 1e-12).all())
    assert found[:, 1].isneginf().all()  # the map has one dimension


def test_the_henon_map_has_its_published_exponents():
    """0.41922, -1.62319: J. C. Sprott, Chaos and Time-Series Analysis (2003); a, b = 1.4, 0.3."""
    torch.manual_seed(0)
    x, y = torch.rand(2, 100).double() * 0.2 - 0.1
    jacobians = torch.zeros(2000, 100, 2, 2).double()
    jacobians[:, :, 0, 1], jacobians[:, :, 1, 0] = 1, 0.3
    for j in jacobians:
        j[:, 0, 0] = -2.8 * x
        x, y = 1 - 1.4 * x * x + y, 0.3 * x
    found = lyapunov.exponents_of(Given(jacobians), 2, 100, 1e6, seeded())
    torch.testing.assert_close(found.sum(1), torch.full((100,), math.log(0.3), dtype=torch.float64))
    error = found[:, 0].std() / 10
    assert error < 0.002
    assert abs(found[:, 0].mean() - 0.41922) < 4 * error


def exponents_step_by_step(module, x, hx, count, warmup, where):
    """QR at every step, with Jacobians from autograd."""
    oracle = Unrolled(module, x, hx, **where)
    batch, size = len(oracle.states[0][0]), sum(part.shape[1] for part in oracle.states[0])
    q = torch.linalg.qr(torch.randn(batch, size, count, dtype=torch.float64, generator=seeded())).Q
    total = torch.zeros(batch, count).double()
    for t in range(1, len(oracle.states)):
        j = torch.stack([oracle.jacobian(t, b) for b in range(batch)])
        q, r = torch.linalg.qr(j @ q)
        if t > warmup:
            total += r.diagonal(dim1=-2, dim2=-1).abs().log()
    return total / (len(oracle.states) - 1 - warmup)


BACKWARD = {"num_layers": 2, "bidirectional": True, "batch_first": True}


@pytest.mark.parametrize(
    ("kind", "options", "where", "name"),
    [(kind, {}, {}, "auto") for kind in KINDS]
    + [(kind, {}, {}, "reference") for kind in ("RNN", "LeakyRNN", "GRU", "LSTM")]
    + [
        (k, BACKWARD, {"layer": 1, "reverse": True}, "auto") for k in ("FusedRNN", "LSTM_projected")
    ],
)
def test_exponents_are_those_of_a_decomposition_at_every_step(kind, options, where, name):
    torch.manual_seed(0)
    module = make(kind, **options)
    x = torch.randn(2, 30, 3) if module.batch_first else torch.randn(30, 2, 3)
    count = 1 if "relu" in kind else 3  # closed units leave no more than that
    with backend.use(name):
        found = lyapunov_exponents(module, x, count, warmup=7, generator=seeded(), **where)
    expected = exponents_step_by_step(module, x, None, count, 7, where)
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_an_lstm_remembers_in_c_what_h_alone_would_have_forgotten():
    lstm = nn.LSTM(2, 4)
    with torch.no_grad():
        lstm.weight_hh_l0.zero_(), lstm.weight_ih_l0.zero_()
        lstm.bias_ih_l0.zero_(), lstm.bias_hh_l0.zero_()
        lstm.bias_ih_l0[4:8] = 5.0  # the forget gates' bias
    found = lyapunov_exponents(lstm, torch.randn(50, 2, 2), 8)
    torch.testing.assert_close(
        found[:, :4], torch.full((2, 4), math.log(1 / (1 + math.exp(-5))), dtype=torch.float64)
    )
    assert found[:, 4:].isneginf().all()  # h takes no part in its own next value
    assert relaxation_time(found[0, 0]) == pytest.approx(148.9, abs=0.1)


@pytest.mark.parametrize(
    ("kind", "count"), [("FusedRNN", 16), ("FusedRNN_relu", 3), ("GRU", 3), ("LSTM", 16)]
)
def test_segments_change_nothing(kind, count, monkeypatch):
    torch.manual_seed(0)
    cls, options = KINDS[kind]
    module, x = cls(3, 16, **options), torch.randn(200, 2, 3)
    pushes = []
    right = Trajectory.push

    def push(self, block, start, stop):
        pushes.append(stop - start)
        return right(self, block, start, stop)

    monkeypatch.setattr(Trajectory, "push", push)
    segmented = lyapunov_exponents(module, x, count, generator=seeded())
    assert count > 3 or len(pushes) < 40
    pushes.clear()
    monkeypatch.setattr(lyapunov, "_SPREAD", 1.001)
    at_each = lyapunov_exponents(module, x, count, generator=seeded())
    assert len(pushes) >= 180
    torch.testing.assert_close(segmented, at_each, rtol=0, atol=1e-10)


def test_relaxation_time_has_its_limits():
    found = relaxation_time(torch.tensor([-0.5, -math.inf, 0.0, 0.1]))
    assert found.tolist() == [2.0, 0.0, math.inf, math.inf]
    assert float(relaxation_time(-0.25)) == 4


RNN, X = FusedRNN(3, 5), torch.zeros(4, 2, 3)


@pytest.mark.parametrize("function", [lyapunov_exponents, gradient_flossing])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((nn.Linear(3, 5), X, 1), {}, TypeError, "module should be a recurrent layer"),
        ((RNN, X, 0), {}, ValueError, "count must be greater than zero"),
        ((RNN, X, 6), {}, ValueError, "count: expected at most 5, the size of the state; got 6"),
        ((nn.LSTM(3, 5), X, 11), {}, ValueError, "count: expected at most 10"),
        ((RNN, X, 1.0), {}, TypeError, "count should be of type int"),
        ((RNN, X, 1), {"warmup": 4}, ValueError, "warmup: expected 0 to 3.* got 4"),
        ((RNN, X, 1), {"warmup": -1}, ValueError, "warmup: expected 0 to 3"),
        ((RNN, X, 1), {"layer": 2}, ValueError, "layer: expected 0 to 0"),
    ],
)
def test_bad_arguments_are_named(function, arguments, options, error, message):
    with pytest.raises(error, match=message):
        function(*arguments, **options)


# ---- gradient flossing ---------------------------------------------------------------------------


def test_flossing_is_the_mean_squared_exponent():
    torch.manual_seed(0)
    for kind in ("FusedRNN", "GRU", "LSTM"):
        module, x = make(kind), torch.randn(30, 2, 3)
        loss = gradient_flossing(module, x, 3, warmup=5, generator=seeded())
        exponents = lyapunov_exponents(module, x, 3, warmup=5, generator=seeded())
        assert loss.item() == pytest.approx(float(exponents.square().mean()), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "spread"),
    [
        ("FusedRNN", 1.001),
        ("FusedRNN", 1e4),
        ("FusedRNN_sigmoid", 1.001),
        ("RNN", 1e4),
        ("LeakyRNN", 1.001),
        ("AntisymmetricRNN", 1e4),
        ("GRU", 1.001),
        ("LSTM", 1e4),
    ],
)
def test_the_gradient_of_flossing_is_that_of_finite_differences(kind, spread, monkeypatch):
    monkeypatch.setattr(regularisers, "_SPREAD", spread)
    torch.manual_seed(0)
    module = make(kind, 2, 4).double()
    x = torch.randn(5, 2, 2).double().requires_grad_()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def loss(x, *parameters):
        def forward(module, x):
            return gradient_flossing(module, x, 2, generator=seeded())

        weights = {f"module.{n}": p for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(_Wrapped(module, forward), weights, (x,))

    assert torch.autograd.gradcheck(loss, (x, *parameters), atol=1e-7, rtol=1e-5)


class _Wrapped(nn.Module):
    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args):
        return self.function(self.module, *args)


def test_flossing_refuses_exponents_that_have_no_gradient():
    relu = FusedRNN(1, 4, nonlinearity="relu")
    with torch.no_grad():
        for parameter in relu.parameters():
            parameter.copy_(parameter.abs())
        relu.bias_ih_l0[2:] = -9
    with pytest.raises(ValueError, match=r"count: expected at most 2.* finite .* got 3"):
        gradient_flossing(relu, torch.ones(5, 1, 1), 3)
