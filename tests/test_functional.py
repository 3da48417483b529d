"""The two recurrences against the reference, in values and in every kind of derivative.

These tests run on whichever backend is active; with RNN_CUDA_BACKEND=native they test the kernels.
"""

import itertools
import random

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from rnn_cuda import functional, reference
from rnn_cuda.cells import elman
from rnn_cuda.functional import (
    NONLINEARITIES,
    bidirectional_elman_rnn,
    elman_rnn,
    linear_recurrence,
)
from tests.layers import halves


def batch_sizes_of(lengths):
    lengths = sorted(lengths, reverse=True)
    return torch.tensor([sum(n > t for n in lengths) for t in range(lengths[0])])


def random_problem(rng, dtype):
    """One problem of random sizes, odd ones included; returns (tensors, options)."""
    T, B = rng.choice([1, 2, 3, 7, 20]), rng.choice([1, 2, 3, 5, 17, 40])
    I, H = rng.choice([1, 2, 16, 33, 70]), rng.choice([1, 3, 16, 17, 32, 64, 100, 130, 257])
    options = {"reverse": rng.random() < 0.5, "batch_sizes": None}
    if rng.random() < 0.5:
        lengths = [T] + [rng.randint(1, T) for _ in range(B - 1)]
        options["batch_sizes"] = batch_sizes_of(lengths)
        x = torch.randn(sum(lengths), I, dtype=dtype)
    else:
        layouts = {
            "plain": lambda: torch.randn(T, B, I, dtype=dtype),
            "batch_first": lambda: torch.randn(B, T, I, dtype=dtype).transpose(0, 1),
            "expanded": lambda: torch.randn(I, dtype=dtype).expand(T, B, I),
        }
        x = layouts[rng.choice(["plain", "plain", "batch_first", "expanded"])]()
    tensors = {
        "x": x,
        "h0": torch.randn(B, H, dtype=dtype) if rng.random() < 0.5 else None,
        # Of a size at which a single unit is not saturated: f', read off h, would have few digits.
        "W": torch.randn(H, I, dtype=dtype) / max(H, I) ** 0.5,
        "U": torch.randn(H, H, dtype=dtype) / H**0.5,
        "b_ih": torch.randn(H, dtype=dtype) / 2 if rng.random() < 0.5 else None,
        "b_hh": torch.randn(H, dtype=dtype) / 2 if rng.random() < 0.5 else None,
    }
    for name, tensor in tensors.items():
        if name != "x" and tensor is not None and rng.random() < 0.2:
            tensors[name] = torch.stack([tensor, tensor], dim=-1)[..., 0]  # strides of two
    return tensors, options


def gradients(outputs, leaves, cotangents, **options):
    """Of those leaves that are not None."""
    leaves = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(outputs, leaves, cotangents, **options)


def relative_error(actual, expected):
    scale = expected.norm().clamp_min(1e-30)
    return ((actual.double() - expected).norm() / scale).item()


def widened(tensors):
    """float64 leaves that share no history with ``tensors``; None stays None."""
    return {
        k: None if v is None else v.detach().double().requires_grad_() for k, v in tensors.items()
    }


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
IS_CPU_KERNEL = functional.backend.requested() != "emulated" and functional.backend.use_native(
    "cpu", torch.float32
)
to_the_bit = pytest.mark.skipif(
    not IS_CPU_KERNEL, reason="the CPU kernel's promise: others may sum in another order"
)
every_dtype = pytest.mark.parametrize("dtype", functional.backend.NATIVE_DTYPES, ids=str)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("seed", range(25))
def test_values_and_gradients_equal_the_float64_reference(seed, dtype):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(rng.choice([1, 2, 3]))
    for nonlinearity in NONLINEARITIES:
        tensors, options = random_problem(rng, dtype)
        options["nonlinearity"] = nonlinearity
        leaves = {k: None if v is None else v.requires_grad_() for k, v in tensors.items()}
        wide = widened(tensors)
        actual = elman_rnn(*leaves.values(), **options)
        expected = reference.elman_rnn(*wide.values(), **options)
        cotangents = [torch.randn_like(out) for out in actual]
        use = rng.choice([(0,), (1,), (0, 1)])  # output only, h_n only, both
        grads = gradients([actual[i] for i in use], leaves.values(), [cotangents[i] for i in use])
        expected_grads = gradients(
            [expected[i] for i in use],
            wide.values(),
            [cotangents[i].double() for i in use],
            materialize_grads=True,
        )
        names = ["output", "h_n"] + [f"d{k}" for k, v in leaves.items() if v is not None]
        for name, got, want in zip(
            names, [*actual, *grads], [*expected, *expected_grads], strict=True
        ):
            error = relative_error(got, want)
            assert error < TOLERANCE[dtype], (name, error, options, leaves["x"].shape)


