"""Every layer against torch's: values and every gradient, over a seeded grid."""

import dataclasses
import math
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from rnn_cuda import FusedLSTM, FusedRNN
from tests.layers import LAYERS, flat_results, torch_kind

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
LAYOUTS = ("dense", "unbatched", "packed_sorted", "packed_unsorted")
MEMORY = ("contiguous", "strided", "expanded")


@dataclasses.dataclass(frozen=True)
class Config:
    """One module and one input: T time steps, B batch, I input size, H hidden size."""

    seed: int
    kind: type[nn.Module]
    layout: str
    memory: str
    used: str  # what the loss is made of
    with_hx: bool
    T: int
    B: int
    options: dict[str, object]  # of the constructor, common to ours and torch's

    def __str__(self) -> str:
        seed, kind, *values, options = dataclasses.astuple(self)
        return "-".join(map(str, [seed, kind.__name__, *values, *options.values()]))


def sample_configs(count: int, seed: int) -> list[Config]:
    """Draw ``count`` configurations; kinds and layouts take turns, everything else is random."""
    rng = random.Random(seed)

    def flip() -> bool:
        return rng.random() < 0.5

    configs = []
    for index in range(count):
        kind, layout = LAYERS[index % len(LAYERS)], LAYOUTS[index % len(LAYOUTS)]
        batch = 1 if layout == "unbatched" else rng.choice([1, 2, 3, 4, 5, 6])
        # nn.RNN, the oracle, takes an empty dense batch; there is no empty PackedSequence.
        if layout == "dense" and rng.random() < 0.1:
            batch = 0
        options = {
            "input_size": rng.choice([1, 2, 3, 5, 7, 8, 13, 16, 17, 20]),
            "hidden_size": rng.choice([1, 2, 3, 5, 7, 8, 15, 16, 17, 20, 32, 33]),
            "num_layers": rng.choice([1, 2, 3]),
            "bias": flip(),
            "batch_first": flip(),
            "bidirectional": flip(),
        }
        if kind is FusedRNN:
            options["nonlinearity"] = rng.choice(["tanh", "relu"])
        memory = "contiguous" if layout.startswith("packed") else rng.choice(MEMORY)
        used = rng.choice(["output and h_n", "output and h_n", "output", "h_n"])
        configs.append(
            Config(index, kind, layout, memory, used, flip(), rng.randint(1, 9), batch, options)
        )
    return configs


