"""Initialisations: what is set, what is left alone, on every layer, direction and gate."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn.utils import parametrizations

from rnn_cuda import FusedRNN, FusedRNNCell, init

pytestmark = pytest.mark.usefixtures("one_thread")

H, I = 24, 5
ELMAN = [FusedRNN, nn.RNN]
GATED = [nn.LSTM, nn.GRU]
CELLS = [FusedRNNCell, nn.RNNCell, nn.LSTMCell, nn.GRUCell]
GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}
# The functions that draw random numbers, with their arguments, and what they apply to.
RANDOM = [
    (init.orthogonal_, {}, [*ELMAN, *GATED]),
    (init.scaled_gaussian_, {"gain": 1.5}, [*ELMAN, *GATED]),
    (init.irnn_, {}, ELMAN),
    (init.chrono_, {"max_lag": 100}, GATED),
]


def layer(kind: type[nn.Module], **options) -> nn.Module:
    """Return two bidirectional layers of a kind."""
    return kind(I, H, num_layers=2, bidirectional=True, **options)


def blocks(module: nn.Module) -> list[torch.Tensor]:
    """Return every gate's recurrent weights."""
    weights = [p.detach() for name, p in module.named_parameters() if "weight_hh" in name]
    return [block for weight in weights for block in weight.chunk(GATES.get(type(module), 1))]


