"""The operator of a layer's backward pass against the same by parts, and the reference.

"By parts" is what stands in where derivatives of the gradients are asked for: delta by the linear
recurrence, then one matrix product for each gradient.
"""

import itertools
import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jvp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from rnn_cuda import reference
from rnn_cuda.cells import elman
from rnn_cuda.functional import NONLINEARITIES
from rnn_cuda.operators.layer_gradients import gradients_by_parts
from tests.layers import halves, needs_native

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    needs_native,
]

T, B, I, H = 6, 3, 4, 17
SIZES = torch.tensor([3, 3, 2, 1])
LAYOUTS = {"dense": None, "packed": SIZES}
DIRECTIONS = ("forward", "reverse", "both")
layouts = pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())
directions = pytest.mark.parametrize("direction", DIRECTIONS)
WANTED = 9  # the last of the arguments


def results_of(direction, h0=True):
    """Names of what may be wanted, in its order."""
    each = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    names = ["input", *(["h0"] if h0 else []), *each]
    names += [f"{name}_reverse" for name in each] if direction == "both" else []
    return [*names, "norms", "delta"]


def arguments(
    dtype=torch.float64,
    *,
    sizes=None,
    nonlinearity="tanh",
    direction="forward",
    h0=True,
    grad_output=True,
    grad_h_n=True,
    wanted=None,
    batch=B,
):
    """Arguments of layer_gradients; the states are those of a forward pass."""
    torch.manual_seed(0)
    rows, count = (T, batch) if sizes is None else (int(sizes.sum()),), 1 + (direction == "both")
    x = torch.randn(*rows, I).to(dtype)
    start = torch.randn(count, batch, H).to(dtype)
    weights, outputs = [], []
    for d in range(count):
        W, U = torch.randn(H, I).to(dtype), (torch.randn(H, H) / H**0.5).to(dtype)
        biases = [torch.randn(H).to(dtype) for _ in range(2)]
        options = {"nonlinearity": nonlinearity, "batch_sizes": sizes}
        options["reverse"] = direction == "reverse" or d == 1
        its_h0 = start[d] if h0 else None
        outputs.append(reference.elman_rnn(x, its_h0, W, U, *biases, **options)[0])
        weights += [W, U, *biases]
    output = torch.cat(outputs, -1)
    grads = [
        torch.randn_like(output) if grad_output else None,
        torch.randn_like(start) if grad_h_n else None,
    ]
    names = results_of(direction, h0)
    wanted = names if wanted is None else wanted
    chosen = [name in wanted for name in names]
    states = [start] if h0 else []
    options = f"elman.{nonlinearity}", direction, sizes, chosen
    return [grads, x, states, weights, output, [], *options]


def native(*args):
    return torch.ops.rnn_cuda.layer_gradients(*args)


def named(results, args):
    names = results_of(args[7], h0=bool(args[2]))
    wanted = [name for name, is_wanted in zip(names, args[WANTED], strict=True) if is_wanted]
    return dict(zip(wanted, results, strict=True))


def assert_equal(actual, expected, tolerance=1e-12):
    """Compare gradients, each on the scale of its own norm."""
    for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert got.shape == want.shape, i
        assert got.dtype == want.dtype, i
        assert (got.double() - want.double()).norm() <= tolerance * want.double().norm(), i


def of_tensors(f, args):
    """Return f as a function of the tensors that can be differentiated, and these."""
    leaves, spec = tree_flatten(args)
    places = [i for i, a in enumerate(leaves) if torch.is_tensor(a) and a.is_floating_point()]

    def g(*tensors):
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return f(*tree_unflatten(filled, spec))

    return g, tuple(leaves[i] for i in places)


# ---- values --------------------------------------------------------------------------------------


