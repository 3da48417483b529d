"""What code written for torch.nn.RNN reads and calls besides forward."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import pack_sequence

from rnn_cuda import FusedRNN
from rnn_cuda.residual import AntisymmetricRNN, LeakyRNN

CONFIGURATIONS = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bias": False},
]
INPUT = torch.randn(4, 2, 3)


def test_every_name_of_torchs_layer_is_there():
    # _flat_weight_refs is bookkeeping of the flat copy, which is not there.
    for cls in (FusedRNN, LeakyRNN, AntisymmetricRNN):
        assert set(dir(nn.RNN(3, 5))) - set(dir(cls(3, 5))) == {"_flat_weight_refs"}


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_names_and_constants_are_torchs(options):
    fused, oracle = FusedRNN(3, 5, **options), nn.RNN(3, 5, **options)

    for name in oracle.__constants__:
        assert name in fused.__constants__
        assert getattr(fused, name) == getattr(oracle, name)
    assert set(fused.__jit_unused_properties__) >= set(oracle.__jit_unused_properties__)
    assert fused._all_weights == oracle._all_weights
    assert fused._flat_weights_names == oracle._flat_weights_names
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in oracle.named_parameters()]
    weights = [fused.get_parameter(name) for name in fused._flat_weights_names]
    assert all(a is b for a, b in zip(fused._flat_weights, weights, strict=True))


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_expected_hidden_size_is_torchs(options):
    fused, oracle = FusedRNN(3, 5, **options), nn.RNN(3, 5, **options)
    packed = pack_sequence([torch.zeros(4, 3), torch.zeros(2, 3)])

    for input, sizes in ((INPUT, None), (packed.data, packed.batch_sizes), (None, [7])):
        expected = oracle.get_expected_hidden_size(input, sizes)
        assert fused.get_expected_hidden_size(input, sizes) == expected


BAD = {
    "dtype": (INPUT.double(), torch.zeros(1, 2, 5), None, ValueError),
    "dimensions": (INPUT[0], torch.zeros(1, 2, 5), None, RuntimeError),
    "packed dimensions": (INPUT, torch.zeros(1, 2, 5), torch.tensor([2]), RuntimeError),
    "features": (INPUT[..., :2], torch.zeros(1, 2, 5), None, RuntimeError),
    "hidden size": (INPUT, torch.zeros(1, 2, 4), None, RuntimeError),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_in_torchs_words(case):
    input, hidden, batch_sizes, error = case
    with pytest.raises(error) as theirs:
        nn.RNN(3, 5).check_forward_args(input, hidden, batch_sizes)
    with pytest.raises(error) as ours:
        FusedRNN(3, 5).check_forward_args(input, hidden, batch_sizes)

    assert str(ours.value) == str(theirs.value)


def test_good_arguments_pass():
    packed = pack_sequence([torch.zeros(4, 3), torch.zeros(2, 3)])
    rnn = FusedRNN(3, 5)

    rnn.check_forward_args(INPUT, torch.zeros(1, 2, 5), None)
    rnn.check_forward_args(packed.data, torch.zeros(1, 2, 5), packed.batch_sizes)
    with torch.autocast("cpu"):
        rnn.check_input(INPUT.bfloat16(), None)
    with pytest.raises(RuntimeError, match="one"):
        rnn.check_hidden_size(torch.zeros(1), (1, 2, 5), "one {} two {}")


def test_hidden_states_are_permuted():
    hx, order = torch.randn(1, 3, 5), torch.tensor([2, 0, 1])

    assert torch.equal(FusedRNN(3, 5).permute_hidden(hx, order), hx[:, order])
    assert FusedRNN(3, 5).permute_hidden(hx, None) is hx


def test_nothing_has_to_be_brought_up_to_date():
    rnn = FusedRNN(3, 5)
    rnn.weight_hh_l0 = nn.Parameter(torch.zeros(5, 5))

    assert not rnn._weights_have_changed()
    rnn._update_flat_weights()
    rnn._init_flat_weights()
    assert rnn._flat_weights[1] is rnn.weight_hh_l0


def test_a_weight_set_among_the_flat_ones_is_the_layers():
    rnn = FusedRNN(3, 5)
    expected, other = copy.deepcopy(rnn), nn.Parameter(torch.randn(5, 5))
    expected.weight_hh_l0 = other

    rnn._flat_weights[1] = other

    assert rnn.weight_hh_l0 is other
    assert torch.equal(rnn(INPUT)[0], expected(INPUT)[0])


def test_weight_dropping_by_hand_drops_weights():
    """As AWD-LSTM's code does: a plain tensor in the parameter's place, then the flat list anew."""

    def drop(rnn: nn.Module) -> Tensor:
        raw = rnn._parameters["weight_hh_l0"]
        torch.manual_seed(0)
        rnn._parameters["weight_hh_l0"] = dropout(raw, 0.5)
        rnn._flat_weights = [getattr(rnn, name) for name in rnn._flat_weights_names]
        rnn._flat_weights[1] = rnn._parameters["weight_hh_l0"]
        rnn.flatten_parameters()
        output = rnn(INPUT)[0]
        output.sum().backward()
        return torch.cat([output.flatten(), raw.grad.flatten()])

    fused = FusedRNN(3, 5)
    oracle = fused.to_torch()
    torch.testing.assert_close(drop(fused), drop(oracle))


def test_flat_weights_that_are_too_few_are_refused():
    with pytest.raises(ValueError, match="zip"):
        FusedRNN(3, 5)._flat_weights = []


def test_parametrized_and_pruned_weights_are_among_the_flat_ones():
    rnn = FusedRNN(3, 5)
    parametrize.register_parametrization(rnn, "weight_ih_l0", nn.Tanh())
    prune.l1_unstructured(rnn, "weight_hh_l0", 0.5)

    assert torch.equal(rnn._flat_weights[0], rnn.weight_ih_l0)
    assert rnn._flat_weights[1] is rnn.weight_hh_l0


def test_a_replica_of_data_parallel_computes_the_same():
    # On GPUs torch.nn.DataParallel makes these, with plain tensors as attributes.
    rnn = FusedRNN(3, 5)
    replica = rnn._replicate_for_data_parallel()
    for name, parameter in rnn.named_parameters():
        setattr(replica, name, parameter.view_as(parameter))

    assert torch.equal(replica(INPUT)[0], rnn(INPUT)[0])


def test_a_missing_weight_is_named_where_weights_are_read():
    rnn = FusedRNN(3, 5)
    del rnn.weight_hh_l0

    for read in (lambda: rnn.all_weights, lambda: rnn._flat_weights, lambda: rnn(INPUT)):
        with pytest.raises(RuntimeError, match="weight_hh_l0: expected a weight of this name"):
            read()
