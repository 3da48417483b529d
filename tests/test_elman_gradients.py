"""The operator of a training step's backward pass against the same by parts, and the reference.

"By parts" is what stands in where derivatives of the gradients are asked for: the adjoint by
elman_backward, then one matrix product for each gradient.
"""

import itertools
import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from rnn_cuda import backend, reference
from rnn_cuda._autograd import elman_gradients_by_parts
from rnn_cuda._autograd_pair import arguments_of_each, elman_gradients_in_turn
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
EVERYTHING = (True,) * 6
NAMES = (
    "grad_input",
    "grad_h0",
    "grad_weight_ih",
    "grad_weight_hh",
    "grad_bias",
    "adjoint_norm",
)


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


def assert_equal(actual, expected, tolerance=1e-12, names=NAMES):
    """Compare gradients, each on the scale of its own norm."""
    for name, (got, want) in zip(names, zip(actual, expected, strict=True), strict=False):
        assert got.shape == want.shape, name
        assert got.dtype == want.dtype, name
        assert (got.double() - want.double()).norm() <= tolerance * want.double().norm(), name


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=6)), ids=str)
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
            assert_equal(native(*args)[:5], expected)


@pytest.mark.parametrize("wanted", [EVERYTHING, (True, False, True, True, False, False)])
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
    assert [g.dtype for g in actual] == [dtype] * 4 + [torch.float32, torch.float64]
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


# ---- both directions at once ---------------------------------------------------------------------

BOTH_NAMES = (*NAMES, *(f"{name}_reverse" for name in NAMES[1:]))
# Each result alone, all but each, all.
CHOICES = [tuple((i == k) != others for i in range(11)) for k in range(11) for others in (0, 1)]
CHOICES.append((True,) * 11)


def arguments_of_both(*, wanted=CHOICES[-1], sizes=None, **options):
    """Arguments of elman_gradients_pair; the directions differ in what arrives at each."""
    grad_output, grad_h_n, x, *states = arguments(sizes=sizes, **options)[:7]
    states_reverse = arguments(sizes=sizes, **options | {"h0": False, "reverse": True})[3:7]
    tensors = [x, grad_output, grad_h_n, *states, None, torch.randn_like(grad_h_n), *states_reverse]
    return [*tensors, options.get("nonlinearity", "tanh"), sizes, list(wanted)]


def native_both(*args):
    return torch.ops.rnn_cuda.elman_gradients_pair(*args)


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_choice_of_both_directions_gradients_equals_two_calls(sizes):
    for wanted in CHOICES:
        args = arguments_of_both(sizes=sizes, wanted=wanted)
        actual = native_both(*args)
        (of_input, *first), (of_input_reverse, *second) = (
            native(*each) for each in arguments_of_each(*args)
        )
        assert_equal(actual, (of_input + of_input_reverse, *first, *second), names=BOTH_NAMES)
        assert [g.shape != (0,) for g in actual] == list(wanted)


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_transforms_of_both_directions_gradients_are_those_of_the_parts(sizes):
    args = arguments_of_both(sizes=sizes, nonlinearity="sigmoid")
    differentiable = [i for i in range(13) if args[i] is not None]

    def of_tensors(f):
        def g(*tensors):
            for i, tensor in zip(differentiable, tensors, strict=True):
                args[i] = tensor
            return f(*args)

        return g

    primals = tuple(args[i] for i in differentiable)
    tangents = tuple(torch.randn_like(p) for p in primals)
    results = []
    for f in (native_both, elman_gradients_in_turn):
        values, pushed = jvp(of_tensors(f), primals, tangents)
        mapped = vmap(of_tensors(f))(*(torch.stack([p, -p]) for p in primals))
        leaves = [p.detach().clone().requires_grad_() for p in primals]
        total = sum(g.pow(2).sum() for g in of_tensors(f)(*leaves))
        second = torch.autograd.grad(total, leaves)
        results.append((*values, *pushed, *mapped, *second))
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-12 * want.norm()


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_flops_of_both_directions_are_those_of_the_parts(sizes):
    for wanted in CHOICES:
        counts = []
        for f in (native_both, elman_gradients_in_turn):
            args = arguments_of_both(sizes=sizes, wanted=wanted)
            args[-1][5] = args[-1][10] = False  # by parts a norm has a product of its own
            with FlopCounterMode(display=False) as counter:
                f(*args)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1], wanted


