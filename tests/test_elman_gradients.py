"""The operator of a training step's backward pass against the same by parts, and the reference.

"By parts" is what stands in where derivatives of the gradients are asked for: the adjoint by
elman_backward, then one matrix product for each gradient.
"""

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from rnn_cuda import backend, reference
from rnn_cuda._autograd import elman_gradients_by_parts
from rnn_cuda.functional import NONLINEARITIES, elman_rnn

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not backend.use_native("cpu", torch.float64),
        reason="tests a native operator, and the reference is the active backend",
    ),
]

T, B, I, H = 6, 3, 4, 17
SIZES = torch.tensor([3, 3, 2, 1])
LAYOUTS = {"dense": None, "packed": SIZES}
EVERYTHING = (True,) * 5
NAMES = ("grad_input", "grad_h0", "grad_weight_ih", "grad_weight_hh", "grad_bias")


def arguments(
    dtype=torch.float64,
    *,
    sizes=None,
    nonlinearity="tanh",
    reverse=False,
    h0=True,
    grad_output=True,
    grad_h_n=True,
    wanted=EVERYTHING,
    batch=B,
):
    """Arguments of elman_gradients; the states are those of a forward pass."""
    torch.manual_seed(0)
    rows = (T, batch) if sizes is None else (int(sizes.sum()),)
    x = torch.randn(*rows, I).to(dtype)
    start = torch.randn(batch, H).to(dtype) if h0 else None
    W, U = torch.randn(H, I).to(dtype), (torch.randn(H, H) / H**0.5).to(dtype)
    options = {"nonlinearity": nonlinearity, "reverse": reverse, "batch_sizes": sizes}
    output, _ = reference.elman_rnn(x, start, W, U, **options)
    return [
        torch.randn_like(output) if grad_output else None,
        torch.randn(batch, H).to(dtype) if grad_h_n else None,
        x,
        start,
        W,
        U,
        output,
        *options.values(),
        list(wanted),
    ]


def native(*args):
    return torch.ops.rnn_cuda.elman_gradients(*args)


def assert_equal(actual, expected, tolerance=1e-12):
    """Compare gradients, each on the scale of its own norm."""
    for name, got, want in zip(NAMES, actual, expected, strict=True):
        assert got.shape == want.shape, name
        assert got.dtype == want.dtype, name
        assert (got.double() - want.double()).norm() <= tolerance * want.double().norm(), name


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=5)), ids=str)
@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_choice_of_gradients_equals_the_parts_and_the_rest_is_empty(sizes, wanted):
    for h0, reverse in itertools.product([False, True], repeat=2):
        args = arguments(sizes=sizes, h0=h0, reverse=reverse, wanted=wanted)
        actual = native(*args)
        assert_equal(actual, elman_gradients_by_parts(*args))
        assert [g.shape != (0,) for g in actual] == list(wanted)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_choice_of_arguments_equals_the_parts(sizes, nonlinearity):
    options = ("reverse", "h0", "grad_output", "grad_h_n")
    for values in itertools.product([False, True], repeat=len(options)):
        chosen = dict(zip(options, values, strict=True))
        if chosen["grad_output"] or chosen["grad_h_n"]:
            args = arguments(sizes=sizes, nonlinearity=nonlinearity, **chosen)
            assert_equal(native(*args), elman_gradients_by_parts(*args))


def test_gradients_equal_the_references():
    for sizes, reverse in itertools.product(LAYOUTS.values(), [False, True]):
        args = arguments(sizes=sizes, reverse=reverse)
        grads, (x, h0, W, U) = args[:2], [t.requires_grad_() for t in args[2:6]]
        b = torch.zeros(H, dtype=torch.float64, requires_grad=True)
        outputs = reference.elman_rnn(x, h0, W, U, b, reverse=reverse, batch_sizes=sizes)
        expected = torch.autograd.grad(outputs, (x, h0, W, U, b), grads)
        with torch.no_grad():
            assert_equal(native(*args), expected)


@pytest.mark.parametrize("wanted", [EVERYTHING, (True, False, True, True, False)])
def test_memory_layout_does_not_matter(wanted):
    args = arguments(wanted=wanted)
    expected = native(*args)
    for i in (0, 2):  # grad_output and input: batch first, and every second feature
        batch_first = list(args)
        batch_first[i] = args[i].transpose(0, 1).contiguous().transpose(0, 1)
        assert_equal(native(*batch_first), expected)
        strided = list(args)
        strided[i] = torch.stack([args[i], args[i]], dim=-1)[..., 0]
        assert_equal(native(*strided), expected)
    for i in (1, 3, 4, 5):  # states and weights
        transposed = list(args)
        transposed[i] = args[i].mT.contiguous().mT
        assert_equal(native(*transposed), expected)


@pytest.mark.parametrize("shape", [(), (H,), (B, 1), (T, 1, 1)], ids=str)
def test_an_expanded_gradient_equals_its_copy(shape):
    args = arguments()
    args[0] = torch.randn(shape, dtype=torch.float64).expand(T, B, H)
    actual = native(*args)
    args[0] = args[0].contiguous()
    assert_equal(actual, native(*args))


