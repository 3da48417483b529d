"""FusedRNNCell against torch.nn.RNNCell."""

import copy
import doctest
import enum
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rnn_cuda.cell
from rnn_cuda import FusedRNN, FusedRNNCell, backend
from rnn_cuda.cells.elman import NONLINEARITIES
from rnn_cuda.instruments import GradientFlow


def _pair(*args, **kwargs) -> tuple[FusedRNNCell, nn.RNNCell]:
    """Return both cells, constructed alike after the same seed."""
    torch.manual_seed(0)
    fused = FusedRNNCell(*args, **kwargs)
    torch.manual_seed(0)
    return fused, nn.RNNCell(*args, **kwargs)


def _normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_docstring_examples_run():
    result = doctest.testmod(rnn_cuda.cell)

    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_have_torchs_names_shapes_and_initial_values(bias):
    fused, oracle = _pair(3, 5, bias)

    assert list(fused.state_dict()) == list(oracle.state_dict())
    for name, wanted in oracle.named_parameters():
        assert torch.equal(fused.get_parameter(name), wanted), name
    assert (fused.bias_ih is None) == (not bias)


def test_state_dict_loads_into_torch():
    fused, oracle = FusedRNNCell(3, 5), nn.RNNCell(3, 5)

    oracle.load_state_dict(fused.state_dict())

    assert all(torch.equal(oracle.get_parameter(n), p) for n, p in fused.named_parameters())


@pytest.mark.parametrize("options", [{}, {"bias": False, "nonlinearity": "relu"}], ids=str)
def test_repr_is_torchs(options):
    fused, oracle = _pair(3, 5, **options)

    assert repr(fused) == repr(oracle).replace("RNNCell(", "FusedRNNCell(")


@pytest.mark.parametrize("with_hx", [True, False], ids=["hx", "no hx"])
@pytest.mark.parametrize("batch", [(), (1,), (4,), (0,)], ids=["unbatched", "B1", "B4", "B0"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_values_and_gradients_are_those_of_torch(nonlinearity, bias, batch, with_hx):
    fused, oracle = _pair(3, 5, bias, nonlinearity, dtype=torch.float64)
    gradients = []
    for cell in (fused, oracle):
        x, hx = _normal(*batch, 3).requires_grad_(), _normal(*batch, 5).requires_grad_()
        h = cell(x, hx) if with_hx else cell(x)
        inputs = [x, *cell.parameters(), *([hx] if with_hx else [])]
        gradients.append((h, torch.autograd.grad(h, inputs, _normal(*batch, 5))))

    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_steps_are_those_of_the_layer(nonlinearity, dtype):
    rnn = FusedRNN(3, 5, nonlinearity=nonlinearity, bias=False, dtype=dtype)
    cell = FusedRNNCell(3, 5, False, nonlinearity, dtype=dtype)
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in rnn.state_dict().items()})
    x = _normal(4, 2, 3, dtype=dtype)

    output, _ = rnn(x)

    h = None
    for t in range(4):
        h = cell(x[t], h)
        torch.testing.assert_close(h, output[t], rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", backend.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize(("I", "H", "B"), [(3, 5, 2), (40, 70, 1), (8, 130, 9)])
def test_native_steps_have_the_bits_of_the_layer(I, H, B, dtype):
    if backend.requested() == "emulated" or not backend.use_native("cpu", dtype):
        pytest.skip("the CPU kernel's promise")
    rnn, cell = FusedRNN(I, H, dtype=dtype), FusedRNNCell(I, H, dtype=dtype)
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in rnn.state_dict().items()})
    x = _normal(4, B, I, dtype=dtype)
    output, _ = rnn(x)

    h = None
    for t in range(4):
        h = cell(x[t], h)
        assert torch.equal(h, output[t])
        assert torch.equal(cell(x[t, 0], None if t == 0 else output[t - 1, 0]), output[t, 0])