def test_both_directions_have_one_number_of_hidden_units():
    args = arguments_of_both()
    args[11] = args[11][1:, 1:]
    with pytest.raises(
        RuntimeError, match=r"weight_hh_reverse must have shape .* as weight_hh has"
    ):
        native_both(*args)


# ---- norms of the adjoint ------------------------------------------------------------------------


def adjoints_by_autograd(x, h0, W, U, grads, *, nonlinearity, reverse, batch_sizes):
    """dL/dh_t, (rows, H), from the reference's loop: every state is a node of the graph."""
    x, W, U = x.double(), W.double(), U.double().requires_grad_()
    grad_output, grad_h_n = (None if g is None else g.double() for g in grads)
    state = torch.zeros(grad_h_n.shape).double() if h0 is None else h0.double()
    rows, loss, nodes = x.flatten(0, -2), 0.0, {}
    batch = None if batch_sizes is not None else x.shape[1]
    steps = reference.time_slices(len(rows), batch or len(state), batch_sizes, reverse)
    for row, size in steps:
        z = rows[row : row + size] @ W.T + state[:size] @ U.T
        nodes[row] = reference.activation(z, nonlinearity)
        state = torch.cat([nodes[row], state[size:]])
        if grad_output is not None:
            loss = loss + (nodes[row] * grad_output.flatten(0, -2)[row : row + size]).sum()
    if grad_h_n is not None:
        loss = loss + (state * grad_h_n).sum()
    ordered = [nodes[row] for row in sorted(nodes)]
    return torch.cat(torch.autograd.grad(loss, ordered))


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_adjoint_norms_are_those_of_every_states_total_gradient(sizes, nonlinearity):
    for reverse, h0, grad_output in itertools.product([False, True], repeat=3):
        args = arguments(
            sizes=sizes, nonlinearity=nonlinearity, reverse=reverse, h0=h0, grad_output=grad_output
        )
        adjoints = adjoints_by_autograd(
            *args[2:6], args[:2], nonlinearity=nonlinearity, reverse=reverse, batch_sizes=sizes
        )
        norms = native(*args)[5]
        assert norms.dtype == torch.float64
        assert norms.shape == args[6].shape[:-1]
        torch.testing.assert_close(norms.flatten(), adjoints.norm(dim=-1), rtol=1e-12, atol=0)


IMPLEMENTATIONS = pytest.mark.parametrize(
    "gradients_of", [native, elman_gradients_by_parts], ids=["native", "parts"]
)
# Exponents of the smallest normal and the smallest number of each type.
SMALLEST = {torch.float32: (-126, -149), torch.float64: (-1022, -1074)}


