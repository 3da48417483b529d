"""``torch.func`` over the recurrences and over `FusedRNN`: each transform equals what a loop gives.

The oracle of derivatives is the reference, transformed in the same way or differentiated by plain
autograd, in float64.
"""

import collections
import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from rnn_cuda import FusedRNN, reference
from rnn_cuda.functional import (
    NONLINEARITIES,
    bidirectional_elman_rnn,
    elman_rnn,
    linear_recurrence,
)
from tests.layers import needs_native

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, I, H, V = 4, 3, 2, 5, 3  # V is the dimension that vmap maps over
SIZES = torch.tensor([3, 3, 2, 1])
LAYOUTS = {"dense": None, "packed": SIZES}
ALL = tuple(range(5))
layouts = pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def problem(sizes, *leading):
    """(x, W, U, b, h0), each with the ``leading`` dimensions in front."""
    torch.manual_seed(0)
    rows = (T, B) if sizes is None else (int(sizes.sum()),)
    shapes = [(*rows, I), (H, I), (H, H), (H,), (B, H)]
    return tuple(normal(*leading, *shape) / 2 for shape in shapes)


# Scalar functions of (x, W, U, b, h0), made of our recurrences or of the reference's.


def loss(run, sizes, nonlinearity="tanh", reverse=True):
    def f(x, W, U, b, h0):
        output, h_n = run(
            x, h0, W, U, b, nonlinearity=nonlinearity, reverse=reverse, batch_sizes=sizes
        )
        return output.pow(2).sum() + h_n.pow(3).sum()

    return f


def loss_of_both_directions(run, sizes):
    """The second direction shares weights with the first, in other roles."""

    def f(x, W, U, b, h0):
        of_each = run(x, (h0, W, U, b), (None, 2 * W, U.mT, None, b), batch_sizes=sizes)
        return sum(output.pow(2).sum() + h_n.pow(3).sum() for output, h_n in of_each)

    return f


def reference_of_both_directions(x, forward, reverse, **options):
    run = reference.elman_rnn
    return run(x, *forward, **options), run(x, *reverse, reverse=True, **options)


def loss_of_linear_recurrence(run, sizes):
    """With a d that is zero in places."""

    def f(x, W, U, b, h0):
        z = x @ W.mT
        return run(z.relu(), z + b, U, h0, batch_sizes=sizes).pow(2).sum()

    return f


LAYERS = {
    "one direction": (loss, elman_rnn, reference.elman_rnn),
    "both directions": (
        *(loss_of_both_directions, bidirectional_elman_rnn),
        reference_of_both_directions,
    ),
}
LOSSES = LAYERS | {
    "linear": (loss_of_linear_recurrence, linear_recurrence, reference.linear_recurrence)
}
layers = pytest.mark.parametrize(("loss", "run", "oracle"), LAYERS.values(), ids=LAYERS.keys())


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


# ---- derivatives ---------------------------------------------------------------------------------

DERIVATIVES = {
    "grad": grad,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "reverse over reverse": lambda f, argnums: jacrev(jacrev(f, argnums), argnums),
    "reverse over forward": lambda f, argnums: jacrev(jacfwd(f, argnums), argnums),
    "forward over forward": lambda f, argnums: jacfwd(jacfwd(f, argnums), argnums),
}


@pytest.mark.parametrize("transform", DERIVATIVES.values(), ids=DERIVATIVES.keys())
@layouts
@pytest.mark.parametrize("name", LOSSES)
def test_every_derivative_equals_the_references(name, sizes, transform):
    loss, run, oracle = LOSSES[name]
    tensors, argnums = problem(sizes), ALL if name == "one direction" else (0, 2)
    actual = transform(loss(run, sizes), argnums)(*tensors)
    assert_equal(actual, transform(loss(oracle, sizes), argnums)(*tensors))


@pytest.mark.parametrize(
    ("modes", "nonlinearity"),
    list(zip(map("".join, itertools.product("fr", repeat=3)), itertools.cycle(NONLINEARITIES))),
)
def test_third_derivatives_in_every_mix_of_modes_equal_the_references(modes, nonlinearity):
    transforms = {"f": jacfwd, "r": jacrev}

    def third(f):
        for mode, argnum in zip(reversed(modes), (0, 3, 1), strict=True):
            f = transforms[mode](f, argnum)
        return f

    tensors = problem(None)
    actual = third(loss(elman_rnn, None, nonlinearity))(*tensors)
    assert_equal(actual, third(loss(reference.elman_rnn, None, nonlinearity))(*tensors))