@dataclasses.dataclass
class Case:
    """The tensors of one configuration, in one dtype."""

    x: Tensor  # what is differentiated; the module's input is a view of it, or packed from it
    states: list[Tensor]  # the initial ones; none for zeros
    cotangents: list[Tensor]  # of output and final states
    lengths: Tensor | None

    def to(self, dtype: torch.dtype) -> "Case":
        """Return the same values in another dtype."""

        def converted(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_()

        states, cotangents = map(converted, self.states), [c.to(dtype) for c in self.cotangents]
        return Case(converted(self.x), list(states), cotangents, self.lengths)


def make_case(config: Config, dtype: torch.dtype) -> Case:
    """Make reproducible tensors for ``config``, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(config.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    I, H, layers = (config.options[name] for name in ("input_size", "hidden_size", "num_layers"))
    directions = 2 if config.options["bidirectional"] else 1
    states, rows = (layers * directions, config.B, H), (config.T, config.B)
    lengths = None
    if config.layout == "unbatched":
        rows, states = (config.T,), (states[0], H)
    elif config.layout.startswith("packed"):
        lengths = torch.randint(1, config.T + 1, (config.B,), generator=generator)
        if config.layout == "packed_sorted":
            lengths = lengths.sort(descending=True).values
        rows = (int(lengths.sum()),)
    elif config.options["batch_first"]:
        rows = (config.B, config.T)
    x_rows = (config.B, int(lengths.max())) if lengths is not None else rows
    x_features = {"contiguous": I, "strided": 2 * I, "expanded": 1}[config.memory]
    x, count = normal(*x_rows, x_features), 2 if config.kind is FusedLSTM else 1
    starts = [normal(*states) for _ in range(count if config.with_hx else 0)]
    cotangents = [normal(*rows, directions * H), *(normal(*states) for _ in range(count))]
    return Case(x, starts, cotangents, lengths).to(dtype)


def module_input(config: Config, case: Case) -> Tensor | PackedSequence:
    """Return what the module is called with: a view of ``case.x``, or a packed sequence."""
    if case.lengths is not None:
        is_sorted = config.layout == "packed_sorted"
        return pack_padded_sequence(
            case.x, case.lengths, batch_first=True, enforce_sorted=is_sorted
        )
    if config.memory == "strided":
        return case.x[..., ::2]
    if config.memory == "expanded":
        return case.x.expand(*case.x.shape[:-1], config.options["input_size"])
    return case.x


def results(module: nn.Module, config: Config, case: Case) -> dict[str, Tensor]:
    """Run ``module`` forward and backward; return every output and every gradient by name."""
    hx = tuple(case.states) if len(case.states) == 2 else next(iter(case.states), None)
    output, *finals = flat_results(module(module_input(config, case), hx))
    inputs = {"input": case.x, **dict(module.named_parameters())}
    inputs |= dict(zip(("h0", "c0"), case.states, strict=False))
    used = {"output": [output], "h_n": finals, "output and h_n": [output, *finals]}[config.used]
    cotangents = case.cotangents[-len(used) :] if config.used != "output" else case.cotangents[:1]
    gradients = torch.autograd.grad(used, list(inputs.values()), cotangents)
    named = {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}
    finals = dict(zip(("h_n", "c_n"), (final.detach() for final in finals), strict=False))
    return {"output": output.detach(), **finals, **named}


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return ``|actual - expected| / scale`` in the 2-norm, for every tensor by name.

    The scale of an output is its own norm. That of a gradient is the largest norm among all of
    them: a gradient that is a sum of large terms that cancel has no accuracy relative to itself.
    """
    assert actual.keys() == expected.keys()
    norms = {name: tensor.double().norm().item() for name, tensor in expected.items()}
    largest = max(norm for name, norm in norms.items() if name.startswith("gradient"))
    errors = {}
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, f"{name}: {tuple(actual[name].shape)}"
        difference = (actual[name].double() - tensor.double()).norm().item()
        scale = largest if name.startswith("gradient") else norms[name]
        errors[name] = difference / scale if difference else 0.0
    return errors


def make_modules(config: Config, *dtypes: torch.dtype) -> tuple[list[nn.Module], nn.Module]:
    """Return our layer in each dtype, and torch's in float64, with the weights of the last one."""
    torch.manual_seed(config.seed)
    fused = [config.kind(**config.options, dtype=dtype) for dtype in dtypes]
    oracle = torch_kind(config.kind)(**config.options, dtype=torch.float64)
    for module in (*fused, oracle):
        module.load_state_dict(fused[-1].state_dict())
    return fused, oracle


@pytest.mark.parametrize("config", sample_configs(450, seed=0), ids=str)
def test_values_and_gradients_are_those_of_torch(config):
    modules, oracle = make_modules(config, *TOLERANCE)
    case = make_case(config, torch.float32)
    expected = results(oracle, config, case.to(torch.float64))
    for fused, (dtype, tolerance) in zip(modules, TOLERANCE.items(), strict=True):
        actual = results(fused, config, case.to(dtype))
        errors = relative_errors(actual, expected)

        assert {tensor.dtype for tensor in actual.values()} == {dtype}
        assert {name: error for name, error in errors.items() if not error <= tolerance} == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("config", sample_configs(80, seed=1), ids=str)
def test_half_precision_is_as_accurate_as_torch(config, dtype):
    (fused,), oracle = make_modules(config, dtype)
    torch_half = torch_kind(config.kind)(**config.options, dtype=dtype)
    torch_half.load_state_dict(fused.state_dict())
    case = make_case(config, dtype)

    exact = results(oracle, config, case.to(torch.float64))
    actual = results(fused, config, case)
    errors = relative_errors(actual, exact)
    torch_errors = relative_errors(results(torch_half, config, case), exact)

    assert {tensor.dtype for tensor in actual.values()} == {dtype}
    # Rounding decides on which side of relu's kink a state near zero falls, in torch as here, and
    # with it whether a whole term of the gradient is there: only the values can be compared then.
    is_relu = config.options.get("nonlinearity") == "relu"
    names = ["output", "h_n"] if is_relu else list(exact)
    # T * L states are rounded by up to eps / 2 each, independently: their errors add up as a random
    # walk does. A single state may be luckier in torch than here, or the reverse.
    steps = config.T * config.options["num_layers"]
    rounding = math.sqrt(steps) * torch.finfo(dtype).eps / 2
    for name in names:
        assert errors[name] <= 2 * torch_errors[name] + rounding, name
