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
    elif rng.random() < 0.3:
        x = torch.randn(B, T, I, dtype=dtype).transpose(0, 1)  # batch_first data, not copied
    else:
        x = torch.randn(T, B, I, dtype=dtype)
    tensors = {
        "x": x,
        "h0": torch.randn(B, H, dtype=dtype) if rng.random() < 0.5 else None,
        "W": torch.randn(H, I, dtype=dtype) / H**0.5,
        "U": torch.randn(H, H, dtype=dtype) / H**0.5,
        "b_ih": torch.randn(H, dtype=dtype) if rng.random() < 0.5 else None,
        "b_hh": torch.randn(H, dtype=dtype) if rng.random() < 0.5 else None,
    }
    return tensors, options


def relative_error(actual, expected):
    scale = expected.norm().clamp_min(1e-30)
    return ((actual.double() - expected).norm() / scale).item()


def widened(tensors):
    """float64 leaves that share no history with ``tensors``; None stays None."""
    return {
        k: None if v is None else v.detach().double().requires_grad_() for k, v in tensors.items()
    }


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


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
        grads = torch.autograd.grad(
            [actual[i] for i in use],
            [v for v in leaves.values() if v is not None],
            [cotangents[i] for i in use],
        )
        expected_grads = torch.autograd.grad(
            [expected[i] for i in use],
            [v for v in wide.values() if v is not None],
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


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.skipif(
    functional.backend.requested() == "emulated"
    or not functional.backend.use_native("cpu", torch.float32),
    reason="two directions may sum in another order; other tests compare within rounding",
)
@pytest.mark.parametrize("dtype", functional.backend.NATIVE_DTYPES, ids=str)
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
                grads = torch.autograd.grad(
                    [outputs[i] for i in used],
                    wanted,
                    [cotangents[i] for i in used],
                    allow_unused=True,
                    materialize_grads=True,
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precisions_round_once_per_step_as_the_reference_does(dtype):
    torch.manual_seed(0)
    T, B, I, H = 12, 5, 7, 33
    x, h0 = torch.randn(T, B, I).to(dtype), torch.randn(B, H).to(dtype)
    W, U = torch.randn(H, I).to(dtype), (torch.randn(H, H) / H**0.5).to(dtype)
    biases = torch.randn(2, H).to(dtype)
    output, h_n = elman_rnn(x, h0, W, U, *biases)
    expected, _ = reference.elman_rnn(x, h0, W, U, *biases)
    # A sum in another order may fall on the other side of a rounding boundary now and then.
    close = torch.isclose(output, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    assert close.all()
    assert (output == expected).float().mean() > 0.98
    assert torch.equal(h_n, output[-1])


@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid"])
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
    assert (actual.double() - exact).abs().max() < 3e-7
    assert actual.abs().max() <= 1
    normal = exact.abs() > 1e-37
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


def test_nan_in_a_relu_or_in_u_spreads_as_in_torch():
    torch.manual_seed(0)
    rnn = torch.nn.RNN(3, 4, nonlinearity="relu")
    weights = list(rnn.parameters())
    x = torch.full((2, 1, 3), float("nan"))
    expected = torch.autograd.grad(rnn(x)[0].sum(), weights)
    output, _ = elman_rnn(x, None, *weights, nonlinearity="relu")
    actual = torch.autograd.grad(output.sum(), weights)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)

    U = torch.full((4, 4), float("nan"))
    assert elman_rnn(torch.randn(1, 2, 3), None, torch.randn(4, 3), U)[0].isnan().all()


@pytest.mark.parametrize("dtype", functional.backend.NATIVE_DTYPES, ids=str)
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


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_an_inf_in_u_meets_the_zeros_of_a_missing_initial_state(value, nonlinearity):
    """Kernels leave that product out, unless it is a NaN; few steps look at U on its way."""
    torch.manual_seed(0)
    for T, B, H in itertools.product((1, 2, 3, 6), (1, 3, 11), (1, 6, 300)):
        x, W, U = torch.randn(T, B, 2), torch.randn(H, 2), torch.randn(H, H) / H
        U[H // 2, H // 3] = value
        for threads, reverse in itertools.product((1, 2), (False, True)):
            torch.set_num_threads(threads)
            options = {"nonlinearity": nonlinearity, "reverse": reverse}
            runs = (elman_rnn, reference.elman_rnn)
            actual, expected = (run(x, None, W, U, **options) for run in runs)
            torch.testing.assert_close(actual, expected, equal_nan=True)


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


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("H", [5, 150])  # 150: enough work for two threads, each with half of U
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_in_u_spreads_from_no_initial_state_as_in_torch(value, H, T):
    torch.manual_seed(0)
    rnn = torch.nn.RNN(3, H)
    rnn.weight_hh_l0.data[H - 1, 2] = value
    x = torch.randn(T, 9, 3)
    expected = rnn(x)[0]
    assert expected[0, :, H - 1].isnan().all()  # zero times what is not finite
    assert expected[0, :, : H - 1].isfinite().all()
    output, _ = elman_rnn(x, None, *rnn.parameters())
    torch.testing.assert_close(output, expected, equal_nan=True)


def test_an_infinite_weight_leaves_the_initial_state_of_a_late_sample_alone():
    W, U = torch.ones(4, 3), torch.randn(4, 4)
    W[0, 0] = float("inf")
    x, sizes = torch.rand(4, 3) + 0.5, torch.tensor([2, 1, 1])
    arguments = (x, torch.ones(2, 4), W, U)
    output, _ = elman_rnn(*arguments, reverse=True, batch_sizes=sizes)
    expected, _ = reference.elman_rnn(*arguments, reverse=True, batch_sizes=sizes)
    torch.testing.assert_close(output, expected)
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


@pytest.mark.parametrize("dtype", functional.backend.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("has_h0", [False, True])
@pytest.mark.parametrize("T", [1, 2, 3])
def test_few_rows_of_few_steps_give_the_bits_that_they_give_in_a_batch(T, has_h0, dtype):
    """What is read once or twice is not packed; up to four rows have a path of their own."""
    if functional.backend.requested() == "emulated" or not functional.backend.use_native(
        "cpu", dtype
    ):
        pytest.skip("the CPU kernel's promise: others may cut another shape in another way")
    torch.manual_seed(0)
    for I, H, transposed in [(1, 150, False), (137, 261, False), (70, 150, True), (16, 528, True)]:
        x = torch.randn(T, 9, I, dtype=dtype)
        h0 = torch.randn(9, H, dtype=dtype) if has_h0 else None
        W, U = torch.randn(H, I, dtype=dtype) / I**0.5, torch.randn(H, H, dtype=dtype) / H**0.5
        if transposed:
            W, U = W.t().contiguous().t(), U.t().contiguous().t()
        seed = torch.randn(T, 9, H, dtype=dtype)

        def run(n, x=x, h0=h0, W=W, U=U, seed=seed):
            inputs = [x[:, :n].clone()] + ([h0[:n].clone()] if has_h0 else [])
            inputs = [tensor.requires_grad_() for tensor in inputs]
            output, h_n = elman_rnn(inputs[0], inputs[1] if has_h0 else None, W, U)
            gradients = torch.autograd.grad(output, inputs, seed[:, :n])
            return [
                output,
                h_n.unsqueeze(0),
                gradients[0],
                *(g.unsqueeze(0) for g in gradients[1:]),
            ]

        in_a_batch = run(9)
        for n in (1, 2, 3, 4, 5):
            for few, all_of_them in zip(run(n), in_a_batch, strict=True):
                assert torch.equal(few, all_of_them[:, :n]), (I, H, n)


@pytest.mark.parametrize("dtype", functional.backend.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("B", [1, 2, 3])
@pytest.mark.parametrize("T", [1, 2, 3])
def test_weight_gradients_of_few_rows(T, B, dtype):
    """Sums of one or two outer products are written as memory lies, others in tiles."""
    torch.manual_seed(0)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 2e-2)
    for I, H in [(1, 150), (137, 261), (40, 8)]:
        x, h0 = torch.randn(T, B, I, dtype=dtype), torch.randn(B, H, dtype=dtype)
        weights = [torch.randn(H, I, dtype=dtype) / I**0.5, torch.randn(H, H, dtype=dtype) / H**0.5]
        weights.append(torch.randn(H, dtype=dtype))
        leaves = [w.requires_grad_() for w in weights]
        seed = torch.randn(T, B, H, dtype=dtype)
        actual = torch.autograd.grad(elman_rnn(x, h0, *leaves)[0], leaves, seed)
        exact = [w.detach().double().requires_grad_() for w in weights]
        expected = torch.autograd.grad(
            reference.elman_rnn(x.double(), h0.double(), *exact)[0], exact, seed.double()
        )
        for a, e in zip(actual, expected, strict=True):
            assert relative_error(a, e) < tolerance, (I, H)


def test_an_expanded_gradient_and_input_need_no_copy_and_give_the_same():
    torch.manual_seed(0)
    W, U = torch.randn(17, 3), torch.randn(17, 17) / 4
    row = torch.randn(3)
    x = row.expand(5, 2, 3)
    grads = []
    for value in (x, x.contiguous()):
        leaf = value.detach().requires_grad_()
        output, _ = elman_rnn(leaf, None, W, U)
        seed = torch.ones(()).expand(output.shape)
        grads.append((output, *torch.autograd.grad(output, leaf, seed)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_one_sequence_without_a_batch():
    torch.manual_seed(0)
    x, h0, W, U = torch.randn(5, 3), torch.randn(4), torch.randn(4, 3), torch.randn(4, 4)
    output, h_n = elman_rnn(x, h0, W, U)
    batched, last = elman_rnn(x[:, None], h0[None], W, U)
    assert torch.equal(output, batched[:, 0])
    assert torch.equal(h_n, last[0])
    of_each = bidirectional_elman_rnn(x, (h0, W, U), (-h0, W / 2, U))
    batched_of_each = bidirectional_elman_rnn(
        x[:, None], (h0[None], W, U), [-h0[None], W / 2, U, None, None]
    )
    for (output, h_n), (batched, last) in zip(of_each, batched_of_each, strict=True):
        assert torch.equal(output, batched[:, 0])
        assert torch.equal(h_n, last[0])


def test_an_empty_batch_gives_empty_results_and_zero_weight_gradients():
    W, U = torch.randn(4, 3, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    output, h_n = elman_rnn(torch.randn(5, 0, 3), None, W, U)
    assert output.shape == (5, 0, 4)
    assert h_n.shape == (0, 4)
    for grad, weight in zip(torch.autograd.grad(output.sum(), (W, U)), (W, U), strict=True):
        assert torch.equal(grad, torch.zeros_like(weight))
    x = torch.randn(5, 0, 3, requires_grad=True)
    of_each = bidirectional_elman_rnn(x, (None, W, U), (None, 2 * W, 2 * U))
    assert [[t.shape for t in each] for each in of_each] == [[(5, 0, 4), (0, 4)]] * 2
    loss = sum(t.sum() for each in of_each for t in each)
    for grad, leaf in zip(torch.autograd.grad(loss, (x, W, U)), (x, W, U), strict=True):
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

    assert gradcheck(f, tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, tensors, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize(
    OPTION_NAMES[1:], [(False, True, True), (True, False, False), (True, True, True)]
)
def test_derivatives_of_both_directions_at_once_of_both_orders_and_modes(
    packed, with_h0, with_bias
):
    (x, *forward), sizes = small_problem(packed, with_h0, with_bias)
    reverse = [None if t is None else torch.randn_like(t).requires_grad_() for t in forward]

    def f(x, *tensors):
        options = {"nonlinearity": "sigmoid", "batch_sizes": sizes}
        of_each = bidirectional_elman_rnn(x, tensors[:5], tensors[5:], **options)
        return of_each[0] + of_each[1]

    tensors = (x, *forward, *reverse)
    options = {"fast_mode": True}
    assert gradcheck(f, tensors, check_forward_ad=True, check_batched_grad=True, **options)
    assert gradgradcheck(f, tensors, check_fwd_over_rev=True, **options)


@pytest.mark.parametrize(OPTION_NAMES[:3], list(itertools.product([False, True], repeat=3)))
def test_linear_recurrence_derivatives_of_both_orders_and_modes(reverse, packed, with_h0):
    (x, y0, _, m, *_), sizes = small_problem(packed, with_h0, False)
    shape = (*x.shape[:-1], m.shape[0])
    d = torch.randn(shape, dtype=torch.float64)
    d.view(-1)[::4] = 0  # a closed relu: nothing may be divided by d
    d.requires_grad_()
    g = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def f(d, g, m, y0):
        return linear_recurrence(d, g, m, y0, reverse=reverse, batch_sizes=sizes)

    assert gradcheck(f, (d, g, m, y0), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, (d, g, m, y0), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_a_third_derivative_equals_the_reference(nonlinearity):
    (x, h0, W, U, b_ih, b_hh), _ = small_problem(False, True, True)
    direction = torch.randn_like(U)

    def third(run):
        value = run(x, h0, W, U, b_ih, b_hh, nonlinearity=nonlinearity)[0].pow(3).sum()
        for _ in range(2):
            (grad,) = torch.autograd.grad(value, U, create_graph=True)
            value = (grad * direction).sum()
        return torch.autograd.grad(value, (x, U))

    for got, want in zip(third(elman_rnn), third(reference.elman_rnn), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# ---- bad input -----------------------------------------------------------------------------------


def good_arguments():
    return {
        "input": torch.randn(5, 2, 3),
        "h0": torch.randn(2, 4),
        "weight_ih": torch.randn(4, 3),
        "weight_hh": torch.randn(4, 4),
        "bias_ih": torch.randn(4),
        "bias_hh": torch.randn(4),
    }


BAD_ARGUMENTS = [
    ({"input": [1.0]}, TypeError, "input: expected a torch.Tensor, got list"),
    (
        {"input": torch.randn(5, 2, 7)},
        ValueError,
        r"input: expected shape \(T, B, 3\), got \(5, 2, 7\)",
    ),
    ({"input": torch.randn(5)}, ValueError, r"input: expected shape .* got \(5,\)"),
    ({"input": torch.randn(0, 2, 3)}, ValueError, "input: expected at least one time step"),
    (
        {"input": torch.ones(5, 2, 3, dtype=torch.int64)},
        ValueError,
        "input: expected a dtype among float32",
    ),
    ({"h0": torch.randn(3, 4)}, ValueError, r"h0: expected shape \(2, 4\), got \(3, 4\)"),
    (
        {"h0": torch.randn(2, 4).double()},
        ValueError,
        "h0: expected torch.float32 .* got torch.float64",
    ),
    (
        {"weight_ih": torch.randn(5, 3)},
        ValueError,
        r"weight_ih: expected shape \(H, I\) with H = 4",
    ),
    ({"weight_hh": torch.randn(4, 5)}, ValueError, r"weight_hh: expected shape \(H, H\)"),
    ({"weight_hh": torch.randn(4, 4).half()}, ValueError, "weight_hh: expected torch.float32"),
    ({"bias_ih": torch.randn(5)}, ValueError, r"bias_ih: expected shape \(4,\), got \(5,\)"),
    ({"reverse": "no"}, TypeError, "reverse: expected a bool, got str"),
    ({"bias_hh": 1.0}, TypeError, "bias_hh: expected a torch.Tensor, got float"),
    (
        {"nonlinearity": "gelu"},
        ValueError,
        "nonlinearity: expected one of tanh, relu, sigmoid, identity; got 'gelu'",
    ),
    (
        {"batch_sizes": torch.tensor([2])},
        ValueError,
        r"input: expected shape \(N, 3\) with batch_sizes",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(change, error, message):
    with pytest.raises(error, match=message):
        elman_rnn(**(good_arguments() | change))


W, U = torch.randn(4, 3), torch.randn(4, 4)
BAD_DIRECTIONS = [
    ({"reverse": W}, TypeError, "reverse: expected a tuple of tensors, got Tensor"),
    ({"forward": (None,)}, ValueError, r"forward: expected \(h0, weight_ih, .* got 1 items"),
    ({"forward": (None, W, W)}, ValueError, r"weight_hh: expected shape \(H, H\)"),
    ({"reverse": (None, None, U)}, TypeError, "weight_ih_reverse: expected a torch.Tensor"),
    (
        {"reverse": (None, U, U)},
        ValueError,
        r"weight_ih_reverse: expected shape \(4, 3\), got \(4, 4\)",
    ),
    (
        {"reverse": (None, W, torch.randn(5, 5))},
        ValueError,
        r"weight_hh_reverse: expected shape \(4, 4\), got \(5, 5\)",
    ),
    (
        {"reverse": (torch.randn(1, 4), W, U)},
        ValueError,
        r"h0_reverse: expected shape \(2, 4\), got \(1, 4\)",
    ),
    (
        {"reverse": (None, W, U, torch.randn(4).double())},
        ValueError,
        "bias_ih_reverse: expected torch.float32 .* got torch.float64",
    ),
    ({"nonlinearity": "gelu"}, ValueError, "nonlinearity: expected one of tanh"),
    ({"input": torch.randn(5, 2, 7)}, ValueError, r"input: expected shape \(T, B, 3\)"),
    ({"batch_sizes": torch.tensor([2])}, ValueError, r"input: expected shape \(N, 3\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_DIRECTIONS)
def test_a_bad_argument_of_either_direction_is_named(change, error, message):
    arguments = {"input": torch.randn(5, 2, 3), "forward": (None, W, U), "reverse": (None, W, U)}
    with pytest.raises(error, match=message):
        bidirectional_elman_rnn(**(arguments | change))


@pytest.mark.parametrize(
    ("batch_sizes", "message"),
    [
        (torch.tensor([2, 1, 2]), "not increasing"),
        (torch.tensor([3, 2, 0]), "positive"),
        (torch.tensor([3, 1]), "add up to the 5 rows of input, got a sum of 4"),
        (torch.tensor([3, 2], dtype=torch.int32), "expected an int64 tensor on the CPU"),
        (torch.tensor(5), "one dimension"),
    ],
)
def test_bad_batch_sizes_are_refused(batch_sizes, message):
    arguments = good_arguments() | {"input": torch.randn(5, 3), "h0": None}
    with pytest.raises(ValueError, match=message):
        elman_rnn(**arguments, batch_sizes=batch_sizes)


def test_linear_recurrence_names_bad_arguments():
    g, m = torch.randn(3, 2, 4), torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"d: expected shape \(3, 2, 4\), got \(3, 2, 5\)"):
        linear_recurrence(torch.randn(3, 2, 5), g, m)
    with pytest.raises(ValueError, match=r"m: expected shape \(H, H\)"):
        linear_recurrence(g, g, torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"y0: expected shape \(2, 4\)"):
        linear_recurrence(g, g, m, torch.randn(1, 4))