def two_calls(x, forward, reverse, **options):
    """What `bidirectional_elman_rnn` computes at once."""
    return elman_rnn(x, *forward, **options), elman_rnn(x, *reverse, reverse=True, **options)


@to_the_bit
@pytest.mark.usefixtures("restored_threads")
@every_dtype
@pytest.mark.parametrize("seed", range(6))
def test_both_directions_at_once_are_two_calls_to_the_bit(seed, dtype):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(rng.choice([1, 2, 3]))
    for nonlinearity in NONLINEARITIES:
        (x, *forward), options = problem_of_both_directions(rng, dtype)
        forward, reverse = forward[:5], forward[5:]
        options["nonlinearity"] = nonlinearity
        # Some results unused, even all of a direction; some arguments frozen.
        use = rng.choice([(0, 1, 2, 3), (0, 2), (1, 3), (0,), (3,), (1, 2)])
        leaves = [t for t in (x, *forward, *reverse) if t is not None]
        for leaf in leaves:
            leaf.requires_grad_(rng.random() < 0.7)
        results, cotangents = [], None
        for run in (bidirectional_elman_rnn, two_calls):
            outputs = [t for each in run(x, forward, reverse, **options) for t in each]
            cotangents = cotangents or [torch.randn_like(out) for out in outputs]
            used = [i for i in use if outputs[i].requires_grad]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            grads = []
            if used and wanted:
                grads = gradients(
                    [outputs[i] for i in used],
                    wanted,
                    [cotangents[i] for i in used],
                    materialize_grads=True,  # and so, allow_unused
                )
            results.append([*outputs, *grads])
        if len(results[0]) > len(results[1]):  # of two calls, the one that is used has no graph
            results = [each[:4] for each in results]
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want), (options, use)


def problem_of_both_directions(rng, dtype):
    """(x, h0, W, U, b_ih, b_hh and the same of the other direction), options."""
    tensors, options = random_problem(rng, dtype)
    x, *forward = tensors.values()
    del options["reverse"]
    sizes, hidden = options["batch_sizes"], forward[2].shape[0]
    shapes = [(x.shape[1] if sizes is None else int(sizes[0]), hidden)]
    shapes += [forward[1].shape, forward[2].shape, (hidden,), (hidden,)]
    reverse = [torch.randn(shape, dtype=dtype) / hidden**0.5 for shape in shapes]
    for i in (0, 3, 4):
        reverse[i] = reverse[i] if rng.random() < 0.5 else None
    return (x, *forward, *reverse), options


