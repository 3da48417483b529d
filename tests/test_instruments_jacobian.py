"""Norms and singular values of Jacobian products, against autograd through an unrolled cell."""

import math

import pytest
import torch
from torch import nn

from rnn_cuda import FusedRNN, backend, trajectory
from rnn_cuda.cells import cell_of
from rnn_cuda.instruments import jacobian_norm, jacobian_singular_values
from rnn_cuda.linear_algebra import log_singular_values
from rnn_cuda.trajectory import trajectory_of
from tests.unrolled import KINDS, LSTMS, Unrolled, make

pytestmark = pytest.mark.usefixtures("one_thread")
T, B, END = 9, 2, 8
LAGS = [0, 1, 3, END]

PLACES = {
    "one layer": ({}, {}),
    "second layer": ({"num_layers": 2, "bias": False}, {"layer": 1}),
    "second layer, backward": (
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"layer": 1, "reverse": True},
    ),
}


def first_layer(module, x):
    """The steps of the first layer, as the instruments see it."""
    with torch.no_grad():
        return trajectory_of(module, x, None, layer=0, reverse=False)


def initial_state(module):
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(count, B, module.proj_size or module.hidden_size)
    return (h, torch.randn(count, B, module.hidden_size)) if isinstance(module, LSTMS) else h


def case(kind, place="one layer"):
    torch.manual_seed(0)
    options, where = PLACES[place]
    module = make(kind, **options)
    x = torch.randn(B, T, 3) if module.batch_first else torch.randn(T, B, 3)
    hx = initial_state(module)
    oracle = Unrolled(module, x, hx, **where)
    products = [[oracle.product(END - lag, END, b) for b in range(B)] for lag in LAGS]
    products = torch.stack([torch.stack(row) for row in products])
    return (module, x), {"hx": hx, "lags": LAGS, "end": END, **where}, products


@pytest.mark.parametrize(
    ("kind", "place"),
    [(kind, place) for kind in KINDS for place in ("one layer", "second layer, backward")]
    + [(kind, "second layer") for kind in ("FusedRNN", "LeakyRNN", "GRU", "LSTM")],
)
def test_norms_and_singular_values_are_those_of_autograd(kind, place):
    arguments, options, products = case(kind, place)
    with backend.use("reference" if place == "second layer" else "auto"):
        norms = jacobian_norm(*arguments, **options)
        values = 10 ** jacobian_singular_values(*arguments, **options)
    torch.testing.assert_close(10**norms, torch.linalg.matrix_norm(products), rtol=1e-11, atol=0)
    expected = torch.linalg.svdvals(products)
    # The oracle's small values are right to 1e-16 of the largest only.
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-14 * float(expected.max()))