@layouts
@directions
def test_every_choice_of_gradients_equals_the_parts_and_the_rest_is_left_out(sizes, direction):
    for h0 in (False, True):
        names = results_of(direction, h0)
        choices = [*([name] for name in names), *([n for n in names if n != m] for m in names)]
        for wanted in (*choices, [], ["norms", "delta"], ["input", "delta"]):
            args = arguments(sizes=sizes, h0=h0, direction=direction, wanted=wanted)
            actual = native(*args)
            assert len(actual) == len(wanted)
            assert_equal(actual, gradients_by_parts(*args))


@layouts
@directions
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_every_choice_of_arguments_equals_the_parts(sizes, direction, nonlinearity):
    options = ("h0", "grad_output", "grad_h_n")
    for values in itertools.product([False, True], repeat=len(options)):
        chosen = dict(zip(options, values, strict=True))
        if chosen["grad_output"] or chosen["grad_h_n"]:
            args = arguments(sizes=sizes, nonlinearity=nonlinearity, direction=direction, **chosen)
            assert_equal(native(*args), gradients_by_parts(*args))


@pytest.mark.parametrize("wanted", [None, ("input", "weight_ih", "weight_hh")])
@directions
def test_memory_layout_does_not_matter(wanted, direction):
    args = arguments(wanted=wanted, direction=direction)
    expected = native(*args)
    function, tensors = of_tensors(native, args)
    for i, tensor in enumerate(tensors):
        changed = [torch.stack([tensor, tensor], dim=-1)[..., 0]]  # every second feature
        if tensor.dim() > 1:
            changed.append(tensor.mT.contiguous().mT)
        if tensor.dim() == 3:
            changed.append(tensor.transpose(0, 1).contiguous().transpose(0, 1))
        for other in changed:
            assert_equal(function(*tensors[:i], other, *tensors[i + 1 :]), expected)
    for shape in [(), (args[0][0].shape[-1],), (B, 1), (T, 1, 1)]:
        expanded = torch.randn(shape, dtype=torch.float64).expand(args[0][0].shape)
        results = [native([g, args[0][1]], *args[1:]) for g in (expanded, expanded.contiguous())]
        assert_equal(*results)


@directions
def test_an_empty_batch_has_zero_weight_gradients(direction):
    args = arguments(batch=0, direction=direction)
    actual = native(*args)
    assert_equal(actual, gradients_by_parts(*args))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in actual[2:])


@halves
@layouts
def test_half_precisions_are_as_accurate_as_the_parts(sizes, dtype):
    args = arguments(dtype, sizes=sizes)
    function, tensors = of_tensors(gradients_by_parts, args)
    exact = function(*(tensor.double() for tensor in tensors))
    actual, parts = native(*args), gradients_by_parts(*args)
    for name, got, part, want in zip(results_of("forward"), actual, parts, exact, strict=True):
        assert got.dtype == (torch.float64 if name == "norms" else dtype)
        error, error_of_parts = ((g.double() - want).norm() / want.norm() for g in (got, part))
        assert error <= 1.5 * error_of_parts + torch.finfo(dtype).eps, name


def test_the_gradients_of_two_biases_are_two_tensors():
    for function in (native, gradients_by_parts):
        results = named(function(*(args := arguments())), args)
        assert torch.equal(results["bias_ih"], results["bias_hh"])
        assert results["bias_ih"].data_ptr() != results["bias_hh"].data_ptr()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, [None], "grads: expected those of output and of the final states, 2 in all"),
        (2, [torch.zeros(2, B, H).double()], "the initial state|h0 must have shape"),
        (2, 2 * [torch.zeros(1, B, H).double()], "states: expected h0 or nothing"),
        (3, [torch.zeros(H, I).double()], "weights: expected weight_ih, weight_hh"),
        (6, "elman.softsign", "cell: expected one of elman.tanh"),
        (7, "up", "direction: expected forward, reverse or both"),
        (WANTED, [True], "wanted: expected 8 bools, got 1"),
    ],
)
def test_a_list_that_does_not_fit_is_named(place, value, message):
    args = arguments()
    args[place] = value
    with pytest.raises((ValueError, RuntimeError), match=message):
        native(*args)