@halves
def test_half_precisions_round_once_per_step_as_the_reference_does(dtype):
    torch.manual_seed(0)
    shapes = [(12, 5, 7), (5, 33), (33, 7), (33, 33), (33,), (33,)]
    x, h0, W, U, *biases = (torch.randn(shape) for shape in shapes)
    tensors = [t.to(dtype) for t in (x, h0, W, U / 33**0.5, *biases)]
    output, h_n = elman_rnn(*tensors)
    expected, _ = reference.elman_rnn(*tensors)
    # A sum in another order may fall on the other side of a rounding boundary now and then.
    torch.testing.assert_close(output, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    assert (output == expected).float().mean() > 0.98
    assert torch.equal(h_n, output[-1])


@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid", "softplus"])
def test_activations_are_accurate_bounded_and_keep_nan(nonlinearity):
    one = torch.ones(1, 1)
    x = torch.cat(
        [
            torch.linspace(-30, 30, 200_001),
            torch.logspace(-38, 2, 20_001),
            -torch.logspace(-38, 2, 20_001),
            torch.tensor([float("inf"), -float("inf"), 0.0, 1e-42]),
        ]
    )
    actual = elman_rnn(x.view(1, -1, 1), None, one, one, nonlinearity=nonlinearity)[0].view(-1)
    exact = elman.activation(x.double(), nonlinearity)
    finite = exact.isfinite()
    assert ((actual.double() - exact) / exact.abs().clamp(min=1))[finite].abs().max() < 3e-7
    assert torch.equal(actual[~finite].double(), exact[~finite])
    assert nonlinearity == "softplus" or actual.abs().max() <= 1
    normal = (exact.abs() > 1e-37) & finite
    relative = ((actual.double() - exact) / exact)[normal].abs().max().item()
    assert relative < 4 * torch.finfo(torch.float32).eps
    nan = elman_rnn(torch.full((1, 1, 1), float("nan")), None, one, one, nonlinearity=nonlinearity)
    assert nan[0].isnan().all()


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_a_nan_in_one_sample_reaches_its_later_steps_and_no_other_sample(nonlinearity):
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4)
    x[2, 1, 0] = float("nan")
    output, _ = elman_rnn(
        x, None, torch.randn(20, 4), torch.randn(20, 20), nonlinearity=nonlinearity
    )
    assert output[2:, 1].isnan().all()
    assert not output[:2].isnan().any()
    assert not output[:, [0, 2]].isnan().any()


def test_gradients_pass_a_relu_of_nan_as_in_torch():
    torch.manual_seed(0)
    rnn = torch.nn.RNN(3, 4, nonlinearity="relu")
    weights, x = list(rnn.parameters()), torch.full((2, 1, 3), float("nan"))
    expected = torch.autograd.grad(rnn(x)[0].sum(), weights)
    output, _ = elman_rnn(x, None, *weights, nonlinearity="relu")
    actual = torch.autograd.grad(output.sum(), weights)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@every_dtype
@pytest.mark.parametrize("H", [5, 8, 37])
def test_an_inf_in_x_saturates_one_step_and_no_more(H, dtype):
    """What pads a row of states must not turn the next step into a NaN."""
    torch.manual_seed(0)
    x = torch.randn(4, 2, 3, dtype=dtype)
    W, U = torch.ones(H, 3, dtype=dtype), torch.randn(H, H, dtype=dtype) / H**0.5
    x[1, 0, 0] = float("inf")
    output, _ = elman_rnn(x, None, W, U)
    assert output.isfinite().all()
    assert (output[1, 0] == 1).all()


