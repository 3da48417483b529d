"""What FusedRNN shares with torch.nn.RNN beyond the numbers of test_parity.py."""

import copy
import doctest
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnn_cuda.modules
from rnn_cuda import FusedRNN
from rnn_cuda.cells.elman import NONLINEARITIES, activation

CONFIGURATIONS = [
    {},
    {"num_layers": 2},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "bidirectional": True},
    {"num_layers": 3, "nonlinearity": "relu", "bias": False, "batch_first": True, "dropout": 0.5},
]


def _pair(*args, seed: int = 0, **kwargs) -> tuple[FusedRNN, nn.RNN]:
    """Return both modules, constructed alike after the same seed."""
    torch.manual_seed(seed)
    fused = FusedRNN(*args, **kwargs)
    torch.manual_seed(seed)
    return fused, nn.RNN(*args, **kwargs)


def _normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_docstring_examples_run():
    result = doctest.testmod(rnn_cuda.modules)

    assert result.attempted > 0
    assert result.failed == 0


# ---- construction --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_parameters_have_torchs_names_order_shapes_and_initial_values(options):
    fused, oracle = _pair(3, 5, **options)

    expected = list(oracle.named_parameters())
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in expected]
    for (name, actual), (_, wanted) in zip(fused.named_parameters(), expected, strict=True):
        assert torch.equal(actual, wanted), name


def test_reset_parameters_draws_what_torch_draws():
    fused, oracle = _pair(3, 5, 2, bidirectional=True)
    torch.manual_seed(7)
    fused.reset_parameters()
    torch.manual_seed(7)
    oracle.reset_parameters()

    for name, wanted in oracle.named_parameters():
        assert torch.equal(fused.get_parameter(name), wanted), name


def test_positional_arguments_mean_what_they_mean_in_torch():
    fused, oracle = _pair(3, 5, 2, "relu", False, True, 0.25, True)

    for name in (
        "input_size",
        "hidden_size",
        "num_layers",
        "nonlinearity",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
    ):
        assert getattr(fused, name) == getattr(oracle, name), name


def test_dtype_and_device_arguments_place_every_parameter():
    fused = FusedRNN(3, 5, device="meta", dtype=torch.float64)

    assert {(p.device.type, p.dtype) for p in fused.parameters()} == {("meta", torch.float64)}


def test_dropout_with_one_layer_warns_at_the_caller():
    with pytest.warns(UserWarning, match="dropout=0.5 has no effect with num_layers=1") as record:
        FusedRNN(3, 5, dropout=0.5)

    assert record[0].filename == __file__


def test_dropout_with_two_layers_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FusedRNN(3, 5, 2, dropout=0.5)


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_repr_is_torchs(options):
    fused, oracle = _pair(3, 5, **options)

    assert repr(fused) == repr(oracle).replace("RNN(", "FusedRNN(")


def test_repr_shows_a_nonlinearity_that_torch_does_not_have():
    assert repr(FusedRNN(3, 5, 1, "sigmoid")) == "FusedRNN(3, 5, nonlinearity=sigmoid)"


def test_all_weights_lists_the_parameters_of_each_layer_and_direction():
    fused, oracle = _pair(3, 5, 2, bidirectional=True)

    expected = oracle.all_weights
    assert len(fused.all_weights) == len(expected) == 4
    for actual, wanted in zip(fused.all_weights, expected, strict=True):
        assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))


# ---- state dict, copies, storage -----------------------------------------------------------------


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_state_dict_loads_into_torch_and_back(options):
    fused, oracle = FusedRNN(3, 5, **options), nn.RNN(3, 5, **options)

    assert list(fused.state_dict()) == list(oracle.state_dict())
    oracle.load_state_dict(fused.state_dict())
    assert all(torch.equal(oracle.get_parameter(n), p) for n, p in fused.named_parameters())
    other = FusedRNN(3, 5, **options)
    other.load_state_dict(oracle.state_dict())
    assert all(torch.equal(other.get_parameter(n), p) for n, p in fused.named_parameters())


def _saved_and_loaded(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), _saved_and_loaded],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_a_duplicate_computes_the_same(duplicate: Callable[[FusedRNN], FusedRNN]):
    fused = FusedRNN(3, 5, 2, "relu", batch_first=True, bidirectional=True).eval()
    fused.weight_hh_l0.requires_grad_(False)
    x = _normal(2, 4, 3, dtype=torch.float32)

    other = duplicate(fused)

    assert torch.equal(other(x)[0], fused(x)[0])
    assert repr(other) == repr(fused)
    assert not other.training
    assert not other.weight_hh_l0.requires_grad