@layers
def test_a_gradient_taken_without_a_graph_carries_tangents(loss, run, oracle):
    x, W, U, b, h0 = problem(None)
    direction = torch.randn_like(U)

    def tangent_of_gradient(run):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(U.clone().requires_grad_(), direction)
            (gradient,) = torch.autograd.grad(loss(run, None)(x, W, dual, b, h0), dual)
            return forward_ad.unpack_dual(gradient).tangent

    assert_equal(tangent_of_gradient(run), tangent_of_gradient(oracle))


@layers
def test_a_cotangent_with_a_tangent_meets_a_graph_built_without(loss, run, oracle):
    x, W, U, b, h0 = problem(None)
    W.requires_grad_()
    value = loss(run, None)(x, W, U, b, h0)
    with forward_ad.dual_level():
        cotangent = forward_ad.make_dual(torch.ones_like(value), torch.ones_like(value))
        (gradient,) = torch.autograd.grad(value, W, cotangent)
        tangent = forward_ad.unpack_dual(gradient).tangent
    # Gradients are linear in the cotangent.
    assert_equal(tangent, torch.autograd.grad(loss(oracle, None)(x, W, U, b, h0), W)[0])


def test_a_tensor_leaked_out_of_a_transform_is_differentiated_as_itself():
    x, W, U, b, h0 = problem(None)
    U.requires_grad_()
    gradients = []
    for run in (elman_rnn, reference.elman_rnn):
        leaked = []
        grad(lambda U, leaked=leaked: leaked.append(2 * U) or U.sum())(U)
        value = loss(run, None)(x, W, leaked[0], b, h0)
        gradients.append(torch.autograd.grad(value, U)[0])
    assert_equal(*gradients)


def test_no_grad_inside_nested_transforms_holds_at_every_level():
    x, W, U, b, h0 = problem(None)

    def outer(run):
        def inner(U):
            with torch.no_grad():
                constant = loss(run, None)(x, W, U, b, h0)
            return U.pow(3).sum() * constant

        return lambda U: grad(inner)(U).pow(2).sum()

    assert_equal(grad(outer(elman_rnn))(U), grad(outer(reference.elman_rnn))(U))


# ---- vmap ----------------------------------------------------------------------------------------

IN_DIMS = {
    "inputs": (0, None, None, None, None),
    "inputs and states, at odd places": (1, None, None, None, -1),
    "states": (None, None, None, None, 1),
    "weights": (None, 1, 2, 0, None),
    "bias": (None, None, None, -1, None),
    "everything": (0, 1, 0, 1, 2),
}


@pytest.mark.parametrize("inner", [lambda f: f, grad], ids=["value", "gradient"])
@pytest.mark.parametrize("in_dims", IN_DIMS.values(), ids=IN_DIMS.keys())
@layouts
def test_vmap_equals_a_loop(sizes, in_dims, inner):
    stacked = problem(sizes, V)
    single = problem(sizes)
    mapped = [
        one if dim is None else many.movedim(0, dim)
        for one, many, dim in zip(single, stacked, in_dims, strict=True)
    ]
    argnums = {} if inner is not grad else {"argnums": ALL}
    f = inner(loss(elman_rnn, sizes), **argnums)
    oracle = inner(loss(reference.elman_rnn, sizes), **argnums)
    results = [
        oracle(*(t if d is None else t.select(d, i) for t, d in zip(mapped, in_dims, strict=True)))
        for i in range(V)
    ]
    expected = torch.utils._pytree.tree_map(lambda *each: torch.stack(each), *results)
    assert_equal(vmap(f, in_dims)(*mapped), expected)


@layouts
def test_nested_vmaps_equal_nested_loops(sizes):
    _, W, _, b, h0 = problem(sizes)
    xs, Us = problem(sizes, V)[0], problem(sizes, 2)[2]
    f = grad(loss(elman_rnn, sizes), argnums=ALL)
    over_inputs = vmap(f, (0, None, None, None, None))
    actual = vmap(over_inputs, (None, None, 0, None, None))(xs, W, Us, b, h0)
    oracle = grad(loss(reference.elman_rnn, sizes), argnums=ALL)
    for i in range(2):
        for j in range(V):
            expected = oracle(xs[j], W, Us[i], b, h0)
            assert_equal(tuple(g[i, j] for g in actual), expected)


@needs_native
def test_vmap_over_nothing_is_refused():
    x, W, U = normal(0, T, B, I), normal(H, I), normal(H, H)
    with pytest.raises(ValueError, match="expected a mapped dimension of size 1 or more, got 0"):
        vmap(lambda x: elman_rnn(x, None, W, U))(x)