def test_an_empty_batch_has_zero_weight_gradients():
    actual = native(*arguments(batch=0))
    assert_equal(actual, elman_gradients_by_parts(*arguments(batch=0)))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in actual[2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_half_precisions_are_as_accurate_as_the_parts(sizes, dtype):
    args = arguments(dtype, sizes=sizes)
    wide = [a.double() if isinstance(a, torch.Tensor) and a is not sizes else a for a in args]
    exact = elman_gradients_by_parts(*wide)
    actual, parts = native(*args), elman_gradients_by_parts(*args)
    assert [g.dtype for g in actual] == [dtype] * 4 + [torch.float32]
    for name, got, part, want in zip(NAMES, actual, parts, exact, strict=True):
        error, error_of_parts = ((g.double() - want).norm() / want.norm() for g in (got, part))
        assert error <= 1.5 * error_of_parts + torch.finfo(dtype).eps, name


def test_gradients_of_one_sequence_without_a_batch_equal_the_references():
    x, h0, W, U = (t.requires_grad_() for t in arguments(batch=1)[2:6])
    results = []
    for run, leaf in ((elman_rnn, lambda t: t.squeeze(-2)), (reference.elman_rnn, lambda t: t)):
        output, h_n = run(leaf(x), leaf(h0), W, U)
        results.append(torch.autograd.grad(output.square().sum() + h_n.sum(), (x, h0, W, U)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


# ---- transforms ----------------------------------------------------------------------------------

DIFFERENTIABLE = range(7)  # the tensors among the arguments


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("mapped", [(0,), (1, 3), (2, 6), (5,), tuple(DIFFERENTIABLE)], ids=str)
def test_vmap_equals_a_loop(mapped, sizes):
    args = arguments(sizes=sizes)
    in_dims, stacked = [None] * len(args), list(args)
    for i in mapped:
        in_dims[i] = 1
        stacked[i] = torch.stack([args[i], 2 * args[i], -args[i]], dim=1)
    actual = vmap(native, tuple(in_dims))(*stacked)
    for k in range(3):
        one = [
            a if dim is None else a.select(dim, k) for a, dim in zip(stacked, in_dims, strict=True)
        ]
        assert_equal([g[k] for g in actual], native(*one))


def test_nested_vmaps_equal_nested_loops():
    args = arguments(wanted=(True, False, False, True, False))
    cotangents, Us = torch.randn(2, T, B, H).double(), torch.randn(3, H, H).double() / 4

    def f(cotangent, U):
        return native(cotangent, *args[1:5], U, *args[6:])

    actual = vmap(vmap(f, (0, None)), (None, 0))(cotangents, Us)
    for i, j in itertools.product(range(3), range(2)):
        assert_equal([g[i, j] for g in actual], f(cotangents[j], Us[i]))


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_tangents_equal_those_of_the_parts_in_every_argument(sizes):
    args = arguments(sizes=sizes)
    primals = tuple(args[i] for i in DIFFERENTIABLE)
    tangents = tuple(torch.randn_like(p) for p in primals)

    def with_options(f):
        return lambda *tensors: f(*tensors, *args[7:])

    actual = jvp(with_options(native), primals, tangents)
    expected = jvp(with_options(elman_gradients_by_parts), primals, tangents)
    assert_equal(actual[0], expected[0])
    assert_equal(actual[1], expected[1])
    step = 1e-6
    above, below = (
        native(*(p + s * step * t for p, t in zip(primals, tangents, strict=True)), *args[7:])
        for s in (1, -1)
    )
    difference = [(a - b) / (2 * step) for a, b in zip(above, below, strict=True)]
    assert_equal(difference, actual[1], tolerance=1e-7)


def test_tangents_pass_without_a_graph():
    args = arguments()
    tangent = torch.randn_like(args[0])
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(args[0], tangent)
        results = native(dual, *args[1:])
        actual = [forward_ad.unpack_dual(g).tangent for g in results]
    assert_equal(actual, native(tangent, None, *args[2:]))  # the gradients are linear in it


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_gradients_of_the_gradients_are_those_of_the_parts(sizes):
    args = arguments(sizes=sizes, nonlinearity="sigmoid")
    leaves = [args[i].requires_grad_() for i in DIFFERENTIABLE]
    results = []
    for f in (native, elman_gradients_by_parts):
        value = sum(g.pow(2).sum() for g in f(*args))
        results.append(torch.autograd.grad(value, leaves))
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-12 * want.norm()


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_compiled_call_equals_an_eager_one(sizes):
    args = arguments(sizes=sizes, wanted=(True, True, False, True, True))
    compiled = torch.compile(lambda *a: native(*a), fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*args), native(*args))


# ---- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_flops_are_those_of_the_parts(sizes):
    for *wanted, h0, grad_h_n in itertools.product([False, True], repeat=7):
        args = arguments(sizes=sizes, h0=h0, grad_h_n=grad_h_n, wanted=wanted)
        counts = []
        for f in (native, elman_gradients_by_parts):
            with FlopCounterMode(display=False) as counter:
                f(*args)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1], (wanted, h0, grad_h_n)
