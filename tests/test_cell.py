"""Our cells against torch's; test_modules.py has what they share with the layers."""

import enum

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rnn_cuda import FusedGRUCell, FusedLSTMCell, FusedRNN, FusedRNNCell, backend
from rnn_cuda.cells.elman import NONLINEARITIES, activation
from rnn_cuda.instruments import GradientFlow
from tests.layers import LAYERS, flat_results, halves, normal, pair

CELL_OF = dict(zip(LAYERS, (FusedRNNCell, FusedGRUCell, FusedLSTMCell), strict=False))
every_cell = pytest.mark.parametrize("kind", CELL_OF.values(), ids=lambda kind: kind.__name__)
ours_and_torchs = pytest.mark.parametrize("kind", [FusedRNNCell, nn.RNNCell])


def states(kind, tensors):
    """Return hx of a cell, made of as many of these as it has states."""
    h, c = tensors
    return (h, c) if kind is FusedLSTMCell else h


@pytest.mark.parametrize("with_hx", [True, False], ids=["hx", "no hx"])
@pytest.mark.parametrize("batch", [(), (1,), (4,), (0,)], ids=["unbatched", "B1", "B4", "B0"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FusedRNNCell, {"nonlinearity": "relu"}),
        (FusedRNNCell, {"bias": False}),
        *((kind, {"bias": bias}) for kind in (FusedGRUCell, FusedLSTMCell) for bias in (0, 1)),
    ],
)
def test_values_and_gradients_are_those_of_torch(kind, options, batch, with_hx):
    gradients = []
    for cell in pair(3, 5, **options, kind=kind, dtype=torch.float64):
        x, h, c = (normal(*batch, 2 * n)[..., ::2].requires_grad_() for n in (3, 5, 5))
        for weight in (cell.weight_ih, cell.weight_hh):  # of other strides as well
            weight.data = weight.data.mT.contiguous().mT
        hx = states(kind, (h, c)) if with_hx else None
        new = flat_results(cell(x, hx))
        inputs = [x, *cell.parameters(), *([] if hx is None else flat_results(hx))]
        cotangents = [normal(*batch, 5) + i for i in range(len(new))]
        gradients.append((new, torch.autograd.grad(new, inputs, cotangents)))
    torch.testing.assert_close(*gradients)


def layer_and_cell(*args, kind=FusedRNN, **options):
    """Return a layer and a cell of the same weights."""
    rnn, cell = kind(*args, **options), CELL_OF[kind](*args, **options)
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in rnn.state_dict().items()})
    return rnn, cell


