"""Remedies: recurrences against the formula written out, constraints that last, the registry."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnn_cuda import AntisymmetricRNN, FusedRNN, LeakyRNN, remedies
from rnn_cuda.cells.elman import NONLINEARITIES, activation
from tests.layers import halves

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, I, H = 9, 3, 4, 6
orthogonal = remedies.orthogonal_parametrization
ALL = [FusedRNN, nn.RNN, nn.LSTM, nn.GRU]
OPTIONS = {"chrono": {"max_lag": 20}}
COMMON_REMEDIES = {"orthogonal_init", "scaled_gain", "orthogonal_parametrization"}
ELMAN_REMEDIES = COMMON_REMEDIES | {"identity_init", "irnn", "leaky", "antisymmetric"}
GATED_REMEDIES = COMMON_REMEDIES | {"forget_bias", "chrono"}


def by_hand(layer, x, h, suffix="_l0", leak=0.3):
    """Every state, by the formula of a layer with the constants below."""
    W, U, b_ih, b_hh = (
        getattr(layer, kind + suffix) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    states = []
    for x_t in x:
        if isinstance(layer, LeakyRNN):  # h_t = (1 - a) h_{t-1} + a f(W x_t + U h_{t-1} + b)
            z = x_t @ W.T + b_ih + h @ U.T + b_hh
            h = (1 - leak) * h + leak * activation(z, layer.nonlinearity)
        else:  # h_t = h_{t-1} + eps f((M - M^T - gamma I) h_{t-1} + W x_t + b)
            z = x_t @ W.T + b_ih + b_hh + h @ U.T - h @ U - 0.05 * h
            h = h + 0.2 * activation(z, layer.nonlinearity)
        states.append(h)
    return torch.stack(states)


RECURRENCES = {
    "leaky": (LeakyRNN, {"leak": 0.3}),
    "antisymmetric": (AntisymmetricRNN, {"step_size": 0.2, "diffusion": 0.05}),
}
each_recurrence = pytest.mark.parametrize("name", RECURRENCES)


# The two recurrences


@each_recurrence
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_a_recurrence_is_its_formula_with_all_its_gradients(name, nonlinearity):
    kind, options = RECURRENCES[name]
    layer = kind(I, H, nonlinearity=nonlinearity, dtype=torch.float64, **options)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(1, B, H, dtype=torch.float64, requires_grad=True)
    output, h_n = layer(x, h0)
    expected = by_hand(layer, x, h0[0])
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(h_n[0], output[-1])
    direction = torch.randn_like(output)
    inputs = [x, h0, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(each, inputs, direction) for each in (output, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@each_recurrence
def test_layers_directions_and_packed_sequences_are_those_of_an_rnn(name):
    kind, options = RECURRENCES[name]
    layer = kind(I, H, 2, bidirectional=True, batch_first=True, dtype=torch.float64, **options)
    lengths = torch.tensor([T, 2, 5])
    x = torch.randn(B, T, I, dtype=torch.float64)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    output, h_n = layer(packed)
    output, _ = pad_packed_sequence(output, batch_first=True)
    for b, length in enumerate(lengths):
        sequence = x[b, :length].unsqueeze(1)
        for index in range(2):
            finals, outputs = [], []
            for direction in ("", "_reverse"):
                run = sequence.flip(0) if direction else sequence
                states = by_hand(layer, run, x.new_zeros(1, H), f"_l{index}{direction}")
                finals.append(states[-1, 0])
                outputs.append(states.flip(0) if direction else states)
            expected = torch.stack(finals)
            torch.testing.assert_close(
                h_n[2 * index : 2 * index + 2, b], expected, rtol=1e-12, atol=1e-12
            )
            sequence = torch.cat(outputs, dim=-1)
        torch.testing.assert_close(output[b, :length], sequence[:, 0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer(x[b : b + 1, :length])[0][0], sequence[:, 0])


def test_a_leak_of_one_is_the_plain_rnn():
    plain = FusedRNN(I, H, 2, bidirectional=True)
    leaky = remedies.leaky(plain, leak=1.0)
    x = torch.randn(T, B, I)
    for ours, theirs in zip(leaky(x), plain(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_antisymmetric_step_turns_the_state_and_grows_to_second_order_only():
    """At rest J = I + eps (M - M^T), whose singular values are sqrt(1 + (eps |lambda|)^2)."""
    layer = AntisymmetricRNN(I, H, step_size=0.1, diffusion=0.0, bias=False, dtype=torch.float64)
    no_input, rest = torch.zeros(1, I, dtype=torch.float64), torch.zeros(1, H, dtype=torch.float64)
    step = torch.autograd.functional.jacobian(lambda h: layer(no_input, h)[1], rest)
    M = layer.weight_hh_l0.detach()
    growth = (1 + (0.1 * torch.linalg.eigvals(M - M.T).abs()) ** 2).sqrt()
    expected = growth.sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(step.reshape(H, H)), expected)
    assert expected[0] > 1


@halves
def test_half_precisions_round_what_is_multiplied_and_not_what_a_unit_carries(dtype):
    layer = LeakyRNN(I, H, dtype=dtype, leak=0.3)
    W, U, *biases = (weight.float() for weight in layer.parameters())
    x, h = torch.randn(T, B, I, dtype=dtype), torch.zeros(B, H)
    output, _ = layer(x)
    for x_t, ours in zip(x, output, strict=True):
        h = 0.7 * h + 0.3 * torch.tanh(x_t.float() @ W.T + h.to(dtype).float() @ U.T + sum(biases))
        torch.testing.assert_close(ours.float(), h, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_leak_for_each_unit_can_be_learned():
    leak = nn.Parameter(torch.rand(H, dtype=torch.float64) * 0.8 + 0.1)
    layer = LeakyRNN(I, H, 2, bidirectional=True, leak=leak, dtype=torch.float64)
    layer.reset_parameters()
    assert layer.leak is leak
    assert bool((leak > 0.1).all())
    assert dict(layer.named_parameters())["leak"] is leak
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    sequence = x
    for index in range(2):
        forward, reverse = (
            by_hand(layer, run, x.new_zeros(B, H), f"_l{index}{suffix}", leak)
            for run, suffix in ((sequence, ""), (sequence.flip(0), "_reverse"))
        )
        sequence = torch.cat([forward, reverse.flip(0)], dim=-1)
    output, _ = layer(x)
    torch.testing.assert_close(output, sequence, rtol=1e-12, atol=1e-12)
    inputs, direction = [leak, x], torch.randn_like(output)
    ours, theirs = (torch.autograd.grad(each, inputs, direction) for each in (output, sequence))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_leak_that_is_no_parameter_is_a_buffer():
    leak = torch.full((H,), 0.25)
    layer, same = LeakyRNN(I, H, leak=leak), LeakyRNN(I, H, leak=0.25)
    assert "leak" in dict(layer.named_buffers())
    assert repr(layer) == "LeakyRNN(4, 6, leak=per unit)"
    same.load_state_dict({name: layer.state_dict()[name] for name in same.state_dict()})
    x = torch.randn(T, B, I)
    assert torch.equal(layer(x)[0], same(x)[0])
    assert torch.equal(layer.bfloat16()(x.bfloat16())[0], same.bfloat16()(x.bfloat16())[0])


@each_recurrence
def test_more_gradient_reaches_the_first_step_than_through_the_plain_rnn(name):
    torch.manual_seed(0)
    plain = nn.RNN(I, 32)
    x = torch.rand(50, B, I)

    def norm_at_start(layer):
        h0 = torch.zeros(1, B, 32, requires_grad=True)
        layer(x, h0)[1].sum().backward()
        return h0.grad.norm()

    before = norm_at_start(plain)
    assert norm_at_start(remedies.apply(plain, name)) > 1e6 * before


def test_a_residual_rnn_says_what_it_is_and_is_not():
    leaky, antisymmetric = LeakyRNN(I, H, leak=0.25), AntisymmetricRNN(I, H, step_size=0.5)
    assert repr(leaky) == "LeakyRNN(4, 6, leak=0.25)"
    assert LeakyRNN(I, H).leak == 0.1
    assert repr(antisymmetric) == "AntisymmetricRNN(4, 6, step_size=0.5, diffusion=0.01)"
    # What knows FusedRNN's recurrence, as the instruments do, must not take these for one.
    assert not isinstance(leaky, FusedRNN | nn.RNN)
    assert not isinstance(antisymmetric, FusedRNN | nn.RNN)


# Orthogonal parametrization


@pytest.mark.parametrize(
    ("kind", "map_"), list(zip(ALL, [None, "cayley", "householder", None], strict=True))
)
def test_u_stays_orthogonal_in_training_and_the_layer_computes_with_it(kind, map_):
    torch.manual_seed(0)
    layer = kind(I, H, num_layers=2, bidirectional=True)
    plain = copy.deepcopy(layer)
    assert orthogonal(layer, map_) is layer
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x = torch.randn(T, B, I)
    first = layer.weight_hh_l1.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        layer(x)[0].square().mean().backward()
        optimizer.step()
    names = [name for name in plain.state_dict() if "weight_hh" in name]
    for name in names:
        weight = getattr(layer, name)
        for U in weight.split(H):
            torch.testing.assert_close(U.T @ U, torch.eye(H), rtol=0, atol=1e-5)
    assert (layer.weight_hh_l1 - first).norm() > 0.1
    plain.load_state_dict({name: getattr(layer, name).detach() for name in plain.state_dict()})
    torch.testing.assert_close(layer(x)[0], plain(x)[0], rtol=1e-5, atol=1e-6)


def test_an_orthogonal_u_is_kept_and_the_layer_can_be_saved_and_copied():
    layer = remedies.apply(nn.GRU(I, H), "orthogonal_init")
    U = layer.weight_hh_l0.detach().clone()
    orthogonal(layer)
    torch.testing.assert_close(layer.weight_hh_l0, U, rtol=0, atol=1e-6)

    layer, other = (orthogonal(FusedRNN(I, H)) for _ in range(2))
    x = torch.randn(T, B, I)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer)):
        assert torch.equal(twin(x)[0], layer(x)[0])


def test_orthogonal_matrices_can_have_their_own_learning_rate():
    model = nn.ModuleDict({"core": nn.RNN(I, H), "head": nn.Linear(H, 2)})
    (group,) = remedies.parameter_groups(model, 1e-2)
    assert len(group["params"]) == 6
    remedies.apply(model, "orthogonal_parametrization")
    groups = {g["lr"]: g["params"] for g in remedies.parameter_groups(model, 1e-2, 0.1)}
    (original,) = groups[1e-2 * 0.1]
    assert original is model.core.parametrizations.weight_hh_l0.original
    assert len(groups[1e-2]) == 5
    torch.optim.Adam(remedies.parameter_groups(model, 1e-2))


# The registry


def test_every_remedy_is_offered_for_the_layers_it_is_for():
    for kind in (FusedRNN, nn.RNN):
        assert set(remedies.names(kind(I, H))) == ELMAN_REMEDIES
    for kind in (nn.LSTM, nn.GRU):
        assert set(remedies.names(kind(I, H))) == GATED_REMEDIES
    assert set(remedies.names(LeakyRNN(I, H))) == ELMAN_REMEDIES - {"leaky", "antisymmetric"}
    assert remedies.names(nn.Linear(I, H)) == ()
    assert set(remedies.REMEDIES) == ELMAN_REMEDIES | GATED_REMEDIES


@pytest.mark.parametrize("name", remedies.REMEDIES)
@pytest.mark.parametrize("kind", ALL)
def test_every_remedy_can_be_switched_on_in_a_model_and_is_refused_elsewhere(kind, name):
    torch.manual_seed(0)
    relu = {"nonlinearity": "relu"} if name == "irnn" and kind in (FusedRNN, nn.RNN) else {}
    model = nn.ModuleDict({"core": kind(I, H, **relu), "head": nn.Linear(H, 2)})
    x = torch.randn(T, B, I)
    before = model.core(x)[0].detach()
    if name not in remedies.names(model.core):
        with pytest.raises(TypeError, match=f"{name} does not apply to {kind.__name__}; these do"):
            remedies.apply(model, name, **OPTIONS.get(name, {}))
        assert torch.equal(model.core(x)[0], before)
        return
    assert remedies.apply(model, name, **OPTIONS.get(name, {})) is model
    after = model.core(x)[0]
    assert after.shape == before.shape
    assert not torch.allclose(after, before)
    model.head(after).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["leaky", "antisymmetric"])
def test_a_replaced_layer_keeps_its_parameters_and_all_its_places(name):
    shared = nn.RNN(I, I)
    model = nn.ModuleList([nn.ModuleDict({"a": shared, "b": shared}), FusedRNN(I, H)])
    parameters = {id(parameter) for parameter in model.parameters()}
    remedies.apply(model, name)
    assert {id(parameter) for parameter in model.parameters()} == parameters
    assert model[0].a is model[0].b
    assert type(model[0].a) is type(model[1]) is RECURRENCES[name][0]
    # A layer itself comes back changed or replaced.
    lstm = nn.LSTM(I, H)
    assert remedies.apply(lstm, "forget_bias", value=3.0) is lstm
    assert type(remedies.apply(nn.RNN(I, H), name)) is RECURRENCES[name][0]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: remedies.apply(nn.RNN(3, 3), "magic"), ValueError, "name: .*chrono.*'magic'"),
        (lambda: remedies.apply(nn.RNN(3, 3), "leaky", rate=1), TypeError, "no option rate.*leak"),
        (lambda: remedies.apply(nn.Linear(3, 3), "leaky"), ValueError, "model: .*Linear"),
        (lambda: remedies.leaky(nn.LSTM(3, 3)), TypeError, "leaky does not apply to LSTM"),
        (lambda: remedies.leaky(LeakyRNN(3, 3)), TypeError, "leaky does not apply to LeakyRNN"),
        (lambda: LeakyRNN(3, 3, leak=0), ValueError, "leak: .*above 0.*got 0"),
        (lambda: LeakyRNN(3, 3, leak=1.5), ValueError, "leak: .*at most 1, got 1.5"),
        (lambda: LeakyRNN(3, 3, leak=torch.rand(2)), ValueError, "3 of them .* got .*(2,)"),
        (lambda: LeakyRNN(3, 3, leak=torch.zeros(3)), ValueError, "numbers above 0"),
        (lambda: AntisymmetricRNN(3, 3, step_size=0), ValueError, "step_size: .*got 0"),
        (lambda: AntisymmetricRNN(3, 3, diffusion=-1), ValueError, "diffusion: .*got -1"),
        (lambda: orthogonal(nn.LSTM(3, 4, proj_size=2)), ValueError, "layer: .*square blocks in"),
        (lambda: orthogonal(orthogonal(nn.RNN(3, 3))), ValueError, "layer: .*plain parameters"),
        (lambda: remedies.leaky(orthogonal(nn.RNN(3, 3))), ValueError, "plain parameters"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()


@halves
def test_a_small_leak_for_each_unit_keeps_its_digits_in_half_precision(dtype):
    # In bfloat16 one less .001 is one: nothing would leak.
    layer = LeakyRNN(1, 2, leak=torch.full((2,), 1 / 512)).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.bias_ih_l0.fill_(1)
    output, _ = layer(torch.zeros(4000, 1, 1, dtype=dtype), torch.zeros(1, 1, 2, dtype=dtype))
    expected = torch.full((1, 2), 1.0).tanh()
    torch.testing.assert_close(output[-1].float(), expected, rtol=1e-2, atol=0)