def total_biases(module: nn.Module, gate: int) -> list[torch.Tensor]:
    """Return the sum of both biases of one gate, for each layer and direction."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    names = [name for name in parameters if "bias_ih" in name]
    sums = [parameters[name] + parameters[name.replace("ih", "hh")] for name in names]
    return [total.chunk(GATES[type(module)])[gate] for total in sums]


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    """Return the kinds of parameters that differ: ``weight_ih``, ``bias_hh`` and so on."""
    new = after.state_dict()
    different = [n for n, value in before.state_dict().items() if not torch.equal(value, new[n])]
    return {"_".join(name.split("_")[:2]) for name in different}


def assert_same_biases(before: nn.Module, after: nn.Module, gates: Iterable[int]) -> None:
    for gate in gates:
        for now, then in zip(total_biases(after, gate), total_biases(before, gate), strict=True):
            assert torch.equal(now, then)


def assert_orthogonal(blocks: Iterable[torch.Tensor], gain: float = 1.0) -> None:
    for U in blocks:
        expected = gain**2 * torch.eye(U.shape[1])
        torch.testing.assert_close(U.T @ U, expected, rtol=0, atol=1e-5)


# Recurrent weights


@pytest.mark.parametrize("kind", [*ELMAN, *GATED])
def test_orthogonal_makes_every_block_orthogonal_and_changes_nothing_else(kind):
    module = layer(kind)
    before = copy.deepcopy(module)
    assert init.orthogonal_(module, gain=1.5) is module
    assert len(blocks(module)) == 4 * GATES.get(kind, 1)
    assert_orthogonal(blocks(module), gain=1.5)
    assert changed(before, module) == {"weight_hh"}
    assert len({U.numpy().tobytes() for U in blocks(module)}) == len(blocks(module))


@pytest.mark.parametrize("kind", [*ELMAN, *GATED])
def test_scaled_gaussian_has_the_variance_it_says_and_a_disc_of_eigenvalues(kind):
    module = kind(I, 200)
    before = copy.deepcopy(module)
    init.scaled_gaussian_(module, gain=1.5, generator=torch.Generator().manual_seed(0))
    for U in blocks(module):
        standardised = (U * math.sqrt(200) / 1.5).flatten().double()
        assert stats.kstest(standardised.numpy(), "norm").pvalue > 1e-3
        assert torch.linalg.eigvals(U).abs().max().item() == pytest.approx(1.5, rel=0.1)
    assert changed(before, module) == {"weight_hh"}


@pytest.mark.parametrize("kind", ELMAN)
def test_identity_sets_u_alone(kind):
    module = layer(kind)
    before = copy.deepcopy(module)
    init.identity_(module, scale=0.5)
    assert all(torch.equal(U, 0.5 * torch.eye(H)) for U in blocks(module))
    assert changed(before, module) == {"weight_hh"}


@pytest.mark.parametrize("kind", ELMAN)
def test_an_irnn_is_as_the_paper_says_and_keeps_adjoints_of_active_units(kind):
    module = layer(kind, nonlinearity="relu")
    init.irnn_(module, generator=torch.Generator().manual_seed(0))
    for name, value in module.state_dict().items():
        if "bias" in name:
            assert not value.any(), name
        elif "weight_ih" in name:
            assert stats.kstest((value * 1e3).flatten().numpy(), "norm").pvalue > 1e-3, name
        else:
            assert torch.equal(value, torch.eye(H)), name
    one = kind(I, H, nonlinearity="relu")
    init.irnn_(one)
    h0 = torch.ones(1, 3, H, requires_grad=True)  # all active: 20 small inputs do not close any
    one(torch.rand(20, 3, I), h0)[1].sum().backward()
    assert torch.equal(h0.grad, torch.ones_like(h0))


@pytest.mark.parametrize("function", [init.orthogonal_, init.scaled_gaussian_, init.identity_])
def test_a_weight_can_be_given_instead_of_a_layer(function):
    module = nn.RNN(I, H)
    before = copy.deepcopy(module)
    assert function(module.weight_hh_l0) is module.weight_hh_l0
    assert changed(before, module) == {"weight_hh"}
    assert module.weight_hh_l0.requires_grad


def test_gated_weights_and_projections_are_orthogonal_by_block():
    assert_orthogonal(init.orthogonal_(torch.empty(4 * H, H)).chunk(4))
    assert_orthogonal(blocks(init.orthogonal_(nn.LSTM(I, H, proj_size=7))))


# Gate biases


@pytest.mark.parametrize("kind", GATED)
def test_the_forget_bias_is_the_total_bias_of_the_gate_that_keeps_the_state(kind):
    module = layer(kind)
    before = copy.deepcopy(module)
    init.forget_bias_(module, 50.0)
    assert all((bias == 50).all() for bias in total_biases(module, gate=1))
    assert_same_biases(before, module, {*range(GATES[kind])} - {1})
    # Open: a GRU keeps h. An LSTM keeps c and adds what its input gate lets in.
    one = init.forget_bias_(kind(I, H), 50.0)
    state = torch.rand(1, 3, H)
    with torch.no_grad():
        if kind is nn.GRU:
            torch.testing.assert_close(one(torch.rand(1, 3, I), state)[1], state)
        else:
            x, h0 = torch.rand(1, 3, I), torch.zeros(1, 3, H)
            without = one(x, (h0, torch.zeros(1, 3, H)))[1][1]
            torch.testing.assert_close(one(x, (h0, state))[1][1], without + state)


@pytest.mark.parametrize("kind", GATED)
def test_chrono_draws_the_memory_of_each_unit_uniformly(kind):
    module = kind(I, 400, num_layers=2)
    init.chrono_(module, max_lag=100, generator=torch.Generator().manual_seed(1))
    keep = total_biases(module, gate=1)
    for bias in keep:
        memory = (bias.double().exp().numpy() - 1) / 98
        assert stats.kstest(memory, "uniform").pvalue > 1e-3
    assert not torch.equal(keep[0], keep[1])
    if kind is nn.LSTM:
        for bias, forget in zip(total_biases(module, gate=0), keep, strict=True):
            assert torch.equal(bias, -forget)


@pytest.mark.parametrize(("kind", "others"), [(nn.LSTM, (2, 3)), (nn.GRU, (0, 2))])
def test_chrono_leaves_the_other_gates_alone(kind, others):
    module = layer(kind)
    before = copy.deepcopy(module)
    init.chrono_(module, max_lag=10)
    assert changed(before, module) == {"bias_ih", "bias_hh"}
    assert_same_biases(before, module, others)


# Everywhere


@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_taken_too(kind):
    cell = kind(I, H)
    assert_orthogonal(blocks(init.orthogonal_(cell)))
    if kind in GATES:
        init.forget_bias_(cell, 2.0)
        assert all((bias == 2).all() for bias in total_biases(cell, gate=1))
    else:
        init.identity_(cell)
        assert torch.equal(cell.weight_hh.detach(), torch.eye(H))


@pytest.mark.parametrize(
    ("function", "arguments", "kind"),
    [(function, options, kind) for function, options, kinds in RANDOM for kind in kinds],
)
def test_a_generator_fixes_the_result_and_the_global_one_is_left_alone(function, arguments, kind):
    relu = {"nonlinearity": "relu"} if kind in ELMAN else {}
    module = layer(kind, **relu)
    state = torch.get_rng_state()
    one, two, other = (
        function(copy.deepcopy(module), generator=torch.Generator().manual_seed(s), **arguments)
        for s in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert changed(one, two) == set()
    assert changed(one, other) != set()
    torch.manual_seed(3)
    assert changed(one, function(copy.deepcopy(module), **arguments)) == set()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_taken_and_halves_are_rounded_from_float32(dtype):
    module = nn.LSTM(I, H).to(dtype)
    single = nn.LSTM(I, H)
    for target in (module, single):
        init.orthogonal_(target, generator=torch.Generator().manual_seed(0))
        init.chrono_(target, 50, generator=torch.Generator().manual_seed(0))
    assert module.weight_hh_l0.dtype == dtype
    if dtype != torch.float64:
        assert torch.equal(module.weight_hh_l0, single.weight_hh_l0.to(dtype))
        keep = slice(H, 2 * H)
        assert torch.equal(module.bias_ih_l0[keep], single.bias_ih_l0[keep].to(dtype))


def test_a_change_between_forward_and_backward_is_seen_by_autograd():
    module = nn.RNNCell(I, H)
    loss = module(torch.rand(2, I), module(torch.rand(2, I))).sum()
    init.orthogonal_(module)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: init.orthogonal_(nn.Linear(3, 3)), TypeError, "FusedRNN, nn.RNN.*got Linear"),
        (lambda: init.orthogonal_("rnn"), TypeError, "target: expected a recurrent.*got str"),
        (lambda: init.orthogonal_(torch.zeros(5, 3)), ValueError, r"gates \* H, H.*\(5, 3\)"),
        (lambda: init.orthogonal_(nn.RNN(3, 3), math.inf), ValueError, "gain: .*inf"),
        (lambda: init.scaled_gaussian_(nn.RNN(3, 3), -1), ValueError, "gain: .*at least 0.*-1"),
        (lambda: init.identity_(nn.LSTM(3, 3)), TypeError, "identity_: .*nn.RNN.*got LSTM"),
        (lambda: init.identity_(torch.zeros(6, 3)), ValueError, r"square.*\(6, 3\)"),
        (lambda: init.irnn_(nn.RNN(3, 3)), ValueError, "'relu', got 'tanh'"),
        (lambda: init.irnn_(nn.GRU(3, 3)), TypeError, "irnn_: .*got GRU"),
        (lambda: init.forget_bias_(nn.RNN(3, 3)), TypeError, "forget_bias_: .*nn.LSTM.*got RNN"),
        (lambda: init.forget_bias_(nn.GRU(3, 3, bias=False)), ValueError, "bias=False"),
        (lambda: init.forget_bias_(nn.GRU(3, 3), "1"), ValueError, "value: .*'1'"),
        (lambda: init.chrono_(FusedRNN(3, 3), 9), TypeError, "chrono_: .*got FusedRNN"),
        (lambda: init.chrono_(nn.LSTM(3, 3), 2), ValueError, "max_lag: .*at least 3, got 2"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_computed_weight_is_refused_before_anything_changes():
    module = layer(nn.RNN)
    parametrizations.orthogonal(module, "weight_hh_l1")
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="weight_hh_l1, but it is computed"):
        init.scaled_gaussian_(module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
