"""FusedRNN against torch.nn.RNN: values and every gradient, over a seeded grid."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from rnn_cuda import FusedRNN
from tests.parity import Case, Config, make_case, relative_errors, results, sample_configs

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def _modules(config: Config, dtype: torch.dtype) -> tuple[FusedRNN, nn.RNN]:
    """Return a FusedRNN in ``dtype`` and the nn.RNN in float64 with the very same weights."""
    torch.manual_seed(config.seed)
    fused = FusedRNN(**config.options, dtype=dtype)
    oracle = nn.RNN(**config.options, dtype=torch.float64)
    oracle.load_state_dict(fused.state_dict())
    return fused, oracle


def _widen(case: Case) -> Case:
    """Return the case in float64, with the values that it has in its own dtype."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    return dataclasses.replace(
        case,
        x=wide(case.x),
        hx=None if case.hx is None else wide(case.hx),
        output_cotangent=wide(case.output_cotangent),
        h_n_cotangent=wide(case.h_n_cotangent),
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("config", sample_configs(600, seed=0), ids=str)
def test_values_and_gradients_are_those_of_torch(config, dtype):
    fused, oracle = _modules(config, dtype)
    case = make_case(config, dtype)

    actual = results(fused, config, case)
    errors = relative_errors(actual, results(oracle, config, _widen(case)))

    assert {tensor.dtype for tensor in actual.values()} == {dtype}
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]} == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("config", sample_configs(80, seed=1), ids=str)
def test_half_precision_is_as_accurate_as_torch(config, dtype):
    fused, oracle = _modules(config, dtype)
    torch_half = nn.RNN(**config.options, dtype=dtype)
    torch_half.load_state_dict(fused.state_dict())
    case = make_case(config, dtype)

    exact = results(oracle, config, _widen(case))
    actual = results(fused, config, case)
    errors = relative_errors(actual, exact)
    torch_errors = relative_errors(results(torch_half, config, case), exact)

    assert {tensor.dtype for tensor in actual.values()} == {dtype}
    # Rounding decides on which side of relu's kink a state near zero falls, in torch as here, and
    # with it whether a whole term of the gradient is there: only the values can be compared then.
    names = ["output", "h_n"] if config.nonlinearity == "relu" else list(exact)
    # T * L states are rounded by up to eps / 2 each, independently: their errors add up as a random
    # walk does. A single state may be luckier in torch than here, or the reverse.
    rounding = math.sqrt(config.T * config.num_layers) * torch.finfo(dtype).eps / 2
    for name in names:
        assert errors[name] <= 2 * torch_errors[name] + rounding, name