@IMPLEMENTATIONS
@pytest.mark.parametrize("hidden", [1, 7, 40, 64])
@pytest.mark.parametrize(
    ("dtype", "exponent"), [(torch.float32, 0), (torch.float64, 0), (torch.float64, 1000)], ids=str
)
def test_norms_neither_overflow_nor_vanish_before_the_adjoint_does(
    dtype, exponent, hidden, gradients_of
):
    smallest_normal, smallest = SMALLEST[dtype]
    T = exponent - smallest + 10
    # States of zero, where f' = 1, and a permutation halved: each step halves the adjoint, exactly.
    torch.manual_seed(0)
    U = torch.eye(hidden)[torch.randperm(hidden)] / 2
    states, x, W = torch.zeros(T, 2, hidden), torch.zeros(T, 2, 1), torch.zeros(hidden, 1)
    grad_h_n = torch.stack([torch.zeros(hidden), 1 + torch.rand(hidden)]).to(dtype) * 2.0**exponent
    tensors = [t.to(dtype) for t in (x, W, U, states)]
    args = [None, grad_h_n, tensors[0], None, *tensors[1:], "tanh", False, None]
    norms = gradients_of(*args, [False] * 5 + [True])[5].flip(0)  # by lag

    assert (norms[:, 0] == 0).all()  # no gradient at all
    lags = exponent - smallest_normal
    norm = (grad_h_n[1].double() * 2.0**-exponent).norm().item()
    expected = [math.ldexp(norm, exponent - lag) for lag in range(lags)]
    torch.testing.assert_close(
        norms[:lags, 1], torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0
    )
    assert (norms[: exponent - smallest, 1] > 0).all()  # denormal numbers too
    assert norms[-1, 1] == 0


@IMPLEMENTATIONS
def test_norms_of_what_is_not_finite_are_not_either(gradients_of):
    args = arguments(nonlinearity="identity")
    args[0][4:], args[1][:] = 0, 0
    args[0][3, 0, 0], args[0][3, 1, 1] = torch.inf, torch.nan
    norms = gradients_of(*args)[5]
    assert (norms[4:] == 0).all()
    assert norms[3, 0] == torch.inf
    assert norms[2, 0] == torch.inf  # of infinities alone, after a product with zero padding
    assert norms[:4, 1].isnan().all()
    assert norms[:, 2].isfinite().all()


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize(
    ("T", "B", "H"), [(30, 1, 300), (20, 3, 128), (9, 40, 70), (3, 2, 1024)], ids=str
)
@pytest.mark.parametrize("packed", [False, True])
def test_norms_do_not_depend_on_the_number_of_threads_or_on_the_batch(T, B, H, packed):
    torch.manual_seed(0)
    sizes = torch.tensor([B] * (T // 2) + [(B + 1) // 2] * (T - T // 2)) if packed else None
    rows = (int(sizes.sum()),) if packed else (T, B)
    states, grad_h_n = torch.rand(*rows, H), torch.randn(B, H)
    U = torch.randn(H, H) / H**0.5
    x, W = torch.randn(*rows, 3), torch.randn(H, 3)
    wanted = [True] * 6
    norms = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        args = [states, grad_h_n, x, None, W, U, states, "tanh", False, sizes, wanted]
        norms.append(native(*args)[5])
    assert all(torch.equal(n, norms[0]) for n in norms)
    if not packed:
        alone = [states[:, :1], grad_h_n[:1], x[:, :1], None, W, U, states[:, :1]]
        assert torch.equal(native(*alone, "tanh", False, None, wanted)[5][:, 0], norms[0][:, 0])


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
    args = arguments(wanted=(True, False, False, True, False, True))
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
    # The gradients are linear in it; a norm is not.
    assert_equal(actual[:5], native(tangent, None, *args[2:])[:5])


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
    args = arguments(sizes=sizes, wanted=(True, True, False, True, True, True))
    compiled = torch.compile(lambda *a: native(*a), fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*args), native(*args))


# ---- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_flops_are_those_of_the_parts(sizes):
    for *wanted, h0, grad_h_n in itertools.product([False, True], repeat=7):
        args = arguments(sizes=sizes, h0=h0, grad_h_n=grad_h_n, wanted=[*wanted, False])
        with_norm = [*args[:-1], [*wanted, True]]
        counts = []
        for f, its_args in ((native, args), (elman_gradients_by_parts, args), (native, with_norm)):
            with FlopCounterMode(display=False) as counter:
                f(*its_args)
            counts.append(counter.get_total_flops())
        # The norms need no product of their own.
        assert counts[0] == counts[1] == counts[2], (wanted, h0, grad_h_n)
