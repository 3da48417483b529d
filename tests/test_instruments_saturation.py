"""Saturation of activations, and the gates of an LSTM and a GRU."""

import math

import pytest
import torch
from torch import nn

from rnn_cuda import FusedRNN
from rnn_cuda.cells.elman import NONLINEARITIES, activation
from rnn_cuda.instruments import gate_activations, saturation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_the_mean_derivative_is_that_of_autograd(nonlinearity):
    torch.manual_seed(0)
    z = (3 * torch.randn(40, 5, 6).double()).requires_grad_()
    h = activation(z, nonlinearity)
    (derivative,) = torch.autograd.grad(h.sum(), z)
    found = saturation(h, nonlinearity)
    assert found.mean_derivative == pytest.approx(float(derivative.mean()), rel=1e-12)
    assert int(found.counts.sum()) == h.numel()
    assert len(found.edges) == len(found.counts) + 1
    expected = {
        "tanh": (h.abs() > 0.95),
        "sigmoid": (h < 0.025) | (h > 0.975),
        "relu": derivative == 0,
        "identity": torch.zeros_like(h) > 0,
        "softplus": derivative < 0.05,
    }
    assert found.share == pytest.approx(float(expected[nonlinearity].double().mean()))


def test_the_histogram_counts_what_lies_between_its_edges():
    h = torch.tensor([-1.0, -0.96, -0.2, 0.1, 0.3, 1.0])
    found = saturation(h, bins=4)
    assert found.edges.tolist() == [-1, -0.5, 0, 0.5, 1]
    assert found.counts.tolist() == [2, 1, 2, 1]
    assert found.share == 0.5
    assert saturation(h, threshold=0.97).share == pytest.approx(1 / 3)
    constant = saturation(torch.full((3,), 2.0), "relu", bins=2)
    assert int(constant.counts.sum()) == 3


def test_saturation_keeps_its_digits_in_half_precision():
    h = torch.full((10_000,), 0.9922).bfloat16()
    exact = 1 - float(h[0]) ** 2
    assert saturation(h).mean_derivative == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_gates_make_the_output_that_the_modules_return(reverse):
    torch.manual_seed(0)
    x = torch.randn(7, 2, 3)
    half = slice(5, None) if reverse else slice(0, 5)

    gru = nn.GRU(3, 5, bidirectional=True)
    gates = gate_activations(gru, x, reverse=reverse)
    h = gru(x)[0][..., half].double()
    zero = torch.zeros(1, 2, 5).double()
    before = torch.cat([h[1:], zero]) if reverse else torch.cat([zero, h[:-1]])
    assert set(gates) == {"reset", "update", "new"}
    made = (1 - gates["update"]) * gates["new"] + gates["update"] * before
    torch.testing.assert_close(made, h, rtol=1e-5, atol=1e-6)

    lstm = nn.LSTM(3, 5, bidirectional=True)
    gates = gate_activations(lstm, x, reverse=reverse)
    c = zero[0]
    for t in range(6, -1, -1) if reverse else range(7):
        c = gates["forget"][t] * c + gates["input"][t] * gates["cell"][t]
        made = gates["output"][t] * c.tanh()
        torch.testing.assert_close(made, lstm(x)[0][t, :, half].double(), rtol=1e-5, atol=1e-6)


def test_the_reset_gate_is_that_of_the_formula():
    torch.manual_seed(0)
    gru, x = nn.GRU(3, 5), torch.randn(4, 2, 3)
    before = torch.cat([torch.zeros(1, 2, 5), gru(x)[0][:-1]])
    z = x @ gru.weight_ih_l0[:5].T + gru.bias_ih_l0[:5]
    z = z + before @ gru.weight_hh_l0[:5].T + gru.bias_hh_l0[:5]
    found = gate_activations(gru, x)["reset"]
    torch.testing.assert_close(found, z.sigmoid().double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: saturation(torch.zeros(0)), ValueError, r"h: expected one or more.*\(0,\)"),
        (lambda: saturation(torch.tensor(math.inf)), ValueError, "with an infinity or NaN"),
        (lambda: saturation(torch.zeros(2), "gelu"), ValueError, "Unknown nonlinearity 'gelu'"),
        (lambda: saturation(torch.zeros(2), threshold=2), ValueError, "threshold.* got 2"),
        (lambda: saturation(torch.zeros(2), bins=0), ValueError, "bins must be greater"),
        (
            lambda: gate_activations(FusedRNN(2, 3), torch.zeros(1, 1, 2)),
            TypeError,
            "module should be a FusedGRU, FusedLSTM, nn.GRU or nn.LSTM, got: FusedRNN",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