# ---- norms of the adjoint ------------------------------------------------------------------------


def adjoints_by_autograd(x, h0, weights, grads, *, nonlinearity, reverse, batch_sizes):
    """dL/dh_t, (rows, H), from the reference's loop: every state is a node of the graph."""
    W, U, b_ih, b_hh = weights
    x, U = x.double(), U.double().requires_grad_()
    grad_output, grad_h_n = (None if g is None else g.double() for g in grads)
    state = torch.zeros(grad_h_n.shape).double() if h0 is None else h0.double()
    rows, loss, nodes = x.flatten(0, -2), 0.0, {}
    batch = None if batch_sizes is not None else x.shape[1]
    steps = reference.time_slices(len(rows), batch or len(state), batch_sizes, reverse)
    for row, size in steps:
        z = rows[row : row + size] @ W.T + b_ih + state[:size] @ U.T + b_hh
        nodes[row] = elman.activation(z, nonlinearity)
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
    for direction, h0, grad_output in itertools.product(DIRECTIONS, [False, True], [False, True]):
        options = {"direction": direction, "h0": h0, "grad_output": grad_output}
        args = arguments(sizes=sizes, nonlinearity=nonlinearity, **options)
        norms = named(native(*args), args)["norms"]
        assert norms.dtype == torch.float64
        assert norms.shape == (1 + (direction == "both"), *args[4].shape[:-1])
        for d, its_norms in enumerate(norms):
            grads = (None if args[0][0] is None else args[0][0].split(H, -1)[d], args[0][1][d])
            adjoints = adjoints_by_autograd(
                *(args[1], args[2][0][d] if h0 else None, args[3][4 * d : 4 * d + 4], grads),
                nonlinearity=nonlinearity,
                reverse=direction == "reverse" or d == 1,
                batch_sizes=sizes,
            )
            expected = adjoints.norm(dim=-1)
            torch.testing.assert_close(its_norms.flatten(), expected, rtol=1e-12, atol=0)