def test_a_deep_copy_is_independent():
    fused = FusedRNN(3, 5)
    other = copy.deepcopy(fused)
    with torch.no_grad():
        other.weight_hh_l0.zero_()

    assert fused.weight_hh_l0.abs().sum() > 0


def test_share_memory_shares_every_parameter():
    assert all(p.is_shared() for p in FusedRNN(3, 5).share_memory().parameters())


def test_flatten_parameters_changes_nothing():
    fused = FusedRNN(3, 5)
    before = [(p, p.data_ptr()) for p in fused.parameters()]

    assert fused.flatten_parameters() is None
    assert [(p, p.data_ptr()) for p in fused.parameters()] == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to_changes_the_dtype_of_the_computation(dtype):
    output, h_n = FusedRNN(3, 5, 2).to(dtype)(_normal(4, 2, 3, dtype=dtype))

    assert output.dtype == h_n.dtype == dtype


def test_to_meta_computes_shapes():
    output, h_n = FusedRNN(3, 5, 2, bidirectional=True).to("meta")(
        torch.empty(4, 2, 3, device="meta")
    )

    assert output.shape == (4, 2, 10)
    assert h_n.shape == (4, 2, 5)


# ---- forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_nonlinearity_is_applied_at_every_step(nonlinearity):
    rnn = FusedRNN(3, 5, nonlinearity=nonlinearity, dtype=torch.float64)
    x = _normal(4, 2, 3)
    W, U, b, c = rnn.all_weights[0]

    output, h_n = rnn(x)

    h = torch.zeros(2, 5, dtype=torch.float64)
    for t in range(4):
        h = activation(x[t] @ W.T + b + h @ U.T + c, nonlinearity)
        torch.testing.assert_close(output[t], h)
    torch.testing.assert_close(h_n[0], h)


@pytest.mark.parametrize("batch_first", [False, True])
def test_empty_batch_gives_empty_output_and_zero_gradients(batch_first):
    rnn = FusedRNN(3, 5, 2, batch_first=batch_first, bidirectional=True)
    x = torch.empty((0, 4, 3) if batch_first else (4, 0, 3), requires_grad=True)

    output, h_n = rnn(x)
    (output.sum() + h_n.sum()).backward()

    assert output.shape == ((0, 4, 10) if batch_first else (4, 0, 10))
    assert h_n.shape == (4, 0, 5)
    assert x.grad.shape == x.shape
    for name, parameter in rnn.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_packed_sequence_keeps_batch_sizes_and_indices():
    packed = pack_sequence([_normal(n, 3) for n in (2, 4, 1)], enforce_sorted=False)

    output, _ = FusedRNN(3, 5, dtype=torch.float64)(packed)

    assert isinstance(output, PackedSequence)
    for actual, expected in zip(output[1:], packed[1:], strict=True):
        assert torch.equal(actual, expected)


def test_packed_states_are_in_the_order_of_the_samples():
    rnn = FusedRNN(3, 5, 2, bidirectional=True, dtype=torch.float64)
    sequences = [_normal(n, 3) for n in (2, 4, 1)]
    hx = _normal(4, 3, 5)

    _, h_n = rnn(pack_sequence(sequences, enforce_sorted=False), hx)

    for sample, sequence in enumerate(sequences):
        torch.testing.assert_close(h_n[:, sample], rnn(sequence, hx[:, sample])[1])


def test_batch_first_does_not_affect_unbatched_input():
    fused, oracle = _pair(3, 5, batch_first=True, dtype=torch.float64)
    x = _normal(4, 3)

    torch.testing.assert_close(fused(x), oracle(x))


def test_expanded_initial_state_gets_the_sum_of_its_gradients():
    fused, oracle = _pair(3, 5, 2, dtype=torch.float64)
    gradients = []
    for rnn in (fused, oracle):
        start = _normal(1, 1, 5).requires_grad_()
        rnn(_normal(4, 6, 3), start.expand(2, 6, 5))[0].sum().backward()
        gradients.append(start.grad)

    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("used", ["output", "h_n"])