@pytest.mark.parametrize("kind", [FusedRNNCell, nn.RNNCell], ids=lambda kind: kind.__name__)
def test_a_loop_in_training_keeps_one_state_a_step(kind):
    cell, x, kept = kind(3, 7), _normal(6, 2, 3, dtype=torch.float32), {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    h = torch.zeros(2, 7)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for t in range(6):
            h = cell(x[t], h)
    assert sum(storage.nbytes() == 2 * 7 * 4 for storage in kept.values()) == 7  # with the first


@pytest.mark.parametrize("kind", [FusedRNNCell, nn.RNNCell], ids=lambda kind: kind.__name__)
def test_a_state_can_be_detached_in_place(kind):
    cell, h = kind(3, 5), None
    for _ in range(3):  # truncated backpropagation by hand
        h = cell(torch.randn(2, 3), h)
        h.sum().backward()
        h.detach_()  # it is refused for views
        assert not h.requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_step_needs_no_operators_but_pytorchs():
    cell, x, h = FusedRNNCell(3, 5), torch.randn(2, 3), torch.randn(2, 5)
    traced = torch.jit.trace(cell, (x, h))
    assert "rnn_cuda::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x, h), cell(x, h))


class Kind(Tensor):
    """Some subclass."""


def test_subclasses_of_tensors_go_through_pytorchs_operators():
    fused, oracle = _pair(3, 5)
    x, h = torch.randn(2, 3), torch.randn(2, 5).as_subclass(Kind)
    assert type(fused(x, h)) is type(oracle(x, h)) is Kind
    torch.testing.assert_close(fused(x, h), oracle(x, h))


def test_steps_under_transforms_and_compiled_are_those_of_eager_code():
    cell = FusedRNNCell(3, 5, dtype=torch.float64)
    x, h, dx, dh = (_normal(4, n) for n in (3, 5, 3, 5))
    expected, pull_back = torch.autograd.functional.vjp(cell, (x, h), dh)

    compiled = torch.compile(cell, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, h), expected)
    torch.testing.assert_close(torch.func.vmap(cell)(x, h), expected)
    torch.testing.assert_close(torch.func.vjp(cell, x, h)[1](dh), pull_back)
    _, tangent = torch.func.jvp(cell, (x, h), (dx, dh))
    in_x, in_h = pull_back
    torch.testing.assert_close((tangent * dh).sum(), (in_x * dx).sum() + (in_h * dh).sum())
    with torch.device("meta"):
        assert FusedRNNCell(3, 5)(torch.empty(2, 3)).shape == (2, 5)


@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid", "identity"])
def test_gradients_of_gradients_are_right(nonlinearity):
    cell = FusedRNNCell(3, 4, nonlinearity=nonlinearity, dtype=torch.float64)
    inputs = (_normal(2, 3).requires_grad_(), _normal(2, 4).requires_grad_())

    assert torch.autograd.gradcheck(cell, inputs)
    assert torch.autograd.gradgradcheck(cell, inputs)


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_torchs_dtype(dtype, lower):
    fused, oracle = _pair(3, 5)
    with torch.autocast("cpu", dtype=lower):
        actual, expected = (cell(_normal(2, 3, dtype=dtype)) for cell in (fused, oracle))

    assert actual.dtype == expected.dtype == lower
    torch.testing.assert_close(actual, expected, rtol=0, atol=4 * torch.finfo(lower).eps)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_a_duplicate_computes_the_same(duplicate):
    cell = FusedRNNCell(3, 5, nonlinearity="relu", dtype=torch.float64)

    assert torch.equal(duplicate(cell)(_normal(2, 3)), cell(_normal(2, 3)))


def test_sizes_of_zero_work_as_in_torch():
    fused, oracle = _pair(0, 4, dtype=torch.float64)

    torch.testing.assert_close(fused(_normal(2, 0)), oracle(_normal(2, 0)))
    assert FusedRNNCell(3, 0)(torch.zeros(2, 3)).shape == (2, 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_size": -1}, ValueError, "input_size must not be negative, got -1"),
        ({"hidden_size": 5.0}, TypeError, "hidden_size should be of type int, got: float"),
        ({"nonlinearity": "gelu"}, ValueError, "Unknown nonlinearity 'gelu': .*'identity'"),
    ],
    ids=str,
)
def test_bad_argument_is_named(options, error, message):
    with pytest.raises(error, match=message):
        FusedRNNCell(**{"input_size": 3, "hidden_size": 5, **options})


