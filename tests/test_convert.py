"""from_torch, to_torch and replace_rnn."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from rnn_cuda import FusedGRU, FusedLSTM, FusedRNN, replace_rnn
from tests.layers import normal

INPUT = normal(4, 2, 3)
KINDS = {nn.RNN: FusedRNN, nn.GRU: FusedGRU, nn.LSTM: FusedLSTM}


class _Tagger(nn.Module):
    """An existing model: an RNN below a linear read-out, nested one level deep."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"rnn": nn.RNN(3, 5, 2, dropout=0.5, bidirectional=True)})
        self.readout = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.encoder["rnn"](x)[0])


# ---- from_torch and to_torch ---------------------------------------------------------------------


@pytest.mark.parametrize("is_from_torch", [True, False], ids=["from_torch", "to_torch"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.RNN, {}),
        (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
        (nn.LSTM, {"num_layers": 2, "bias": False, "bidirectional": True}),
        (nn.RNN, {"num_layers": 2, "nonlinearity": "relu", "bias": False, "dropout": 0.5}),
    ],
    ids=str,
)
def test_a_conversion_takes_over_configuration_and_results_and_copies(kind, options, is_from_torch):
    fused = KINDS[kind]
    source, convert = (kind, fused.from_torch) if is_from_torch else (fused, fused.to_torch)
    rnn = source(3, 5, **options, dtype=torch.float64).eval()
    rnn.weight_hh_l0.requires_grad_(False)
    other = convert(rnn)
    assert {type(rnn), type(other)} == {kind, fused}
    for name in (*kind.__constants__, "training"):
        assert getattr(other, name) == getattr(rnn, name), name
    expected, kept = rnn(INPUT), [p.requires_grad for p in rnn.parameters()]
    assert [p.requires_grad for p in other.parameters()] == kept
    torch.testing.assert_close(other(INPUT), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    torch.testing.assert_close(rnn(INPUT), expected)


def test_from_torch_keeps_shared_parameters_shared():
    rnn = nn.RNN(5, 5, 2)
    rnn.weight_hh_l1 = rnn.weight_hh_l0
    fused = FusedRNN.from_torch(rnn)
    assert fused.weight_hh_l1 is fused.weight_hh_l0
    assert fused.weight_hh_l0 is not rnn.weight_hh_l0


@pytest.mark.filterwarnings("error")
def test_conversion_draws_no_random_numbers_and_does_not_warn_again():
    with pytest.warns(UserWarning, match="dropout"):
        rnn = nn.RNN(3, 5, dropout=0.5)
    state = torch.get_rng_state()
    assert FusedRNN.from_torch(rnn).to_torch().dropout == 0.5
    assert torch.equal(torch.get_rng_state(), state)


def test_from_torch_of_a_subclass_of_fused_rnn_gives_that_subclass():
    class Named(FusedRNN):
        pass

    assert type(Named.from_torch(nn.RNN(3, 5))) is Named


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("module", [nn.RNNBase("GRU", 3, 5), nn.Linear(3, 5), "rnn"], ids=str)
def test_from_torch_of_anything_else_is_a_type_error(module, kind):
    expected = f"rnn must be a torch.nn.{kind.__name__}, got {type(module).__name__}"
    with pytest.raises(TypeError, match=expected):
        KINDS[kind].from_torch(module)


def test_an_lstm_with_projections_is_refused_and_replace_rnn_leaves_it_alone():
    lstm = nn.LSTM(3, 5, proj_size=2)
    with pytest.raises(ValueError, match=r"proj_size: expected 0, got 2.*torch\.nn\.LSTM does"):
        FusedLSTM.from_torch(lstm)
    with pytest.warns(UserWarning, match="model is left alone: a FusedLSTM has no projections"):
        assert replace_rnn(lstm) is lstm


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "identity", "softplus"])
def test_to_torch_refuses_what_torch_does_not_have(nonlinearity):
    with pytest.raises(ValueError, match=f"nonlinearity must be .*got '{nonlinearity}'"):
        FusedRNN(3, 5, nonlinearity=nonlinearity).to_torch()