def test_gradient_through_one_result_alone(used):
    fused, oracle = _pair(3, 5, 2, bidirectional=True, dtype=torch.float64)
    for rnn in (fused, oracle):
        output, h_n = rnn(_normal(4, 2, 3))
        # The sum's gradient is an expanded tensor of zero strides.
        (output if used == "output" else h_n).sum().backward()

    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(fused.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_results_can_be_detached_in_place_as_torchs(options):
    # Truncated backpropagation through time does this to h_n; it is refused for views.
    fused, oracle = _pair(3, 5, **options)
    for rnn in (fused, oracle):
        _, h_n = rnn(_normal(4, 2, 3).float())
        assert not h_n.detach_().requires_grad


def test_backward_in_eval_mode():
    fused, oracle = _pair(3, 5, 2, dropout=0.5, dtype=torch.float64)
    for rnn in (fused, oracle):
        rnn.eval()(_normal(4, 2, 3))[0].sum().backward()

    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(fused.get_parameter(name).grad, parameter.grad)


def test_frozen_parameters_get_no_gradient_and_the_others_do():
    fused, oracle = _pair(3, 5, 2, dtype=torch.float64)
    for rnn in (fused, oracle):
        rnn.weight_hh_l0.requires_grad_(False)
        rnn.bias_ih_l1.requires_grad_(False)
        rnn(_normal(4, 2, 3))[0].sum().backward()

    for name, parameter in oracle.named_parameters():
        actual = fused.get_parameter(name).grad
        if parameter.grad is None:
            assert actual is None, name
        else:
            torch.testing.assert_close(actual, parameter.grad)


def test_no_graph_is_kept_when_everything_is_frozen():
    output, h_n = FusedRNN(3, 5).requires_grad_(False)(torch.zeros(4, 2, 3))

    assert not output.requires_grad
    assert not h_n.requires_grad


def test_gradients_of_gradients_are_right():
    rnn = FusedRNN(2, 3, 2, bidirectional=True, dtype=torch.float64)
    x, hx = _normal(3, 2, 2).requires_grad_(), _normal(4, 2, 3).requires_grad_()

    assert torch.autograd.gradcheck(rnn, (x, hx))
    assert torch.autograd.gradgradcheck(rnn, (x, hx))


def test_training_lowers_the_loss_by_the_same_steps_as_torch():
    fused, oracle = _pair(3, 5, 2, dtype=torch.float64)
    x, target = _normal(6, 4, 3), _normal(6, 4, 5).tanh()
    histories = []
    for rnn in (fused, oracle):
        optimizer, losses = torch.optim.Adam(rnn.parameters(), lr=0.02), []
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(rnn(x)[0], target)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        histories.append(torch.stack(losses))

    torch.testing.assert_close(*histories)
    assert histories[0][-1] < 0.9 * histories[0][0]


# ---- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "batch_first", "packed"])
def test_dropout_draws_torchs_mask_under_the_same_seed(layout):
    fused, oracle = _pair(
        3,
        5,
        3,
        dropout=0.4,
        bidirectional=True,
        batch_first=layout == "batch_first",
        dtype=torch.float64,
    )
    x = _normal(4, 2, 3)
    if layout == "packed":
        x = pack_sequence(list(_normal(2, 4, 3)))
    outputs = []
    for rnn in (fused, oracle):
        torch.manual_seed(3)
        output, h_n = rnn(x)
        outputs.append((output.data, h_n))

    torch.testing.assert_close(*outputs)


def test_dropout_is_off_in_eval_mode():
    rnn = FusedRNN(3, 5, 2, dropout=0.5).eval()
    x = _normal(4, 2, 3, dtype=torch.float32)

    assert torch.equal(rnn(x)[0], rnn(x)[0])


def test_dropout_of_one_cuts_the_layers_apart():
    rnn = FusedRNN(3, 5, 2, dropout=1.0)
    x = _normal(4, 2, 3, dtype=torch.float32)

    assert torch.equal(rnn(x)[0], rnn(-x)[0])


def test_dropout_can_be_changed_after_construction():
    fused, oracle = _pair(3, 5, 2, dtype=torch.float64)
    outputs = []
    for rnn in (fused, oracle):
        rnn.dropout = 0.5
        torch.manual_seed(3)
        outputs.append(rnn(_normal(4, 2, 3))[0])

    torch.testing.assert_close(*outputs)


# ---- parameters from elsewhere -------------------------------------------------------------------


@pytest.mark.parametrize(
    "register",
    [
        parametrizations.orthogonal,
        parametrizations.spectral_norm,
        parametrizations.weight_norm,
        pytest.param(
            nn.utils.weight_norm,
            marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
            id="old-style weight_norm",
        ),
        lambda rnn, name: prune.random_unstructured(rnn, name, amount=0.5),
    ],
    ids=lambda f: {"<lambda>": "prune"}.get(f.__name__, f.__name__),
)
def test_reparametrized_weight_takes_effect_and_trains(register):
    fused, oracle = _pair(3, 5, 2, dtype=torch.float64)
    outputs = []
    for rnn in (fused, oracle):
        torch.manual_seed(5)
        register(rnn, "weight_hh_l0")
        # Spectral norm iterates whenever the weight is read in training, and nn.RNN reads it more
        # often than once per forward pass; in eval mode the weight stands still.
        outputs.append(rnn.eval()(_normal(4, 2, 3))[0])
        outputs[-1].sum().backward()

    torch.testing.assert_close(*outputs)
    for name, parameter in oracle.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(fused.get_parameter(name).grad, parameter.grad)


def test_a_parametrized_weight_is_computed_once_per_forward_pass():
    class Counter(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            return weight

    rnn, counter = FusedRNN(3, 5, 2, bidirectional=True), Counter()
    nn.utils.parametrize.register_parametrization(rnn, "weight_hh_l0", counter)
    counter.calls = 0

    rnn(torch.zeros(4, 2, 3))

    assert counter.calls == 1


def test_functional_call_uses_the_given_parameters():
    fused, other = FusedRNN(3, 5, 2), FusedRNN(3, 5, 2)
    x = _normal(4, 2, 3, dtype=torch.float32)

    output, _ = torch.func.functional_call(fused, dict(other.named_parameters()), (x,))

    assert torch.equal(output, other(x)[0])
    assert not torch.equal(output, fused(x)[0])


def test_stacked_modules_run_as_an_ensemble():
    models = [FusedRNN(3, 5, 2, bidirectional=True, dtype=torch.float64) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = _normal(4, 2, 3)

    def run(p: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(models[0], (p, b), (x,))

    outputs, states = torch.func.vmap(run)(parameters, buffers)

    for index, model in enumerate(models):
        torch.testing.assert_close((outputs[index], states[index]), model(x))


def test_a_parameter_assigned_later_is_used():
    rnn = FusedRNN(3, 5)
    rnn.weight_ih_l0 = nn.Parameter(torch.zeros(5, 3))
    x = _normal(4, 2, 3, dtype=torch.float32)

    assert torch.equal(rnn(x)[0], rnn(-x)[0])


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_torchs_dtypes(dtype, lower):
    fused, oracle = _pair(3, 5, 2, bidirectional=True)
    x, hx = _normal(4, 2, 3, dtype=dtype), _normal(4, 2, 5, dtype=torch.float32)

    with torch.autocast("cpu", dtype=lower):
        actual, expected = fused(x, hx), oracle(x, hx)

    assert [t.dtype for t in actual] == [t.dtype for t in expected] == [lower, lower]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=4 * torch.finfo(lower).eps)


def test_autocast_gives_float32_gradients_to_float32_parameters():
    fused, oracle = _pair(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for rnn in (fused, oracle):
            output, _ = rnn(_normal(4, 2, 3, dtype=torch.float32))
            output.sum().backward()

    for name, parameter in oracle.named_parameters():
        actual = fused.get_parameter(name).grad
        assert actual.dtype == parameter.grad.dtype == torch.float32
        assert (actual - parameter.grad).norm() <= 0.02 * parameter.grad.norm(), name


def test_autocast_leaves_float64_alone():
    fused, oracle = _pair(3, 5, dtype=torch.float64)
    x = _normal(4, 2, 3)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = fused(x), oracle(x)

    torch.testing.assert_close(actual, expected)
    assert actual[0].dtype == torch.float64


def test_autocast_rounds_once_per_step():
    rnn = FusedRNN(64, 64, bias=False)
    x = _normal(1, 32, 64, dtype=torch.float32)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, _ = rnn(x)

    exact, _ = copy.deepcopy(rnn).bfloat16().double()(x.bfloat16().double())
    one_rounding = (exact.bfloat16().double() - exact).norm()
    assert (actual.double() - exact).norm() <= 1.01 * one_rounding