IMPLEMENTATIONS = pytest.mark.parametrize(
    "gradients_of", [native, gradients_by_parts], ids=["native", "parts"]
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
    x, W, U, states = tensors
    args = [[None, grad_h_n.unsqueeze(0)], x, [], [W, U], states, [], "elman.tanh", "forward", None]
    (norms,) = gradients_of(*args, [False, False, False, True, False])
    norms = norms[0].flip(0)  # by lag

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
    grad_output, grad_h_n = args[0]
    grad_output[4:], grad_h_n[:] = 0, 0
    grad_output[3, 0, 0], grad_output[3, 1, 1] = torch.inf, torch.nan
    norms = named(gradients_of(*args), args)["norms"][0]
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
    options = "elman.tanh", "forward", sizes, [True, True, True, True, False]

    def norms_of(states, grad_h_n, x):
        grads = [states, grad_h_n.unsqueeze(0)]
        return native(grads, x, [], [W, U], states, [], *options)[-1][0]

    norms = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        norms.append(norms_of(states, grad_h_n, x))
    assert all(torch.equal(n, norms[0]) for n in norms)
    if not packed:
        alone = norms_of(states[:, :1], grad_h_n[:1], x[:, :1])
        assert torch.equal(alone[:, 0], norms[0][:, 0])


# ---- transforms ----------------------------------------------------------------------------------


@layouts
@directions
def test_vmap_equals_a_loop(sizes, direction):
    function, tensors = of_tensors(native, arguments(sizes=sizes, direction=direction))
    everything = range(len(tensors))
    for mapped in (*([i] for i in everything), (0, 2), list(everything)):
        in_dims = [1 if i in mapped and t.dim() > 1 else None for i, t in enumerate(tensors)]
        if set(in_dims) == {None}:
            continue
        stacked = [
            t if dim is None else torch.stack([t, 2 * t, -t], dim=dim)
            for t, dim in zip(tensors, in_dims, strict=True)
        ]
        actual = vmap(function, tuple(in_dims))(*stacked)
        for k in range(3):
            one = [
                t if dim is None else t.select(dim, k)
                for t, dim in zip(stacked, in_dims, strict=True)
            ]
            assert_equal([g[k] for g in actual], function(*one))


def test_nested_vmaps_equal_nested_loops():
    args = arguments(wanted=("input", "weight_hh", "norms"))
    cotangents, Us = torch.randn(2, T, B, H).double(), torch.randn(3, H, H).double() / 4

    def f(cotangent, U):
        weights = [args[3][0], U, *args[3][2:]]
        return native([cotangent, args[0][1]], *args[1:3], weights, *args[4:])

    actual = vmap(vmap(f, (0, None)), (None, 0))(cotangents, Us)
    for i, j in itertools.product(range(3), range(2)):
        assert_equal([g[i, j] for g in actual], f(cotangents[j], Us[i]))


@layouts
@directions
def test_tangents_equal_those_of_the_parts_in_every_argument(sizes, direction):
    args = arguments(sizes=sizes, direction=direction)
    function, primals = of_tensors(native, args)
    tangents = tuple(torch.randn_like(p) for p in primals)
    actual = jvp(function, primals, tangents)
    expected = jvp(of_tensors(gradients_by_parts, args)[0], primals, tangents)
    assert_equal(actual[0], expected[0])
    assert_equal(actual[1], expected[1])
    step = 1e-6
    above, below = (
        function(*(p + s * step * t for p, t in zip(primals, tangents, strict=True)))
        for s in (1, -1)
    )
    difference = [(a - b) / (2 * step) for a, b in zip(above, below, strict=True)]
    for got, want in zip(difference, actual[1], strict=True):
        assert (got - want).norm() <= 1e-7 * want.norm() + 1e-7


def test_tangents_pass_without_a_graph():
    args = arguments(wanted=("input", "h0", "weight_ih", "weight_hh", "delta"))
    tangent = torch.randn_like(args[0][0])
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(args[0][0], tangent)
        results = native([dual, args[0][1]], *args[1:])
        actual = [forward_ad.unpack_dual(g).tangent for g in results]
    # The gradients are linear in it; a norm is not.
    assert_equal(actual, native([tangent, None], *args[1:]))


@layouts
@directions
def test_gradients_of_the_gradients_are_those_of_the_parts(sizes, direction):
    args = arguments(sizes=sizes, nonlinearity="sigmoid", direction=direction)
    results = []
    for f in (native, gradients_by_parts):
        function, tensors = of_tensors(f, args)
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        value = sum(g.pow(2).sum() for g in function(*leaves))
        results.append(torch.autograd.grad(value, leaves, allow_unused=True))
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)  # a bias has no part in its gradient
        assert got is None or (got - want).norm() <= 1e-12 * want.norm()


# ---- cost ----------------------------------------------------------------------------------------


@layouts
@directions
def test_flops_are_those_of_the_parts(sizes, direction):
    for h0, grad_h_n in ((False, True), (True, False)):
        options = {"sizes": sizes, "direction": direction, "h0": h0, "grad_h_n": grad_h_n}
        names = results_of(direction, h0)[:-2]
        for wanted in (*([name] for name in names), names):
            counts = []
            for f in (native, gradients_by_parts):
                with FlopCounterMode(display=False) as counter:
                    f(*arguments(wanted=wanted, **options))
                counts.append(counter.get_total_flops())
            with FlopCounterMode(display=False) as counter:
                native(*arguments(wanted=[*wanted, "norms", "delta"], **options))
            # The norms need no product of their own.
            assert counts[0] == counts[1] == counter.get_total_flops(), (wanted, options)