REPARAMETRIZATIONS = {
    "parametrization": lambda rnn: parametrizations.orthogonal(rnn, "weight_hh_l0"),
    "pruning": lambda rnn: prune.random_unstructured(rnn, "weight_hh_l0", amount=0.5),
    "old-style weight_norm": lambda rnn: nn.utils.weight_norm(rnn, "weight_hh_l0"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("register", REPARAMETRIZATIONS.values(), ids=REPARAMETRIZATIONS)
def test_computed_weights_are_refused_by_name(register):
    rnn, fused, model = nn.RNN(3, 5), FusedRNN(3, 5), nn.Sequential(nn.RNN(3, 3), nn.RNN(3, 5))
    for module in (rnn, fused, model[1]):
        register(module)
    message = "plain parameters.* weight_hh_l0"
    with pytest.raises(ValueError, match=message):
        FusedRNN.from_torch(rnn)
    with pytest.raises(ValueError, match=message):
        fused.to_torch()
    with pytest.raises(ValueError, match=r"model\.1: .*" + message):
        replace_rnn(model)
    assert type(model[0]) is nn.RNN  # an error replaces nothing


# ---- replace_rnn ---------------------------------------------------------------------------------


def test_a_model_goes_on_as_before_and_so_does_an_optimizer_made_beforehand():
    model, oracle = _Tagger().double().eval(), _Tagger().double().eval()
    oracle.load_state_dict(model.state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (model, oracle)]
    parameters = list(model.parameters())

    assert replace_rnn(model) is model
    assert type(model.encoder["rnn"]) is FusedRNN
    assert not model.encoder["rnn"].training
    assert list(model.state_dict()) == list(oracle.state_dict())
    torch.testing.assert_close(model(INPUT), oracle(INPUT))

    for _ in range(3):
        for m, optimizer in zip((model, oracle), optimizers, strict=True):
            optimizer.zero_grad()
            m(INPUT).square().sum().backward()
            optimizer.step()
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter)


def test_what_is_shared_stays_shared():
    rnn, other = nn.RNN(5, 5), nn.RNN(5, 5)
    other.weight_hh_l0 = rnn.weight_hh_l0
    model = nn.ModuleDict({"a": nn.Sequential(rnn), "b": rnn, "c": rnn, "other": other})
    replace_rnn(model)
    assert type(model["b"]) is FusedRNN
    assert model["a"][0] is model["b"] is model["c"]
    assert model["other"].weight_hh_l0 is model["b"].weight_hh_l0


def test_forward_and_backward_hooks_are_kept_and_can_be_removed():
    rnn, calls = nn.RNN(3, 5), []
    handles = [
        rnn.register_forward_pre_hook(lambda module, args: calls.append(("pre", type(module)))),
        rnn.register_forward_hook(
            lambda module, args, kwargs, output: calls.append(("forward", type(module))),
            with_kwargs=True,
        ),
        rnn.register_full_backward_hook(
            lambda module, grad_in, grad_out: calls.append(("backward", type(module)))
        ),
    ]
    fused = replace_rnn(rnn)
    x = torch.zeros(4, 2, 3, requires_grad=True)
    fused(x)[0].sum().backward()
    assert calls == [("pre", FusedRNN), ("forward", FusedRNN), ("backward", FusedRNN)]

    for handle in handles:
        handle.remove()
    fused(x)[0].sum().backward()
    assert len(calls) == 3


def test_only_torchs_own_modules_are_replaced_and_a_subclass_gets_a_warning_at_the_caller():
    class Doubled(nn.RNN):
        pass

    others = [nn.Linear(3, 5), FusedRNN(3, 5)]
    model = nn.Sequential(Doubled(3, 5), *(kind(5, 5) for kind in KINDS), *others)
    with pytest.warns(UserWarning, match=r"model\.0 is left alone: Doubled") as record:
        replace_rnn(model)
    assert record[0].filename == __file__
    assert [type(module) for module in model][:4] == [Doubled, *KINDS.values()]
    assert list(model)[4:] == others


@pytest.mark.parametrize("model", [None, [nn.RNN(3, 5)]], ids=["None", "list"])
def test_replace_rnn_of_what_is_no_module_is_a_type_error(model):
    with pytest.raises(
        TypeError, match=f"model must be a torch.nn.Module, got {type(model).__name__}"
    ):
        replace_rnn(model)