# (input, hx, exception, pattern of our message); torch raises the same type.
BAD_INPUT = {
    "0-D": (torch.tensor(0.0), None, ValueError, "input to be 1D or 2D, got 0D"),
    "3-D": (torch.zeros(1, 2, 3), None, ValueError, "input to be 1D or 2D, got 3D"),
    "features": (
        torch.zeros(2, 7),
        None,
        RuntimeError,
        "input has inconsistent input_size: got 7 expected 3",
    ),
    "dtype": (
        torch.zeros(2, 3, dtype=torch.float64),
        None,
        RuntimeError,
        r"input dtype \(torch.float64\) does not match weight dtype",
    ),
    "device": (
        torch.zeros(2, 3, device="meta"),
        None,
        RuntimeError,
        "expected input on cpu, got meta",
    ),
    "hx 3-D": (
        torch.zeros(2, 3),
        torch.zeros(1, 2, 5),
        ValueError,
        "hx: .*1D or 2D, got 3D",
    ),
    "hx batch": (
        torch.zeros(2, 3),
        torch.zeros(4, 5),
        RuntimeError,
        "Input batch size 2 doesn't match hidden0 batch size 4 of hx",
    ),
    "hx hidden size": (
        torch.zeros(2, 3),
        torch.zeros(2, 6),
        RuntimeError,
        "hx: .*hidden_size: got 6, expected 5",
    ),
    "hx unbatched": (
        torch.zeros(2, 3),
        torch.zeros(5),
        RuntimeError,
        "hx must have a batch dimension .*expected 2D, got 1D",
    ),
    "input unbatched": (
        torch.zeros(3),
        torch.zeros(1, 5),
        RuntimeError,
        "hx must have a batch dimension .*expected 1D, got 2D",
    ),
    "hx dtype": (
        torch.zeros(2, 3),
        torch.zeros(2, 5, dtype=torch.float64),
        RuntimeError,
        "expected hx of torch.float32, got torch.float64",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_raises_torchs_type_and_says_what_was_expected(case):
    input, hx, error, message = case

    with pytest.raises(error):
        nn.RNNCell(3, 5)(input, hx)
    with pytest.raises(error, match=message):
        FusedRNNCell(3, 5)(input, hx)


@pytest.mark.parametrize(
    ("input", "hx", "message"),
    [
        ([0.0], None, "input should be a Tensor, got: list"),
        (torch.zeros(2, 3), [0.0], "hx should be a Tensor"),
    ],
    ids=["input", "hx"],
)
def test_what_is_no_tensor_is_a_type_error(input, hx, message):
    with pytest.raises(TypeError, match=message):
        FusedRNNCell(3, 5)(input, hx)


@pytest.mark.parametrize(
    "size",
    [np.int64(2), np.array(2), torch.tensor(2), enum.IntEnum("Size", {"TWO": 2}).TWO],
    ids=repr,
)
def test_integers_of_every_kind_are_sizes_as_in_torchs_cell(size):
    cell = FusedRNNCell(size, size, bias=np.bool_(True))

    assert (type(cell.input_size), type(cell.hidden_size)) == (int, int)
    assert cell.bias is True
    assert cell(torch.zeros(3, 2)).shape == nn.RNNCell(size, size)(torch.zeros(3, 2)).shape


@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid", "identity"])
def test_complex_numbers_are_computed_in_plain_pytorch(nonlinearity):
    fused = FusedRNNCell(3, 5, nonlinearity=nonlinearity, dtype=torch.complex128)
    x, hx = _normal(2, 3, dtype=torch.complex128), _normal(2, 5, dtype=torch.complex128)

    output = fused(x, hx)

    z = x @ fused.weight_ih.T + fused.bias_ih + hx @ fused.weight_hh.T + fused.bias_hh
    functions = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "identity": torch.clone}
    torch.testing.assert_close(output, functions[nonlinearity](z))


def test_constants_are_torchs():
    assert FusedRNNCell.__constants__ == nn.RNNCell.__constants__


def test_errors_name_a_later_weight():
    cell = FusedRNNCell(3, 5)
    cell.weight_hh = nn.Parameter(torch.zeros(5, 5).to_sparse())

    with pytest.raises(TypeError, match=r"weight_hh: expected a dense .*sparse_coo"):
        cell(torch.zeros(2, 3))
    with backend.use("reference"), pytest.raises(TypeError, match="weight_hh: expected a dense"):
        cell(torch.zeros(2, 3))


def test_a_step_has_the_same_bits_while_a_gradient_flow_records():
    torch.manual_seed(0)
    cell, layer = FusedRNNCell(5, 33), FusedRNN(5, 33)
    x, h = torch.randn(8, 5), torch.randn(8, 33)
    expected = cell(x, h)
    with GradientFlow(nn.ModuleList([cell, layer])):
        assert cell(x, h).equal(expected)
