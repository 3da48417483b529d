"""FusedRNN.from_torch, to_torch and replace_rnn."""

import copy
import doctest

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import rnn_cuda.convert
from rnn_cuda import FusedRNN, replace_rnn

CONFIGURATIONS = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "nonlinearity": "relu", "bias": False, "dropout": 0.5},
]
SETTINGS = (
    "input_size",
    "hidden_size",
    "num_layers",
    "nonlinearity",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "training",
)


def _normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


class _Tagger(nn.Module):
    """An existing model: an RNN below a linear read-out, nested one level deep."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"rnn": nn.RNN(3, 5, 2, dropout=0.5, bidirectional=True)})
        self.readout = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.encoder["rnn"](x)[0])


def test_docstring_examples_run():
    result = doctest.testmod(rnn_cuda.convert)

    assert result.attempted > 0
    assert result.failed == 0


# ---- from_torch and to_torch ---------------------------------------------------------------------


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_from_torch_takes_over_configuration_and_results(options):
    rnn = nn.RNN(3, 5, **options, dtype=torch.float64).eval()
    rnn.weight_hh_l0.requires_grad_(False)

    fused = FusedRNN.from_torch(rnn)

    assert {n: getattr(fused, n) for n in SETTINGS} == {n: getattr(rnn, n) for n in SETTINGS}
    assert [p.requires_grad for p in fused.parameters()] == [
        p.requires_grad for p in rnn.parameters()
    ]
    torch.testing.assert_close(fused(_normal(4, 2, 3)), rnn(_normal(4, 2, 3)))


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_to_torch_takes_over_configuration_and_results(options):
    fused = FusedRNN(3, 5, **options, dtype=torch.float64).eval()
    fused.weight_hh_l0.requires_grad_(False)

    rnn = fused.to_torch()

    assert type(rnn) is nn.RNN
    assert {n: getattr(rnn, n) for n in SETTINGS} == {n: getattr(fused, n) for n in SETTINGS}
    assert [p.requires_grad for p in rnn.parameters()] == [
        p.requires_grad for p in fused.parameters()
    ]
    torch.testing.assert_close(rnn(_normal(4, 2, 3)), fused(_normal(4, 2, 3)))


def test_from_torch_copies():
    rnn = nn.RNN(3, 5)
    before = copy.deepcopy(rnn.state_dict())
    fused = FusedRNN.from_torch(rnn)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()

    assert all(torch.equal(rnn.state_dict()[name], value) for name, value in before.items())


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


@pytest.mark.parametrize("module", [nn.LSTM(3, 5), nn.GRU(3, 5), nn.Linear(3, 5), "rnn"], ids=str)
def test_from_torch_of_anything_else_is_a_type_error(module):
    with pytest.raises(TypeError, match=f"rnn must be a torch.nn.RNN, got {type(module).__name__}"):
        FusedRNN.from_torch(module)


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "identity"])
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


def test_replace_rnn_keeps_results_and_training_mode():
    model = _Tagger().double().eval()
    expected = model(_normal(4, 2, 3))

    assert replace_rnn(model) is model
    assert type(model.encoder["rnn"]) is FusedRNN
    assert not model.encoder["rnn"].training
    torch.testing.assert_close(model(_normal(4, 2, 3)), expected)


def test_replace_rnn_keeps_names_and_order_of_the_state_dict():
    model = _Tagger()
    names = list(model.state_dict())

    assert list(replace_rnn(model).state_dict()) == names


def test_replace_rnn_returns_the_replacement_of_a_bare_rnn():
    assert type(replace_rnn(nn.RNN(3, 5))) is FusedRNN


def test_an_optimizer_made_beforehand_goes_on_working():
    model, oracle = _Tagger().double().eval(), _Tagger().double().eval()
    oracle.load_state_dict(model.state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (model, oracle)]
    parameters = list(model.parameters())

    replace_rnn(model)
    for _ in range(3):
        for m, optimizer in zip((model, oracle), optimizers, strict=True):
            optimizer.zero_grad()
            m(_normal(4, 2, 3)).square().sum().backward()
            optimizer.step()

    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter)


def test_a_shared_module_stays_shared():
    rnn = nn.RNN(5, 5)
    model = nn.ModuleDict({"a": nn.Sequential(rnn), "b": rnn, "c": rnn})

    replace_rnn(model)

    assert type(model["b"]) is FusedRNN
    assert model["a"][0] is model["b"] is model["c"]


def test_weights_tied_between_modules_stay_tied():
    model = nn.Sequential(nn.RNN(5, 5), nn.RNN(5, 5))
    model[1].weight_hh_l0 = model[0].weight_hh_l0

    replace_rnn(model)

    assert model[1].weight_hh_l0 is model[0].weight_hh_l0


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


def test_a_subclass_of_rnn_is_left_alone_with_a_warning_at_the_caller():
    class Doubled(nn.RNN):
        def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
            output, h_n = super().forward(input, hx)
            return 2 * output, h_n

    model = nn.Sequential(Doubled(3, 5), nn.RNN(5, 5))
    with pytest.warns(UserWarning, match=r"model\.0 is left alone: Doubled") as record:
        replace_rnn(model)

    assert [type(module) for module in model] == [Doubled, FusedRNN]
    assert record[0].filename == __file__


def test_other_modules_are_left_alone():
    model = nn.Sequential(nn.LSTM(3, 5), nn.GRU(3, 5), nn.Linear(3, 5), FusedRNN(3, 5))
    before = list(model)

    assert list(replace_rnn(model)) == before


@pytest.mark.parametrize("model", [None, [nn.RNN(3, 5)]], ids=["None", "list"])
def test_replace_rnn_of_what_is_no_module_is_a_type_error(model):
    with pytest.raises(
        TypeError, match=f"model must be a torch.nn.Module, got {type(model).__name__}"
    ):
        replace_rnn(model)