def as_reference(*arguments, **options):
    """Compare outputs and final states, NaN too, with the reference's; return the outputs."""
    actual, expected = (run(*arguments, **options) for run in (elman_rnn, reference.elman_rnn))
    torch.testing.assert_close(actual, expected, equal_nan=True)
    return expected[0]


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid", "softplus"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_in_u_meets_the_zeros_of_a_missing_initial_state(value, nonlinearity):
    """Kernels leave that product out, unless it is a NaN; few steps look at U on its way."""
    torch.manual_seed(0)
    for T, B, H in itertools.product((1, 2, 3, 6), (1, 3, 11), (1, 6, 300)):
        x, W = torch.randn(T, B, 2), torch.randn(H, 2)
        # 300 units are enough work for two threads, each with half of U.
        for row, threads, reverse in [(H - 1, 1, False), (H // 2, 2, False), (H - 1, 2, True)]:
            torch.set_num_threads(threads)
            U = torch.randn(H, H) / H
            U[row, H // 3] = value
            options = {"nonlinearity": nonlinearity, "reverse": reverse}
            output = as_reference(x, None, W, U, **options)
            assert output[-1 if reverse else 0, :, row].isnan().all()


def test_an_inf_in_u_does_not_reach_the_gradient_of_a_sample_that_ended_before_it():
    """Packed samples of other lengths enter the backward pass at a later step, from no state."""
    torch.manual_seed(0)
    for lengths in [(2, 1), (9, 4, 4, 3, 1, 1, 1)]:
        sizes = batch_sizes_of(lengths)
        U = torch.randn(40, 40) / 7
        U[3, 5] = float("inf")
        x = torch.randn(sum(lengths), 6).requires_grad_()
        leaves = [x, torch.ones(len(lengths), 40), torch.randn(40, 6), U]
        dy = torch.randn(sum(lengths), 40)
        (actual,) = torch.autograd.grad(elman_rnn(*leaves, batch_sizes=sizes)[0], x, dy)
        output = reference.elman_rnn(*leaves, batch_sizes=sizes)[0]
        (expected,) = torch.autograd.grad(output, x, dy)
        assert expected.isfinite().any()
        assert expected.isnan().any()
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("T", [1, 2])
def test_few_hidden_units_of_many_inputs_on_several_threads(T, dtype):
    """Two threads may cut even four units, where vectors are short."""
    torch.manual_seed(0)
    x, h0 = torch.randn(T, 4096, 64, dtype=dtype), torch.randn(4096, 4, dtype=dtype)
    W, U = torch.randn(4, 64, dtype=dtype) / 8, torch.randn(4, 4, dtype=dtype)
    expected, _ = reference.elman_rnn(x.double(), h0.double(), W.double(), U.double())
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for _ in range(100):
            error = relative_error(elman_rnn(x, h0, W, U)[0], expected)
            assert error < TOLERANCE[dtype]


def test_an_infinite_weight_leaves_the_initial_state_of_a_late_sample_alone():
    W, U = torch.ones(4, 3), torch.randn(4, 4)
    W[0, 0] = float("inf")
    x, sizes = torch.rand(4, 3) + 0.5, torch.tensor([2, 1, 1])
    output = as_reference(x, torch.ones(2, 4), W, U, reverse=True, batch_sizes=sizes)
    assert output.isfinite().all()


@pytest.mark.usefixtures("restored_threads")
def test_results_do_not_depend_on_threads_or_on_the_rest_of_the_batch():
    torch.manual_seed(0)
    x, W, U = torch.randn(9, 23, 40), torch.randn(70, 40), torch.randn(70, 70) / 8
    results = []
    for n in (1, 2, 3, 5):
        torch.set_num_threads(n)
        results.append(elman_rnn(x, None, W, U)[0])
    alone = elman_rnn(x[:, 4:5], None, W, U)[0]
    if functional.backend.use_native("cpu", torch.float32):
        assert all(torch.equal(results[0], other) for other in results[1:])
        assert torch.equal(results[0][:, 4:5], alone)
    torch.testing.assert_close(results[0][:, 4:5], alone)


@to_the_bit
@every_dtype
def test_few_rows_of_few_steps_give_the_bits_that_they_give_in_a_batch(dtype):
    """What is read once or twice is not packed; up to four rows have a path of their own."""
    torch.manual_seed(0)
    shapes = [(1, 150, False), (137, 261, False), (70, 150, True), (16, 528, True)]
    for T, has_h0, (I, H, transposed) in itertools.product((1, 2, 3), (False, True), shapes):
        x, h0 = torch.randn(T, 9, I, dtype=dtype), torch.randn(9, H, dtype=dtype)
        W, U = torch.randn(H, I, dtype=dtype) / I**0.5, torch.randn(H, H, dtype=dtype) / H**0.5
        if transposed:
            W, U = W.t().contiguous().t(), U.t().contiguous().t()
        cotangent = torch.randn(T, 9, H, dtype=dtype)

        def run(n, x=x, h0=h0 if has_h0 else None, W=W, U=U, cotangent=cotangent):
            leaves = [
                None if t is None else t[..., :n, :].clone().requires_grad_() for t in (x, h0)
            ]
            output, h_n = elman_rnn(*leaves, W, U)
            return [output, h_n, *gradients(output, leaves, cotangent[:, :n])]

        in_a_batch = run(9)
        for n in (1, 2, 3, 4, 5):
            for few, all_of_them in zip(run(n), in_a_batch, strict=True):
                assert torch.equal(few, all_of_them[..., :n, :]), (T, has_h0, I, H, n)


@every_dtype
def test_weight_gradients_of_few_rows(dtype):
    """Sums of one or two outer products are written as memory lies, others in tiles."""
    torch.manual_seed(0)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 2e-2)
    for T, B, (I, H) in itertools.product((1, 2, 3), (1, 2, 3), [(1, 150), (137, 261), (40, 8)]):
        x, h0 = torch.randn(T, B, I, dtype=dtype), torch.randn(B, H, dtype=dtype)
        shapes = {(H, I): I, (H, H): H, (H,): 1}
        weights = [torch.randn(shape, dtype=dtype) / n**0.5 for shape, n in shapes.items()]
        weights = [w.requires_grad_() for w in weights]
        cotangent = torch.randn(T, B, H, dtype=dtype)
        actual = gradients(elman_rnn(x, h0, *weights)[0], weights, cotangent)
        exact = [w.detach().double().requires_grad_() for w in weights]
        output, _ = reference.elman_rnn(x.double(), h0.double(), *exact)
        for a, e in zip(actual, gradients(output, exact, cotangent.double()), strict=True):
            assert relative_error(a, e) < tolerance, (T, B, I, H)


def test_one_sequence_without_a_batch_is_a_batch_of_one():
    torch.manual_seed(0)
    x, h0, W, U = (torch.randn(s).double().requires_grad_() for s in [(5, 3), (4,), (4, 3), (4, 4)])
    results = []
    for rows, start in ((x, h0), (x[:, None], h0[None])):
        each = [elman_rnn(rows, start, W, U)]
        each += bidirectional_elman_rnn(rows, (start, W, U), [-start, W / 2, U, None, None])
        outputs = [t.squeeze(-2) if rows is not x else t for output_h_n in each for t in output_h_n]
        loss = sum(t.square().sum() for t in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, (x, h0, W, U))])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_an_empty_batch_gives_empty_results_and_zero_weight_gradients():
    x, W, U = (torch.randn(s, requires_grad=True) for s in [(5, 0, 3), (4, 3), (4, 4)])
    each = [elman_rnn(x, None, W, U), *bidirectional_elman_rnn(x, (None, W, U), (None, 2 * W, U))]
    assert [[t.shape for t in output_h_n] for output_h_n in each] == [[(5, 0, 4), (0, 4)]] * 3
    for output_h_n in each:
        loss = sum(t.sum() for t in output_h_n)
        for grad, leaf in zip(
            gradients(loss, (x, W, U), None, retain_graph=True), (x, W, U), strict=True
        ):
            assert torch.equal(grad, torch.zeros_like(leaf))


