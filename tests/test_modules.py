"""What our layers, and cells with them, share with torch's beyond test_parity.py."""

import copy
import doctest
import importlib
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from rnn_cuda import (
    FusedGRUCell,
    FusedLSTM,
    FusedLSTMCell,
    FusedRNN,
    FusedRNNCell,
    backend,
)
from rnn_cuda.cells.elman import NONLINEARITIES, activation
from rnn_cuda.residual import AntisymmetricRNN, LeakyRNN
from tests.layers import (
    LAYERS,
    assert_same_gradients,
    every_kind,
    flat_results,
    halves,
    normal,
    pair,
    torch_kind,
)

OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False, "bidirectional": True},
    {"num_layers": 3, "bias": False, "batch_first": True, "dropout": 0.5},
]
RELU = {"nonlinearity": "relu", "bias": False}
OF_LAYERS = [*((kind, options) for options in OPTIONS for kind in LAYERS), (FusedRNN, RELU)]
CELLS = (FusedRNNCell, FusedGRUCell, FusedLSTMCell)
OF_CELLS = [*((kind, {}) for kind in CELLS), (FusedLSTMCell, {"bias": False}), (FusedRNNCell, RELU)]
every_layer = pytest.mark.parametrize(("kind", "options"), OF_LAYERS)
layers_and_cells = pytest.mark.parametrize(("kind", "options"), [*OF_LAYERS, *OF_CELLS])
INPUT = normal(4, 2, 3)
SINGLE = INPUT.float()