@pytest.mark.parametrize(("kind", "mistake"), [("GRU", "keep"), ("LSTM", "keep"), ("RNN", "U")])
def test_the_comparison_notices_a_lost_carry_and_a_transposed_matrix(kind, mistake, monkeypatch):
    arguments, options, products = case(kind)
    cell = type(cell_of(arguments[0]))
    if mistake == "keep":
        right = cell.linearise
        monkeypatch.setattr(cell, "linearise", lambda *args: right(*args)._replace(keep=0.0))
    else:
        monkeypatch.setattr(trajectory, "recurrent_matrix", lambda _, weight_hh: weight_hh.mT)
    error = 10 ** jacobian_norm(*arguments, **options) / torch.linalg.matrix_norm(products) - 1
    assert float(error.abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_pushing_and_pulling_are_transposes_of_each_other(kind):
    torch.manual_seed(0)
    module = make(kind)
    steps = first_layer(module, torch.randn(T, B, 3))
    v, w = torch.randn(2, B, 4, steps.size, dtype=torch.float64)
    pushed, pulled = steps.push(v, 2, 7), steps.pull(w, 2, 7)
    assert pulled.equal(steps.pull_each(w, 2, 7)[0])
    torch.testing.assert_close((pushed * w).sum(-1), (v * pulled).sum(-1), rtol=1e-12, atol=1e-14)


def product_step_by_step(module, x):
    """log10 norm of ds_T/ds_0 of sample 0 by plain matrix products, rescaled at every step."""
    steps = first_layer(module, x)
    product, log = torch.eye(steps.size, dtype=torch.float64), 0.0
    identity = product.expand(steps.batch, -1, -1)
    for t in range(steps.length):
        product = steps.push(identity, t, t + 1)[0].T @ product
        scale = torch.linalg.matrix_norm(product)
        product, log = product / scale, log + scale.log10().item()
    return log


@pytest.mark.parametrize("kind", ["FusedRNN", "RNN_relu", "GRU", "LSTM"])
def test_a_thousand_steps_neither_underflow_nor_overflow(kind):
    torch.manual_seed(0)
    cls, options = KINDS[kind]
    x = torch.randn(1000, 1, 3)
    for gain in (1.0, 30.0):  # the second explodes where nothing saturates
        module = cls(3, 6, **options)
        with torch.no_grad():
            module.weight_hh_l0.mul_(gain)
        exact = jacobian_norm(module, x, lags=[0, 999, 1000])
        assert exact.isfinite().all()
        assert float(exact[2, 0]) == pytest.approx(product_step_by_step(module, x), abs=1e-9)
        values = jacobian_singular_values(module, x, [1000])
        ten = math.log(10)
        frobenius = torch.logsumexp(2 * ten * values, dim=-1) / 2 / ten
        torch.testing.assert_close(frobenius, exact[2:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["FusedRNN", "GRU", "LSTM"])
def test_small_singular_values_of_long_products_are_right(kind):
    mpmath = pytest.importorskip("mpmath")
    torch.manual_seed(0)
    cls, options = KINDS[kind]
    module = cls(3, 4, **options)
    x = torch.randn(120, 1, 3)
    steps = first_layer(module, x)
    identity = torch.eye(steps.size, dtype=torch.float64).unsqueeze(0)
    with mpmath.workdps(300):
        product = mpmath.eye(steps.size)
        for t in range(120):
            product = mpmath.matrix(steps.push(identity, t, t + 1)[0].T.tolist()) * product
        expected = sorted(
            (float(mpmath.log10(s)) for s in mpmath.svd_r(product, compute_uv=False)), reverse=True
        )
    values = jacobian_singular_values(module, x, [120])[0, 0]
    assert expected[0] - expected[-1] > 20  # beyond what an SVD of the product could resolve
    torch.testing.assert_close(
        values, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_jacobi_rotations_find_singular_values_where_lapack_can(size):
    torch.manual_seed(size)
    x, log_d = torch.randn(3, size, size, dtype=torch.float64), torch.randn(3, size).double()
    expected = torch.linalg.svdvals(log_d.exp().unsqueeze(-1) * x).log()
    torch.testing.assert_close(log_singular_values(x, log_d), expected, rtol=0, atol=1e-11)


def test_jacobi_rotations_take_equal_parallel_and_zero_rows():
    rows = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 2, 0]], dtype=torch.float64)
    log_d = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64)
    values = log_singular_values(rows.unsqueeze(0), log_d.unsqueeze(0))[0]
    assert float(values[0]) == pytest.approx(math.log(2) / 2, abs=1e-15)
    assert values[1:].isneginf().all()


def test_an_exact_zero_is_minus_infinity_and_nothing_else_is():
    relu = FusedRNN(1, 4, nonlinearity="relu", dtype=torch.float64)
    with torch.no_grad():
        for parameter in relu.parameters():
            parameter.copy_(parameter.abs())
    x = torch.ones(20, 2, 1, dtype=torch.float64)
    x[9, 1] = -1e6  # closes every unit of sample 1 at step 10
    norms = jacobian_norm(relu, x)
    assert norms[:, 0].isfinite().all()
    assert norms[:11, 1].isfinite().all()  # lags 0 .. 10 reach back to h_10
    assert norms[11:, 1].isneginf().all()
    values = jacobian_singular_values(relu, x, [10, 11])
    assert values[:, 0].isfinite().all()
    assert values[0, 1].isfinite().all()
    assert values[1, 1].isneginf().all()
    probed = jacobian_norm(relu, x, probes=2)
    assert probed[11:, 1].isneginf().all()