@needs_native
def test_vmap_folds_into_one_call_where_the_weights_are_shared():
    for sizes in LAYOUTS.values():
        xs, (_, W, U, b, h0) = problem(sizes, V)[0], problem(sizes)
        with count_native_calls() as counts:
            vmap(grad(loss(elman_rnn, sizes), argnums=1), (0, *[None] * 4))(xs, W, U, b, h0)
        assert counts == {"layer_forward": 1, "linear_recurrence": 1}


# ---- modules: what else there is, is in the table of docs/differentiation-table.md ---------------


def test_per_sample_gradients_of_packed_sequences_equal_one_backward_pass_each():
    torch.manual_seed(0)
    rnn = FusedRNN(I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    parameters, sizes = dict(rnn.named_parameters()), torch.tensor([2, 2, 2, 1])
    data = normal(V, 7, I)  # V times two samples; vmap maps over the packed data

    def loss_of(parameters, data):
        output, h_n = functional_call(rnn, parameters, (PackedSequence(data, sizes),))
        return output.data.pow(2).mean() + h_n.sum()

    per_sample = vmap(grad(loss_of), in_dims=(None, 0))(parameters, data)
    for i, sample in enumerate(data):
        expected = torch.autograd.grad(loss_of(parameters, sample), list(rnn.parameters()))
        assert_equal([g[i] for g in per_sample.values()], list(expected))


# ---- what it costs -------------------------------------------------------------------------------


class count_native_calls(TorchDispatchMode):  # noqa: N801 (a context manager, used as a function)
    """Counts the native operators that run inside, by name."""

    def __enter__(self):
        super().__enter__()
        self.counts = collections.Counter()
        return self.counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rnn_cuda":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def reverse_over_reverse(f, U, direction):
    U = U.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(U), U, create_graph=True)
    return torch.autograd.grad(gradient, U, direction)[0]


def forward_over_reverse(f, U, direction):
    return jvp(grad(f), (U,), (direction,))[1]


HVPS = {"reverse over reverse": reverse_over_reverse, "forward over reverse": forward_over_reverse}


def hvp_problem(time_steps, run):
    torch.manual_seed(1)
    x, W, U = normal(time_steps, B, I), normal(H, I), normal(H, H) / (2 * H**0.5)
    direction = normal(H, H)
    return (lambda U: run(x, None, W, U)[0].pow(2).mean()), U, direction


@needs_native
@pytest.mark.parametrize(
    ("hvp", "expected"),
    [
        # The forward pass; its adjoint; the adjoint's adjoint; and the adjoint of the forward pass
        # again, for what the second differentiation found there.
        (
            reverse_over_reverse,
            {"layer_forward": 1, "linear_recurrence": 2, "layer_gradients": 1},
        ),
        # The forward pass; its adjoint; the tangent of each.
        (forward_over_reverse, {"layer_forward": 1, "linear_recurrence": 3}),
    ],
    ids=HVPS.keys(),
)
def test_a_hessian_vector_product_through_1000_steps_is_four_native_calls(hvp, expected):
    f, U, direction = hvp_problem(1000, elman_rnn)
    with count_native_calls() as counts:
        product = hvp(f, U, direction)
    assert counts == expected
    assert product.isfinite().all()
    assert product.norm() > 0


@pytest.mark.parametrize("hvp", HVPS.values(), ids=HVPS.keys())
def test_a_hessian_vector_product_equals_the_references(hvp):
    actual = hvp(*hvp_problem(60, elman_rnn))
    assert_equal(actual, hvp(*hvp_problem(60, reference.elman_rnn)))


@needs_native
def test_training_uses_the_fused_backward_and_nothing_else():
    x, W, U, b, h0 = (t.requires_grad_() for t in problem(None))
    with count_native_calls() as counts:
        torch.autograd.grad(loss(elman_rnn, None)(x, W, U, b, h0), (x, W, U, b, h0))
    assert counts == {"layer_forward": 1, "layer_gradients": 1}


@needs_native
def test_a_bidirectional_layer_is_one_call_each_way():
    gradients = []

    class Watch(count_native_calls):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.rnn_cuda.layer_gradients.default:
                gradients.append(args[0][0])  # of the output
            return super().__torch_dispatch__(func, types, args, kwargs)

    rnn = FusedRNN(I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = normal(T, B, I)
    with Watch() as counts:
        rnn(x)[0].pow(2).sum().backward()
    assert counts == {"layer_forward": 2, "layer_gradients": 2}
    assert [g.shape for g in gradients] == [(T, B, 2 * H)] * 2  # of both directions
