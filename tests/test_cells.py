"""The cells in plain torch, against torch's own cells and autograd through a step."""

import pytest
import torch
from torch import nn

import rnn_cuda
from rnn_cuda.cells import Weights, cell_named, cell_of, recurrent_matrix

B, I, H = 3, 4, 5
TORCH_CELLS = {
    "elman.tanh": lambda: nn.RNNCell(I, H),
    "elman.relu": lambda: nn.RNNCell(I, H, nonlinearity="relu"),
    "lstm": lambda: nn.LSTMCell(I, H),
    "gru": lambda: nn.GRUCell(I, H),
}
OTHERS = {
    "elman.sigmoid": lambda: rnn_cuda.FusedRNNCell(I, H, nonlinearity="sigmoid"),
    "elman.identity": lambda: rnn_cuda.FusedRNNCell(I, H, nonlinearity="identity"),
    "elman.softplus": lambda: rnn_cuda.FusedRNNCell(I, H, nonlinearity="softplus"),
}


class Step:
    """One step of a torch cell in float64, and of ours with its weights."""

    def __init__(self, make):
        torch.manual_seed(0)
        self.module = make().double()
        self.cell = cell_of(self.module)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        self.weights = Weights(*(getattr(self.module, name).detach() for name in names))
        self.x = torch.randn(B, I).double()
        self.state = torch.randn(B, H).double(), torch.randn(B, H).double()
        self.state = self.state if self.cell.has_cell_state else self.state[:1]

    def torchs(self):
        state = self.state if self.cell.has_cell_state else self.state[0]
        after = self.module(self.x, state)
        return after if self.cell.has_cell_state else (after,)

    def after(self, h, carried):
        sums = self.weights.input_sums(self.x), self.weights.recurrent_sums(h)
        return self.cell.step(*sums, carried)

    def linearisation(self):
        sums = self.weights.input_sums(self.x), self.weights.recurrent_sums(self.state[0])
        gates = self.cell.gates(*sums)
        return self.cell.linearise(gates, self.state[-1], self.cell.carry(gates, self.state[-1]))


@pytest.mark.parametrize("name", TORCH_CELLS)
def test_a_step_is_that_of_torchs_cell(name):
    step = Step(TORCH_CELLS[name])
    assert step.cell == cell_named(name)
    for ours, theirs in zip(step.after(step.state[0], step.state[-1]), step.torchs(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", [*TORCH_CELLS, *OTHERS])
def test_the_linearisation_is_the_derivative_by_autograd(name):
    step = Step((TORCH_CELLS | OTHERS)[name])
    recurrent_sums = step.weights.recurrent_sums(step.state[0])
    input_sums = step.weights.input_sums(step.x)
    dz, dx, dv = (torch.randn_like(t) for t in (recurrent_sums, input_sums, step.state[-1]))

    def after(z_input, z, carried):
        return torch.cat(step.cell.step(z_input, z, carried), -1)

    arguments = (input_sums, recurrent_sums, step.state[-1])
    _, expected = torch.autograd.functional.jvp(
        after, arguments, (torch.zeros_like(dx), dz, dv), strict=False
    )
    linear = step.linearisation()
    pushed = linear.push(dz.unflatten(-1, (-1, H)), dv)
    pushed = torch.cat(pushed if step.cell.has_cell_state else pushed[:1], -1)
    torch.testing.assert_close(pushed, expected, rtol=1e-12, atol=1e-14)

    adjoint = torch.randn_like(expected)
    _, (of_input, of_sums, of_carried) = torch.autograd.functional.vjp(after, arguments, adjoint)
    parts = adjoint.split(H, -1)
    delta, carried = linear.pull(parts[0], parts[-1])
    torch.testing.assert_close(delta, of_sums, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(carried, of_carried, rtol=1e-12, atol=1e-14)
    delta, _ = linear.for_input().pull(parts[0], parts[-1])
    torch.testing.assert_close(delta, of_input, rtol=1e-12, atol=1e-14)


def test_a_gates_name_says_which_it_is():
    for module, kept in ((nn.LSTM(I, H), "c"), (nn.GRU(I, H), "h")):
        cell, rows = cell_of(module), torch.zeros(1, 3, I)
        gate = cell.gate_names.index(cell.keeping_gate)
        with torch.no_grad():
            module.bias_ih_l0[gate * H : (gate + 1) * H] = 40.0  # open
            if cell.admitting_gate is not None:
                gate = cell.gate_names.index(cell.admitting_gate)
                module.bias_ih_l0[gate * H : (gate + 1) * H] = -40.0  # closed
        start = torch.randn(1, 3, H)
        state = (start, start) if kept == "c" else start
        after = module(rows, state)[1]
        torch.testing.assert_close(after[1] if kept == "c" else after, start)


def test_every_recurrent_module_has_a_cell_and_others_have_none():
    leaky = cell_of(rnn_cuda.LeakyRNN(I, H, leak=0.25))
    assert (leaky.keep, leaky.rate) == (0.75, 0.25)
    antisymmetric = rnn_cuda.AntisymmetricRNN(I, H, step_size=0.5)
    assert (cell_of(antisymmetric).keep, cell_of(antisymmetric).rate) == (1.0, 0.5)
    weight = torch.randn(H, H)
    turned = recurrent_matrix(antisymmetric, weight)
    torch.testing.assert_close(turned, weight - weight.T - 0.01 * torch.eye(H))
    assert recurrent_matrix(nn.GRU(I, H), weight) is weight
    for module in (rnn_cuda.FusedRNN(I, H, nonlinearity="relu"), nn.RNN(I, H, nonlinearity="relu")):
        assert cell_of(module) == cell_named("elman.relu")
    assert cell_of(nn.Linear(I, H)) is None
    with pytest.raises(ValueError, match=r"cell: expected one of elman.tanh, .*got 'elman'"):
        cell_named("elman")