@pytest.mark.parametrize("name", ["modules", "cell", "convert"])
def test_docstring_examples_run(name):
    if backend.requested() == "emulated":
        pytest.skip("there are gated layers in the examples")
    result = doctest.testmod(importlib.import_module(f"rnn_cuda.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


# ---- construction --------------------------------------------------------------------------------


@layers_and_cells
def test_parameters_and_representation_are_torchs(kind, options):
    fused, oracle = pair(3, 5, kind=kind, **options)
    assert list(fused.state_dict()) == list(oracle.state_dict())

    def assert_same_parameters():
        for name, wanted in oracle.named_parameters():
            assert torch.equal(fused.get_parameter(name), wanted), name

    assert_same_parameters()
    for module in (fused, oracle):
        torch.manual_seed(7)
        module.reset_parameters()
    assert_same_parameters()
    oracle.load_state_dict({n: p + 1 for n, p in fused.state_dict().items()})
    fused.load_state_dict(oracle.state_dict())
    assert_same_parameters()
    assert repr(fused) == f"Fused{oracle!r}"
    assert set(fused.__constants__) >= set(oracle.__constants__)
    for name in oracle.__constants__:
        assert getattr(fused, name) == getattr(oracle, name)


def test_a_nonlinearity_that_torch_does_not_have_is_shown():
    assert repr(FusedRNN(3, 5, 1, "sigmoid")) == "FusedRNN(3, 5, nonlinearity=sigmoid)"


@every_kind
def test_positional_arguments_mean_what_they_mean_in_torch(kind):
    nonlinearity = ["relu"] if kind is FusedRNN else []
    no_projection = [0] if kind is FusedLSTM else []
    fused, oracle = pair(
        *(3, 5, 2, *nonlinearity, False, True, 0.25, True, *no_projection), kind=kind
    )
    for name in torch_kind(kind).__constants__:
        assert getattr(fused, name) == getattr(oracle, name), name


def test_dtype_and_device_arguments_place_every_parameter():
    fused = FusedRNN(3, 5, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in fused.parameters()} == {("meta", torch.float64)}


@every_kind
def test_dropout_warns_at_the_caller_with_one_layer_and_with_two_not(kind):
    with pytest.warns(UserWarning, match="dropout=0.5 has no effect with num_layers=1") as record:
        kind(3, 5, dropout=0.5)
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(3, 5, 2, dropout=0.5)


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
@pytest.mark.parametrize(("layer", "cell"), zip(LAYERS, CELLS, strict=False))
def test_a_duplicate_computes_the_same(duplicate, layer, cell):
    layer = layer(3, 5, 2, batch_first=True, bidirectional=True).eval()
    layer.weight_hh_l0.requires_grad_(False)
    layer_twin, cell = duplicate(layer), cell(3, 5).eval()
    for module, other, x in ((layer, layer_twin, SINGLE), (cell, duplicate(cell), SINGLE[0])):
        results = flat_results(other(x)), flat_results(module(x))
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)
        assert repr(other) == repr(module)
        assert not other.training
    assert not layer_twin.weight_hh_l0.requires_grad


# ---- forward and backward ------------------------------------------------------------------------


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_nonlinearity_is_applied_at_every_step(nonlinearity):
    rnn = FusedRNN(3, 5, nonlinearity=nonlinearity, dtype=torch.float64)
    W, U, b, c = rnn.all_weights[0]
    output, h_n = rnn(INPUT)
    h = torch.zeros(2, 5, dtype=torch.float64)
    for t in range(4):
        h = activation(INPUT[t] @ W.T + b + h @ U.T + c, nonlinearity)
        torch.testing.assert_close(output[t], h)
    torch.testing.assert_close(h_n[0], h)


def test_packed_sequence_keeps_batch_sizes_and_indices():
    packed = pack_sequence([normal(n, 3) for n in (2, 4, 1)], enforce_sorted=False)
    output, _ = FusedRNN(3, 5, dtype=torch.float64)(packed)
    assert isinstance(output, PackedSequence)
    for actual, expected in zip(output[1:], packed[1:], strict=True):
        assert torch.equal(actual, expected)


def test_expanded_initial_state_gets_the_sum_of_its_gradients():
    gradients = []
    for rnn in pair(3, 5, 2, dtype=torch.float64):
        start = normal(1, 1, 5).requires_grad_()
        rnn(normal(4, 6, 3), start.expand(2, 6, 5))[0].sum().backward()
        gradients.append(start.grad)
    torch.testing.assert_close(*gradients)


@every_layer
def test_results_can_be_detached_in_place_as_torchs(kind, options):
    # Truncated backpropagation through time does this to h_n; it is refused for views.
    for rnn in pair(3, 5, kind=kind, **options):
        _, *finals = flat_results(rnn(SINGLE))
        assert not any(final.detach_().requires_grad for final in finals)


@every_kind
def test_frozen_parameters_get_no_gradient_and_the_others_do(kind):
    fused, oracle = pair(3, 5, 2, kind=kind, dtype=torch.float64)
    for rnn in (fused, oracle):
        rnn.weight_hh_l0.requires_grad_(False)
        rnn.bias_ih_l1.requires_grad_(False)
        rnn(INPUT)[0].sum().backward()
    assert_same_gradients(fused, oracle)


# ---- dropout -------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("layout", ["dense", "batch_first", "packed"])
def test_dropout_draws_torchs_mask_under_the_same_seed(layout, kind):
    options = {"dropout": 0.4, "bidirectional": True, "batch_first": layout == "batch_first"}
    x = pack_sequence(list(normal(2, 4, 3))) if layout == "packed" else INPUT
    outputs = []
    for rnn in pair(3, 5, 3, kind=kind, **options, dtype=torch.float64):
        torch.manual_seed(3)
        results = flat_results(rnn(x))
        rnn.dropout = 0.5  # it can be changed later
        outputs.append([*results, *flat_results(rnn(x))])
    torch.testing.assert_close(*outputs)


def test_dropout_is_off_in_eval_mode_and_of_one_cuts_the_layers_apart():
    rnn = FusedRNN(3, 5, 2, dropout=1.0)
    assert torch.equal(rnn(SINGLE)[0], rnn(-SINGLE)[0])
    torch.testing.assert_close(rnn.eval()(SINGLE), rnn.to_torch()(SINGLE))


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
@every_kind
def test_reparametrized_weight_takes_effect_and_trains(kind, register):
    fused, oracle = pair(3, 5, 2, kind=kind, dtype=torch.float64)
    outputs = []
    for rnn in (fused, oracle):
        torch.manual_seed(5)
        register(rnn, "weight_hh_l0")
        # Spectral norm iterates whenever the weight is read in training, and nn.RNN reads it more
        # often than once per forward pass; in eval mode the weight stands still.
        outputs.append(rnn.eval()(INPUT)[0])
        outputs[-1].sum().backward()
    torch.testing.assert_close(*outputs)
    assert all(parameter.grad is not None for parameter in oracle.parameters())
    assert_same_gradients(fused, oracle)


def test_a_parametrized_weight_is_computed_once_per_forward_pass():
    class Counter(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            return weight

    rnn, counter = FusedRNN(3, 5, 2, bidirectional=True), Counter()
    parametrize.register_parametrization(rnn, "weight_hh_l0", counter)
    counter.calls = 0
    rnn(SINGLE)
    assert counter.calls == 1


# ---- what code written for nn.RNN reads and calls besides ----------------------------------------


def test_every_name_of_torchs_layer_is_there():
    # _flat_weight_refs is bookkeeping of the flat copy, which is not there.
    for cls in (*LAYERS, LeakyRNN, AntisymmetricRNN):
        torchs = nn.RNN if cls in (LeakyRNN, AntisymmetricRNN) else torch_kind(cls)
        assert set(dir(torchs(3, 5))) - set(dir(cls(3, 5))) == {"_flat_weight_refs"}


@every_layer
def test_lists_of_weights_and_sizes_of_states_are_torchs(kind, options):
    fused, oracle = pair(3, 5, kind=kind, **options)
    assert set(fused.__jit_unused_properties__) >= set(oracle.__jit_unused_properties__)
    assert fused._all_weights == oracle._all_weights
    assert fused._flat_weights_names == oracle._flat_weights_names
    weights = [fused.get_parameter(name) for name in fused._flat_weights_names]
    for listed in (fused._flat_weights, [w for each in fused.all_weights for w in each]):
        assert all(a is b for a, b in zip(listed, weights, strict=True))
    packed = pack_sequence([torch.zeros(4, 3), torch.zeros(2, 3)])
    for input, sizes in ((INPUT, None), (packed.data, packed.batch_sizes), (None, [7])):
        expected = oracle.get_expected_hidden_size(input, sizes)
        assert fused.get_expected_hidden_size(input, sizes) == expected
        if kind is FusedLSTM:
            assert fused.get_expected_cell_size(input, sizes) == expected


STATE = torch.zeros(1, 2, 5)
BAD = {
    "dtype": (INPUT, STATE, None, ValueError),
    "dimensions": (SINGLE[0], STATE, None, RuntimeError),
    "packed dimensions": (SINGLE, STATE, torch.tensor([2]), RuntimeError),
    "features": (SINGLE[..., :2], STATE, None, RuntimeError),
    "hidden size": (SINGLE, STATE[..., :4], None, RuntimeError),
}


@every_kind
@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_checks_refuse_bad_arguments_in_torchs_words(case, kind):
    input, state, sizes, error = case
    states = (STATE, state) if kind is FusedLSTM else state
    said = []
    for rnn in (kind(3, 5), torch_kind(kind)(3, 5)):
        with pytest.raises(error) as caught:
            rnn.check_forward_args(input, states, sizes)
        said.append(str(caught.value))
    assert said[0] == said[1]


@every_kind
def test_checks_let_good_arguments_pass(kind):
    packed, rnn = pack_sequence([torch.zeros(4, 3), torch.zeros(2, 3)]), kind(3, 5)
    states = (STATE, STATE) if kind is FusedLSTM else STATE
    rnn.check_forward_args(SINGLE, states, None)
    rnn.check_forward_args(packed.data, states, packed.batch_sizes)
    with torch.autocast("cpu"):
        rnn.check_input(SINGLE.bfloat16(), None)
    with pytest.raises(RuntimeError, match="one"):
        rnn.check_hidden_size(torch.zeros(1), (1, 2, 5), "one {} two {}")


def test_hidden_states_are_permuted():
    hx, order = torch.randn(1, 3, 5), torch.tensor([2, 0, 1])
    assert torch.equal(FusedRNN(3, 5).permute_hidden(hx, order), hx[:, order])
    assert FusedRNN(3, 5).permute_hidden(hx, None) is hx
    h, c = FusedLSTM(3, 5).permute_hidden((hx, -hx), order)
    assert torch.equal(h, hx[:, order])
    assert torch.equal(c, -h)


def test_flat_weights_follow_what_is_set_and_set_what_is_given():
    rnn = FusedRNN(3, 5)
    before = [(p, p.data_ptr()) for p in rnn.parameters()]
    assert rnn.flatten_parameters() is None
    assert [(p, p.data_ptr()) for p in rnn.parameters()] == before

    rnn.weight_hh_l0 = nn.Parameter(torch.zeros(5, 5))
    assert not rnn._weights_have_changed()
    rnn._update_flat_weights()
    rnn._init_flat_weights()
    assert rnn._flat_weights[1] is rnn.weight_hh_l0

    expected, other = copy.deepcopy(rnn), nn.Parameter(torch.randn(5, 5))
    expected.weight_hh_l0 = other
    rnn._flat_weights[1] = other
    assert rnn.weight_hh_l0 is other
    assert torch.equal(rnn(SINGLE)[0], expected(SINGLE)[0])
    with pytest.raises(ValueError, match="zip"):
        rnn._flat_weights = []

    parametrize.register_parametrization(rnn, "weight_ih_l0", nn.Tanh())
    prune.l1_unstructured(rnn, "weight_hh_l0", 0.5)
    assert torch.equal(rnn._flat_weights[0], rnn.weight_ih_l0)
    assert rnn._flat_weights[1] is rnn.weight_hh_l0


def test_weight_dropping_by_hand_drops_weights():
    """As AWD-LSTM's code does: a plain tensor in the parameter's place, then the flat list anew."""

    def drop(rnn: nn.Module) -> Tensor:
        raw = rnn._parameters["weight_hh_l0"]
        torch.manual_seed(0)
        rnn._parameters["weight_hh_l0"] = dropout(raw, 0.5)
        rnn._flat_weights = [getattr(rnn, name) for name in rnn._flat_weights_names]
        rnn._flat_weights[1] = rnn._parameters["weight_hh_l0"]
        rnn.flatten_parameters()
        output = rnn(SINGLE)[0]
        output.sum().backward()
        return torch.cat([output.flatten(), raw.grad.flatten()])

    for kind in LAYERS:
        torch.testing.assert_close(*(drop(rnn) for rnn in pair(3, 5, kind=kind)))


@every_kind
def test_a_replica_of_data_parallel_computes_the_same(kind):
    # On GPUs torch.nn.DataParallel makes these, with plain tensors as attributes.
    rnn = kind(3, 5)
    replica = rnn._replicate_for_data_parallel()
    for name, parameter in rnn.named_parameters():
        setattr(replica, name, parameter.view_as(parameter))
    assert torch.equal(replica(SINGLE)[0], rnn(SINGLE)[0])


def test_a_missing_weight_is_named_where_weights_are_read():
    rnn = FusedRNN(3, 5)
    del rnn.weight_hh_l0
    for read in (lambda: rnn.all_weights, lambda: rnn._flat_weights, lambda: rnn(SINGLE)):
        with pytest.raises(RuntimeError, match="weight_hh_l0: expected a weight of this name"):
            read()


# ---- autocast: test_training_modes.py has the gradients ------------------------------------------


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_torchs_dtypes_and_leaves_float64_alone(lower, kind):
    is_cell = kind in CELLS
    # torch's GRU and LSTM do so on GPUs; on CPUs they return float32, or raise.
    is_torchs = kind in (FusedRNN, FusedRNNCell)
    fused, oracle = pair(3, 5, kind=kind, **({} if is_cell else {"bidirectional": True}))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = SINGLE.to(dtype)
        state = normal(2, 2, 5, dtype=torch.float32)
        arguments = (x[0],) if is_cell else (x, (state, state) if kind is FusedLSTM else state)
        with torch.autocast("cpu", dtype=lower):
            actual = fused(*arguments)
        with torch.autocast("cpu", dtype=lower, enabled=is_torchs):
            expected = oracle(*(arguments if is_torchs else (arguments[0].float(), *arguments[1:])))
        for a, e in zip(flat_results(actual), flat_results(expected), strict=True):
            assert a.dtype == lower
            assert e.dtype == lower or not is_torchs
            torch.testing.assert_close(a, e.to(lower), rtol=0, atol=4 * torch.finfo(lower).eps)

    x = INPUT[0] if is_cell else INPUT
    with torch.autocast("cpu", dtype=lower):
        torch.testing.assert_close(fused.double()(x), oracle.double()(x))


@halves
def test_autocast_rounds_once_per_step(dtype):
    rnn = FusedRNN(64, 64, bias=False)
    x = normal(1, 32, 64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        actual, _ = rnn(x)
    exact, _ = copy.deepcopy(rnn).to(dtype).double()(x.to(dtype).double())
    one_rounding = (exact.to(dtype).double() - exact).norm()
    assert (actual.double() - exact).norm() <= 1.01 * one_rounding


# ---- what is not finite --------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("length", [1, 2, 5, 40])
def test_an_infinite_input_spreads_as_in_torch(length, kind):
    fused, oracle = pair(3, 5, kind=kind, dtype=torch.float64)
    x = normal(length, 2, 3)
    x[0, 0, 1], x[length // 2, 1, 0] = float("inf"), -float("inf")
    torch.testing.assert_close(fused(x), oracle(x), equal_nan=True)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("absent", ["bias_ih", "bias_hh"])
def test_a_bias_of_a_cell_may_be_none(absent, kind):
    cell, oracle = pair(3, 5, kind=kind)
    setattr(cell, absent, None)
    nn.init.zeros_(getattr(oracle, absent))
    torch.testing.assert_close(cell(SINGLE[0]), oracle(SINGLE[0]))