@pytest.mark.parametrize("gain", [1e-20, 1.0, 1e20])
def test_a_scaled_orthogonal_matrix_moves_every_singular_value_by_twenty_decades_a_step(gain):
    torch.manual_seed(0)
    rnn = FusedRNN(1, 4, nonlinearity="identity", dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(gain * torch.linalg.qr(rnn.weight_hh_l0).Q)
    x = torch.zeros(100, 2, 1, dtype=torch.float64)
    rnn.bias = False  # h stays 0, so that the trajectory itself does not overflow
    lags = torch.arange(101, dtype=torch.float64).unsqueeze(1).expand(-1, 2)
    expected = lags * math.log10(gain)
    close = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(jacobian_norm(rnn, x), expected + math.log10(2), **close)
    values = jacobian_singular_values(rnn, x, [100, 1])
    of_lags = expected[[100, 1]].unsqueeze(-1).expand(-1, -1, 4)
    torch.testing.assert_close(values, of_lags, **close)


def test_closed_units_are_zeros_and_the_other_values_stay_right(monkeypatch):
    pulls = []
    right = trajectory.Trajectory.pull
    monkeypatch.setattr(
        trajectory.Trajectory, "pull", lambda *args: pulls.append(args[2:]) or right(*args)
    )
    torch.manual_seed(0)
    relu = FusedRNN(1, 5, nonlinearity="relu", dtype=torch.float64)
    with torch.no_grad():
        relu.bias_ih_l0.copy_(torch.tensor([1.0, 1, 1, -9, -9]))
        relu.weight_hh_l0.mul_(0.5)
    x = torch.zeros(30, 1, 1, dtype=torch.float64)
    values = jacobian_singular_values(relu, x, [30])[0, 0]
    expected = torch.linalg.svdvals(Unrolled(relu, x).product(0, 30, 0)).log10()
    assert values[3:].isneginf().all()
    assert abs(values[0] - expected[0]) < 1e-9
    # What has become zero does not count as spread any more, and does not shorten the segments.
    pulls.clear()
    jacobian_singular_values(relu, x[:1].expand(500, 1, 1), [500])
    assert len(pulls) < 250


def test_random_probes_estimate_the_squared_norm_without_bias():
    torch.manual_seed(0)
    module = make("FusedRNN")
    x = torch.randn(6, 2, 3)
    generator, before = torch.Generator().manual_seed(1), torch.get_rng_state()
    exact = 10 ** (2 * jacobian_norm(module, x))
    single = torch.stack(
        [10 ** (2 * jacobian_norm(module, x, probes=1, generator=generator)) for _ in range(400)]
    )
    error = single.std(0) / 20
    assert bool(((single.mean(0) - exact).abs() <= 4 * error + 1e-12).all())
    assert bool((error[1:] > 0).all())
    many = 10 ** (2 * jacobian_norm(module, x, probes=20_000, generator=generator))
    torch.testing.assert_close(many, exact, rtol=0.05, atol=0)
    # With a generator they repeat, and the global state is left alone.
    again = jacobian_norm(module, x, probes=1, generator=generator.manual_seed(1))
    assert torch.equal(10 ** (2 * again), single[0])
    assert torch.get_rng_state().equal(before)


def test_a_single_sample_may_come_without_a_batch():
    module, x = make("LSTM"), torch.randn(6, 3)
    assert jacobian_norm(module, x).equal(jacobian_norm(module, x.unsqueeze(1)))
    hx = (torch.randn(1, 5), torch.randn(1, 5))
    batched = tuple(part.unsqueeze(1) for part in hx)
    assert jacobian_norm(module, x, hx).equal(jacobian_norm(module, x.unsqueeze(1), batched))


def test_parametrized_weights_are_read_as_the_module_reads_them():
    torch.manual_seed(0)
    x = torch.randn(6, 2, 3)
    for rnn in (nn.RNN(3, 5), FusedRNN(3, 5)):
        nn.utils.parametrizations.orthogonal(rnn, "weight_hh_l0")
        oracle = Unrolled(rnn, x)
        expected = torch.linalg.svdvals(oracle.product(0, 6, 1)).log10()
        found = jacobian_singular_values(rnn, x, [6])[0, 1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_are_measured_in_float64_under_autocast_too(dtype):
    torch.manual_seed(0)
    rnn, x = make("LSTM").to(dtype), torch.randn(6, 2, 3).to(dtype)
    wide = nn.LSTM(3, 5, dtype=torch.float64)
    wide.load_state_dict(rnn.state_dict())
    expected = jacobian_norm(wide, x.double())
    assert jacobian_norm(rnn, x).equal(expected)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert jacobian_norm(rnn, x).equal(expected)


def test_an_elman_layer_takes_far_fewer_native_calls_than_steps(monkeypatch):
    calls = []
    right = trajectory.linear_recurrence
    monkeypatch.setattr(
        trajectory, "linear_recurrence", lambda *args, **kw: calls.append(1) or right(*args, **kw)
    )
    jacobian_norm(FusedRNN(3, 16), torch.randn(1000, 1, 3), probes=4)
    assert 0 < len(calls) < 40


RNN, X = FusedRNN(3, 5), torch.zeros(4, 2, 3)
PACKED = nn.utils.rnn.pack_sequence([torch.zeros(4, 3)])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((nn.Linear(3, 5), X), {}, TypeError, "module .*FusedRNN.* got: Linear"),
        ((RNN, PACKED), {}, TypeError, "input .*Tensor, got: PackedSequence"),
        ((RNN, X[..., :2]), {}, ValueError, r"input: expected shape \(T, B, 3\).* got \(4, 2, 2\)"),
        ((RNN, X[:0]), {}, ValueError, "input: .*at least one time step"),
        ((RNN, X.int()), {}, ValueError, "input: expected a floating-point.*int32"),
        ((RNN, X, torch.zeros(2, 2, 5)), {}, ValueError, r"h_0 of hx: expected shape \(1, 2, 5\)"),
        ((RNN, X, [1]), {}, TypeError, "h_0 of hx should be a Tensor, got: list"),
        ((nn.LSTM(3, 5), X, torch.zeros(1, 2, 5)), {}, TypeError, r"hx .*\(h_0, c_0\).*Tensor"),
        ((RNN, X), {"layer": 1}, ValueError, "layer: expected 0 to 0.* got 1"),
        ((RNN, X), {"layer": "0"}, TypeError, "layer should be of type int"),
        ((RNN, X), {"reverse": True}, ValueError, "reverse: expected False"),
        ((RNN, X), {"reverse": 1}, TypeError, "reverse should be of type bool"),
        ((RNN, X), {"lags": [5]}, ValueError, r"lags: expected each from 0 to 4 .* got 5"),
        ((RNN, X), {"lags": []}, ValueError, "lags: expected a sequence"),
        ((RNN, X), {"lags": 3}, ValueError, "lags: expected a sequence"),
        ((RNN, X), {"lags": [1.0]}, TypeError, "each of lags should be of type int"),
        ((RNN, X), {"end": 5}, ValueError, "end: expected 1 to 4.* got 5"),
        ((RNN, X), {"lags": [4], "end": 3}, ValueError, r"from 0 to 3 \(end\), got 4"),
        ((RNN, X), {"probes": 0}, ValueError, "probes must be greater than zero"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        jacobian_norm(*arguments, **options)