@halves
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_steps_are_those_of_the_layer(nonlinearity, dtype):
    rnn, cell = layer_and_cell(3, 5, nonlinearity=nonlinearity, bias=False, dtype=dtype)
    x, h = normal(4, 2, 3, dtype=dtype), None
    for x_t, expected in zip(x, rnn(x)[0], strict=True):
        h = cell(x_t, h)
        torch.testing.assert_close(h, expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", backend.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize(("I", "H", "B"), [(3, 5, 2), (40, 70, 1), (8, 130, 9)])
def test_native_steps_have_the_bits_of_the_layer(I, H, B, dtype, kind):
    if backend.requested() == "emulated" or not backend.use_native("cpu", dtype):
        pytest.skip("the CPU kernel's promise")
    rnn, cell = layer_and_cell(I, H, kind=kind, dtype=dtype)
    x, state = normal(4, B, I, dtype=dtype), None
    output, finals = rnn(x)
    # Half precisions round what a unit carries behind each step; a gated layer behind its last one.
    tolerance = 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 and kind is not FusedRNN else 0

    def assert_same(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

    for t in range(4):
        before, state = state, cell(x[t], state)
        assert_same(flat_results(state)[0], output[t])
        sample = [part[0] for part in flat_results(before)] if t else []
        one = cell(x[t, 0], states(type(cell), (*sample, None)[:2]) if sample else None)
        assert_same(flat_results(one)[0], output[t, 0])
    assert_same(flat_results(state), [final[0] for final in flat_results(finals)])
    with GradientFlow(nn.ModuleList([cell, rnn])):
        assert flat_results(cell(x[0]))[0].equal(output[0])


@ours_and_torchs
def test_a_loop_in_training_keeps_one_state_a_step(kind):
    cell, x, kept = kind(3, 7), normal(6, 2, 3, dtype=torch.float32), {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    h = torch.zeros(2, 7)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for t in range(6):
            h = cell(x[t], h)
    assert sum(storage.nbytes() == 2 * 7 * 4 for storage in kept.values()) == 7  # with the first


@ours_and_torchs
def test_a_state_can_be_detached_in_place(kind):
    cell, h = kind(3, 5), None
    for _ in range(3):  # truncated backpropagation by hand
        h = cell(torch.randn(2, 3), h)
        h.sum().backward()
        h.detach_()  # it is refused for views
        assert not h.requires_grad


class Kind(Tensor):
    """Some subclass."""


def test_subclasses_of_tensors_go_through_pytorchs_operators():
    x, h = torch.randn(2, 3), torch.randn(2, 5).as_subclass(Kind)
    ours, torchs = (cell(x, h) for cell in pair(3, 5, kind=FusedRNNCell))
    assert type(ours) is type(torchs) is Kind
    torch.testing.assert_close(ours, torchs)


@every_cell
def test_steps_under_transforms_and_compiled_are_those_of_eager_code(kind):
    cell = kind(3, 5, dtype=torch.float64)
    x, h, c, dx, dh = (normal(4, n) for n in (3, 5, 5, 3, 5))

    def step(x, h, c=c, cell=cell):
        return flat_results(cell(x, states(kind, (h, c))))[-1]

    expected, pull_back = torch.autograd.functional.vjp(step, (x, h), dh)

    compiled = torch.compile(cell, fullgraph=True, backend="eager")
    torch.testing.assert_close(step(x, h, cell=compiled), expected)
    torch.testing.assert_close(torch.func.vmap(step)(x, h, c), expected)
    torch.testing.assert_close(torch.func.vjp(step, x, h)[1](dh), pull_back)
    _, tangent = torch.func.jvp(step, (x, h), (dx, dh))
    in_x, in_h = pull_back
    torch.testing.assert_close((tangent * dh).sum(), (in_x * dx).sum() + (in_h * dh).sum())
    with torch.device("meta"):
        assert flat_results(kind(3, 5)(torch.empty(2, 3)))[0].shape == (2, 5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((FusedRNNCell, {"nonlinearity": f}) for f in ("tanh", "sigmoid", "identity", "softplus")),
        (FusedGRUCell, {}),
        (FusedLSTMCell, {}),
    ],
)
def test_gradients_of_gradients_are_right(kind, options):
    cell = kind(3, 4, **options, dtype=torch.float64)
    x, h, c = (normal(2, n).requires_grad_() for n in (3, 4, 4))

    def step(x, *hx):
        return tuple(flat_results(cell(x, states(kind, (*hx, None)[:2]))))

    inputs = (x, *flat_results(states(kind, (h, c))))
    assert torch.autograd.gradcheck(step, inputs)
    assert torch.autograd.gradgradcheck(step, inputs)


@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid", "identity"])
def test_complex_numbers_are_computed_in_plain_pytorch(nonlinearity):
    cell = FusedRNNCell(3, 5, nonlinearity=nonlinearity, dtype=torch.complex128)
    x, hx = normal(2, 3, dtype=torch.complex128), normal(2, 5, dtype=torch.complex128)
    z = x @ cell.weight_ih.T + cell.bias_ih + hx @ cell.weight_hh.T + cell.bias_hh
    torch.testing.assert_close(cell(x, hx), activation(z, nonlinearity))


@every_cell
def test_sizes_of_zero_work_as_in_torch(kind):
    x = normal(2, 0)
    torch.testing.assert_close(*(cell(x) for cell in pair(0, 4, kind=kind, dtype=torch.float64)))
    assert flat_results(kind(3, 0)(torch.zeros(2, 3)))[0].shape == (2, 0)


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


# ---- errors --------------------------------------------------------------------------------------


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


X, HX = torch.zeros(2, 3), torch.zeros(2, 5)
# (input, hx, exception, pattern of our message); torch raises the same type.
BAD_INPUT = [
    (X[0, 0], None, ValueError, "input to be 1D or 2D, got 0D"),
    (X[None], None, ValueError, "input to be 1D or 2D, got 3D"),
    (X[:, :2], None, RuntimeError, "input has inconsistent input_size: got 2 expected 3"),
    (X.double(), None, RuntimeError, r"input dtype \(torch.float64\) does not match weight dtype"),
    (X.to("meta"), None, RuntimeError, "expected input on cpu, got meta"),
    (X, HX[None], ValueError, "hx: .*1D or 2D, got 3D"),
    (X, HX[:1], RuntimeError, "Input batch size 2 doesn't match hidden0 batch size 1 of hx"),
    (X, HX[:, :4], RuntimeError, "hx: .*hidden_size: got 4, expected 5"),
    (X, HX[0], RuntimeError, "hx must have a batch dimension .*expected 2D, got 1D"),
    (X[0], HX[:1], RuntimeError, "hx must have a batch dimension .*expected 1D, got 2D"),
    (X, HX.double(), RuntimeError, "expected hx of torch.float32, got torch.float64"),
    ([0.0], None, TypeError, "input should be a Tensor, got: list"),
    (X, [0.0], TypeError, "hx should be a Tensor"),
]


@pytest.mark.parametrize(("input", "hx", "error", "message"), BAD_INPUT)
def test_bad_input_raises_torchs_type_and_says_what_was_expected(input, hx, error, message):
    if error is not TypeError:  # torch happens to raise AttributeError
        with pytest.raises(error):
            nn.RNNCell(3, 5)(input, hx)
    with pytest.raises(error, match=message):
        FusedRNNCell(3, 5)(input, hx)


BAD_PAIR = [
    (HX, TypeError, r"hx should be a tuple \(h_0, c_0\) of Tensors, got: Tensor"),
    ((HX,), TypeError, r"hx should be a tuple \(h_0, c_0\) of Tensors, got 1 items"),
    ((HX, None), TypeError, r"hx\[1\] should be a Tensor, got: NoneType"),
    ((HX, HX[None]), ValueError, r"Expected hx\[1\] to be 1D or 2D, got 3D"),
    ((HX, HX[:, :4]), RuntimeError, r"hx\[1\]: .*hidden_size: got 4, expected 5"),
    ((HX[:1], HX), RuntimeError, r"doesn't match hidden0 batch size 1 of hx\[0\]"),
    ((HX, HX.double()), RuntimeError, r"expected hx\[1\] of torch.float32, got torch.float64"),
]


@pytest.mark.parametrize(("hx", "error", "message"), BAD_PAIR)
def test_a_bad_pair_of_states_is_named(hx, error, message):
    with pytest.raises(error, match=message):
        FusedLSTMCell(3, 5)(X, hx)


@pytest.mark.parametrize("asked", ["auto", "reference"])
def test_errors_name_a_later_weight(asked):
    cell = FusedRNNCell(3, 5)
    cell.weight_hh = nn.Parameter(torch.zeros(5, 5).to_sparse())
    with backend.use(asked), pytest.raises(TypeError, match=r"weight_hh: expected a dense .*coo"):
        cell(X)