# ---- derivatives ---------------------------------------------------------------------------------


def small_problem(packed, with_h0, with_bias):
    torch.manual_seed(0)
    T, B, I, H = 3, 2, 2, 3

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    sizes = torch.tensor([2, 2, 1]) if packed else None
    x = leaf(5, I) if packed else leaf(T, B, I)
    bias = (leaf(H), leaf(H)) if with_bias else (None, None)
    return (x, leaf(B, H) if with_h0 else None, leaf(H, I), leaf(H, H), *bias), sizes


def assert_has_right_derivatives(f, tensors):
    """Of both orders and modes, and batched, as vmap and is_grads_batched need them."""
    options = {"fast_mode": True, "check_batched_grad": True}
    assert gradcheck(f, tensors, check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(f, tensors, check_fwd_over_rev=True, **options)


OPTION_NAMES = ("reverse", "packed", "with_h0", "with_bias")
# Every three of these options in all combinations, and each with every nonlinearity.
NONLINEARITIES_AND_OPTIONS = [
    (NONLINEARITIES[2 * n + m], reverse, packed, m ^ reverse ^ packed == 1, n ^ reverse == 1)
    for n, m in itertools.product([0, 1], repeat=2)
    for reverse, packed in itertools.product([False, True], repeat=2)
]


@pytest.mark.parametrize(("nonlinearity", *OPTION_NAMES), NONLINEARITIES_AND_OPTIONS)
def test_elman_rnn_derivatives_of_both_orders_and_modes(
    nonlinearity, reverse, packed, with_h0, with_bias
):
    tensors, sizes = small_problem(packed, with_h0, with_bias)

    def f(*args):
        return elman_rnn(*args, nonlinearity=nonlinearity, reverse=reverse, batch_sizes=sizes)

    assert_has_right_derivatives(f, tensors)


@pytest.mark.parametrize(OPTION_NAMES[1:], [(False, True, True), (True, False, False)])
def test_derivatives_of_both_directions_at_once_of_both_orders_and_modes(
    packed, with_h0, with_bias
):
    (x, *forward), sizes = small_problem(packed, with_h0, with_bias)
    reverse = [None if t is None else torch.randn_like(t).requires_grad_() for t in forward]

    def f(x, *tensors):
        options = {"nonlinearity": "sigmoid", "batch_sizes": sizes}
        of_each = bidirectional_elman_rnn(x, tensors[:5], tensors[5:], **options)
        return of_each[0] + of_each[1]

    assert_has_right_derivatives(f, (x, *forward, *reverse))


@pytest.mark.parametrize(  # every two of them in every combination
    OPTION_NAMES[:3],
    [(reverse, packed, reverse != packed) for reverse in (False, True) for packed in (False, True)],
)
def test_linear_recurrence_derivatives_of_both_orders_and_modes(reverse, packed, with_h0):
    (x, y0, _, m, *_), sizes = small_problem(packed, with_h0, False)
    shape = (*x.shape[:-1], m.shape[0])
    d = torch.randn(shape, dtype=torch.float64)
    d.view(-1)[::4] = 0  # a closed relu: nothing may be divided by d
    d.requires_grad_()
    g = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def f(d, g, m, y0):
        return linear_recurrence(d, g, m, y0, reverse=reverse, batch_sizes=sizes)

    assert_has_right_derivatives(f, (d, g, m, y0))


# ---- bad input -----------------------------------------------------------------------------------

X, W, U = torch.randn(5, 2, 3), torch.randn(4, 3), torch.randn(4, 4)
STATE, BIAS = torch.randn(2, 4), torch.randn(4)
ONE_DIRECTION = {
    "input": X,
    "h0": STATE,
    "weight_ih": W,
    "weight_hh": U,
    "bias_ih": BIAS,
    "bias_hh": BIAS,
}
# (argument, value, exception, message); see also `misfits` in test_eager_layer.py.
BAD_ARGUMENTS = [
    ("input", [1.0], TypeError, "input: expected a torch.Tensor, got list"),
    ("input", X[..., :2], ValueError, r"input: expected shape \(T, B, 3\), got \(5, 2, 2\)"),
    ("input", X[:, 0, 0], ValueError, r"input: expected shape .* got \(5,\)"),
    ("input", X[:0], ValueError, "input: expected at least one time step"),
    ("input", X.long(), ValueError, "input: expected a dtype among float32"),
    ("h0", STATE[:1], ValueError, r"h0: expected shape \(2, 4\), got \(1, 4\)"),
    ("h0", STATE.double(), ValueError, "h0: expected torch.float32 .* got torch.float64"),
    ("weight_ih", W[:3], ValueError, r"weight_ih: expected shape \(H, I\) with H = 4"),
    ("weight_hh", U[:, :3], ValueError, r"weight_hh: expected shape \(H, H\)"),
    ("weight_hh", U.half(), ValueError, "weight_hh: expected torch.float32"),
    ("bias_ih", BIAS[:3], ValueError, r"bias_ih: expected shape \(4,\), got \(3,\)"),
    ("bias_hh", 1.0, TypeError, "bias_hh: expected a torch.Tensor, got float"),
    ("reverse", "no", TypeError, "reverse: expected a bool, got str"),
    ("nonlinearity", None, TypeError, "nonlinearity: expected a str, got NoneType"),
    ("nonlinearity", b"tanh", TypeError, "nonlinearity: expected a str, got bytes"),
    (
        *("nonlinearity", "gelu", ValueError),
        "nonlinearity: expected one of tanh, relu, sigmoid, identity, softplus; got 'gelu'",
    ),
    ("batch_sizes", torch.tensor([2]), ValueError, r"expected shape \(N, 3\) with batch_sizes"),
]
# Of a tuple of tensors for each direction.
BAD_DIRECTIONS = [
    ("input", X[..., :2], ValueError, r"input: expected shape \(T, B, 3\)"),
    ("nonlinearity", None, TypeError, "nonlinearity: expected a str, got NoneType"),
    ("nonlinearity", "gelu", ValueError, "nonlinearity: expected one of tanh"),
    ("batch_sizes", torch.tensor([2]), ValueError, r"input: expected shape \(N, 3\)"),
    ("reverse", W, TypeError, "reverse: expected a tuple of tensors, got Tensor"),
    ("forward", (None,), ValueError, r"forward: expected \(h0, weight_ih, .* got 1 items"),
    ("forward", (None, W, W), ValueError, r"weight_hh: expected shape \(H, H\)"),
    ("reverse", (None, None, U), TypeError, "weight_ih_reverse: expected a torch.Tensor"),
    ("reverse", (None, U, U), ValueError, r"weight_ih_reverse: .*\(4, 3\), got \(4, 4\)"),
    ("reverse", (None, W, W), ValueError, r"weight_hh_reverse: .*\(4, 4\), got \(4, 3\)"),
    ("reverse", (STATE[:1], W, U), ValueError, r"h0_reverse: .*\(2, 4\), got \(1, 4\)"),
    (
        *("reverse", (None, W, U, BIAS.double()), ValueError),
        "bias_ih_reverse: expected torch.float32 .* got torch.float64",
    ),
]
BAD_BATCH_SIZES = [
    (torch.tensor([2, 1, 2]), "not increasing"),
    (torch.tensor([3, 2, 0]), "positive"),
    (torch.tensor([3, 1]), "add up to the 5 rows of input, got a sum of 4"),
    (torch.tensor([3, 2], dtype=torch.int32), "expected an int64 tensor on the CPU"),
    (torch.tensor(5), "one dimension"),
]
BAD_LINEAR = [
    ("d", torch.zeros(3, 2, 5), ValueError, r"d: expected shape \(3, 2, 4\), got \(3, 2, 5\)"),
    ("m", W, ValueError, r"m: expected shape \(H, H\)"),
    ("y0", STATE[:1], ValueError, r"y0: expected shape \(2, 4\)"),
    # The instruments read f'(z) off h, and take transposes for adjoints.
    (
        *("g", torch.zeros(3, 2, 4, dtype=torch.complex128), ValueError),
        r"g: expected a dtype among .*float16; got torch\.complex128",
    ),
]
CALLS = [
    (elman_rnn, ONE_DIRECTION, BAD_ARGUMENTS),
    (
        bidirectional_elman_rnn,
        {"input": X, "forward": (None, W, U), "reverse": (None, W, U)},
        BAD_DIRECTIONS,
    ),
    (
        elman_rnn,
        ONE_DIRECTION | {"input": X[:, 0], "h0": None},
        [("batch_sizes", sizes, ValueError, message) for sizes, message in BAD_BATCH_SIZES],
    ),
    (
        linear_recurrence,
        {"d": torch.zeros(3, 2, 4), "g": torch.zeros(3, 2, 4), "m": U},
        BAD_LINEAR,
    ),
]


@pytest.mark.parametrize(
    ("function", "arguments", "name", "value", "error", "message"),
    [(function, arguments, *case) for function, arguments, cases in CALLS for case in cases],
)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(
    function, arguments, name, value, error, message
):
    with pytest.raises(error, match=message):
        function(**(arguments | {name: value}))
