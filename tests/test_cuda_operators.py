"""The operators of the CUDA kernels, by every kind of plan, against float64.

They run on the emulated kernels, or on a GPU; test_cuda_operators_emulated.py runs them from a
session with another backend.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import rnn_cuda
from rnn_cuda import FusedRNN, backend, functional, reference
from rnn_cuda.functional import NONLINEARITIES, bidirectional_elman_rnn, elman_rnn
from rnn_cuda.instruments import GradientFlow
from rnn_cuda.operators.layer_gradients import gradients_by_parts
from tests.test_functional import batch_sizes_of, relative_error, widened

EMULATED = backend.requested() == "emulated"
only_emulated = pytest.mark.skipif(
    not EMULATED, reason="a GPU counts no launches, chooses its schedule, fails on no demand"
)
DEVICE = "cpu" if EMULATED else "cuda"

if not EMULATED and not torch.cuda.is_available():
    pytest.skip("needs RNN_CUDA_BACKEND=emulated, or a GPU", allow_module_level=True)

HALVES = (torch.bfloat16, torch.float16)
# In half precision: as far as rounding each state once lets them.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
TOLERANCE |= {dtype: 4 * torch.finfo(dtype).eps for dtype in HALVES}

# For H = 70: five row tiles in float32, three in half precision. Every residency, both numbers of
# columns, warps that share rows, a batch tile of several column groups, fused input and not.
FLOAT32_PLANS = [
    "residency=one_sm,engine_columns=1,columns=1",
    "residency=one_sm,engine_columns=4,columns=8,row_warps=2,depth_split=3,fuse_input=1",
    "residency=one_sm,engine_columns=1,columns=3,row_warps=3,fuse_input=0",
    "residency=cluster,blocks=2,engine_columns=4",
    "residency=cluster,blocks=5,engine_columns=1,depth_split=2,fuse_input=1",
    "residency=cluster,blocks=3,columns=4,engine_columns=4,row_warps=1,fuse_input=0",
    "residency=grid,blocks=2,engine_columns=4,fuse_input=1",
    "residency=grid,blocks=5,engine_columns=1,columns=2,fuse_input=0",
    "residency=streamed",
]
HALF_PLANS = [
    "residency=one_sm,engine_columns=8,row_warps=3,fuse_input=0",
    "residency=one_sm,engine_columns=32,row_warps=1,depth_split=5,fuse_input=1",
    "residency=cluster,blocks=3,engine_columns=8,columns=16,fuse_input=1",
    "residency=cluster,blocks=2,engine_columns=32,depth_split=2",
    "residency=grid,blocks=3,engine_columns=8",
    "residency=grid,blocks=2,engine_columns=32,fuse_input=0",
    "residency=streamed",
]
PLANS = [(torch.float32, text) for text in FLOAT32_PLANS]
PLANS += [(dtype, text) for dtype in HALVES for text in HALF_PLANS]
PLANS += [(torch.float64, "residency=streamed")]
every_plan = pytest.mark.parametrize(
    ("dtype", "text"), PLANS, ids=[f"{str(d).removeprefix('torch.')}-{p}" for d, p in PLANS]
)
T, B, I, H = 6, 11, 9, 70
LENGTHS = [6, 6, 5, 3, 3, 3, 2, 1, 1, 1, 1]


def problem(dtype: torch.dtype, packed: bool, seed: int) -> tuple[dict, torch.Tensor | None]:
    """Tensors of an Elman layer, in the order of `elman_rnn`, and batch_sizes."""
    torch.manual_seed(seed)
    sizes = batch_sizes_of(LENGTHS) if packed else None
    tensors = {
        "x": torch.randn(sum(LENGTHS), I) if packed else torch.randn(T, B, I),
        "h0": torch.randn(B, H) if seed % 3 else None,
        "W": torch.randn(H, I) / I**0.5,
        "U": torch.randn(H, H) / H**0.5,
        "b_ih": torch.randn(H) if seed % 2 else None,
        "b_hh": torch.randn(H),
    }
    placed = {k: None if v is None else v.to(DEVICE, dtype) for k, v in tensors.items()}
    return placed, sizes


LAYOUTS = list(itertools.product([False, True], repeat=2))  # packed, reverse


@every_plan
def test_values_and_gradients_equal_the_float64_reference(dtype, text):
    with rnn_cuda.plan_override(text):
        for seed, (packed, reverse) in enumerate(LAYOUTS):
            tensors, sizes = problem(dtype, packed, seed)
            options = {
                "nonlinearity": NONLINEARITIES[seed],
                "reverse": reverse,
                "batch_sizes": sizes,
            }
            leaves = {k: None if v is None else v.requires_grad_() for k, v in tensors.items()}
            wide = widened(tensors)
            actual = elman_rnn(*leaves.values(), **options)
            expected = reference.elman_rnn(*wide.values(), **options)
            cotangents = [torch.randn_like(out) for out in actual]
            inputs = [v for v in leaves.values() if v is not None]
            grads = torch.autograd.grad(actual, inputs, cotangents)
            wide_inputs = [v for v in wide.values() if v is not None]
            expected_grads = torch.autograd.grad(
                expected, wide_inputs, [c.double() for c in cotangents]
            )
            names = ["output", "h_n", *(f"d{k}" for k, v in leaves.items() if v is not None)]
            for name, got, want in zip(
                names, [*actual, *grads], [*expected, *expected_grads], strict=True
            ):
                error = relative_error(got, want)
                assert error < TOLERANCE[dtype], (name, error, packed, options)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("text", HALF_PLANS)
def test_half_precisions_round_once_per_step_as_the_reference_does(dtype, text):
    for packed, reverse in LAYOUTS:
        tensors, sizes = problem(dtype, packed, 1)
        with rnn_cuda.plan_override(text):
            output, _ = elman_rnn(*tensors.values(), reverse=reverse, batch_sizes=sizes)
        expected, _ = reference.elman_rnn(*tensors.values(), reverse=reverse, batch_sizes=sizes)
        close = torch.isclose(output, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
        assert close.all()
        assert (output == expected).float().mean() > 0.98


@every_plan
def test_the_linear_recurrence_equals_the_float64_reference(dtype, text):
    for seed, (packed, reverse) in enumerate(LAYOUTS):
        torch.manual_seed(seed)
        sizes = batch_sizes_of(LENGTHS) if packed else None
        shape = (sum(LENGTHS), H) if packed else (T, B, H)
        d, g = torch.rand(shape), torch.randn(shape)
        m, y0 = torch.randn(H, H) / H**0.5, torch.randn(B, H) if seed % 2 else None
        args = [None if a is None else a.to(DEVICE, dtype) for a in (d, g, m.T, y0)]
        wide = [None if a is None else a.double() for a in args]
        with rnn_cuda.plan_override(text):
            got = functional.linear_recurrence(*args, reverse=reverse, batch_sizes=sizes)
        want = reference.linear_recurrence(*wide, reverse=reverse, batch_sizes=sizes)
        assert relative_error(got, want) < TOLERANCE[dtype], (packed, reverse)


# ---- all gradients at once -----------------------------------------------------------------------


def gradient_arguments(dtype: torch.dtype, packed: bool, direction: str, seed: int = 0) -> list:
    """Arguments of layer_gradients, but `wanted`."""
    count, nonlinearity = 1 + (direction == "both"), NONLINEARITIES[seed % 4]
    x = problem(dtype, packed, seed)[0]["x"]
    weights, outputs, starts, final_states = [], [], [], []
    for d in range(count):
        tensors, sizes = problem(dtype, packed, seed + d)
        _, h0, W, U, *_ = tensors.values()
        if count == 2 and h0 is None:
            h0 = torch.zeros(B, H, device=DEVICE, dtype=dtype)
        options = {"nonlinearity": nonlinearity, "batch_sizes": sizes}
        reverse = direction == "reverse" or d == 1
        output, h_n = reference.elman_rnn(x, h0, W, U, reverse=reverse, **options)
        weights += [W, U]
        outputs.append(output)
        starts.append(h0)
        final_states.append(h_n)
    output, final = torch.cat(outputs, -1), torch.stack(final_states)
    states = [] if starts[0] is None else [torch.stack(starts)]
    grads = [torch.randn_like(output), torch.randn_like(final)]
    return [grads, x, states, weights, output, [], f"elman.{nonlinearity}", direction, sizes]


def operator(*args):
    with torch.no_grad():
        return torch.ops.rnn_cuda.layer_gradients(*args)


def in_float64(args):
    to_double = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    return tree_map_only(torch.Tensor, to_double, args)


def wanting(args, *, only=()):
    """The argument `wanted`: everything, or these places from the end."""
    count = 1 + len(args[2]) + len(args[3]) + 2
    return [not only or i - count in only for i in range(count)]


NORMS, DELTA = -2, -1


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_every_choice_of_gradients_leaves_the_others_out(direction):
    args = gradient_arguments(torch.float64, packed=True, direction=direction, seed=1)
    everything = gradients_by_parts(*args, wanting(args))
    count = len(everything)
    choices = [[i] for i in range(count)] + [
        [j for j in range(count) if j != i] for i in range(count)
    ]
    for chosen in choices:
        got = operator(*args, [i in chosen for i in range(count)])
        expected = [everything[i] for i in chosen]
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@every_plan
def test_the_norms_of_the_adjoints_are_those_of_float64(dtype, text):
    choices = itertools.product(["forward", "reverse", "both"], [False, True])
    for seed, (direction, packed) in enumerate(choices):
        args = gradient_arguments(dtype, packed, direction, seed)
        wanted = wanting(args, only=[NORMS])
        with rnn_cuda.plan_override(text):
            (norms,) = operator(*args, wanted)
        with rnn_cuda.plan_override("residency=streamed"):
            (exact,) = gradients_by_parts(*in_float64(args), wanted)
        assert norms.dtype == torch.float64
        assert norms.shape == (1 + (direction == "both"), *args[4].shape[:-1])
        assert ((norms - exact).abs() / exact).max() < TOLERANCE[dtype], (packed, direction)


@every_plan
def test_norms_do_not_vanish_before_the_adjoint_does(dtype, text):
    steps = 140  # each halves the adjoint, exactly
    U = torch.eye(H)[torch.randperm(H)].to(DEVICE, dtype) / 2
    states = torch.zeros(steps, 1, H, device=DEVICE, dtype=dtype)
    x, W = states[..., :1], torch.zeros(H, 1, device=DEVICE, dtype=dtype)
    grad_h_n = torch.ones(1, 1, H, device=DEVICE, dtype=dtype)
    args = [[None, grad_h_n], x, [], [W, U], states, [], "elman.tanh", "forward", None]
    with rnn_cuda.plan_override(text):
        norms = operator(*args, wanting(args, only=[NORMS]))[0][0].flip(0)[:, 0]
    normal = steps if dtype != torch.float16 else 14
    expected = H**0.5 * 0.5 ** torch.arange(steps, dtype=torch.float64, device=DEVICE)
    smallest = torch.finfo(dtype).tiny
    kept = expected[:normal] / H**0.5 > smallest
    torch.testing.assert_close(norms[:normal][kept], expected[:normal][kept], rtol=1e-6, atol=0)


# ---- both directions at once ---------------------------------------------------------------------


def launches_of(f, *args, **kwargs):
    """Return the result, and how many kernels were launched (None on a GPU)."""
    if not EMULATED:
        return f(*args, **kwargs), None
    before = torch.ops.rnn_cuda.emulated_launches()
    result = f(*args, **kwargs)
    return result, torch.ops.rnn_cuda.emulated_launches() - before


@every_plan
def test_both_directions_equal_the_float64_reference_in_one_launch_each_way(dtype, text):
    for seed, packed in enumerate((False, True)):
        tensors, sizes = problem(dtype, packed, seed)  # one direction with h0, and with two biases
        x, *forward = tensors.values()
        _, *reverse = problem(dtype, packed, seed + 1)[0].values()
        options = {"nonlinearity": NONLINEARITIES[seed], "batch_sizes": sizes}
        everything = [x, *forward, *reverse]
        leaves = [t.requires_grad_() for t in everything if t is not None]
        wide = [None if t is None else t.detach().double().requires_grad_() for t in everything]
        run = reference.elman_rnn
        expected = [*run(wide[0], *wide[1:6], **options)]
        expected += run(wide[0], *wide[6:], reverse=True, **options)
        cotangents = [torch.randn_like(t).to(dtype) for t in expected]
        expected += torch.autograd.grad(
            expected, [t for t in wide if t is not None], [c.double() for c in cotangents]
        )
        with rnn_cuda.plan_override(text):
            of_each, launches = launches_of(bidirectional_elman_rnn, x, forward, reverse, **options)
            outputs = [t for each in of_each for t in each]
            grads, backward_launches = launches_of(torch.autograd.grad, outputs, leaves, cotangents)
        for i, (got, want) in enumerate(zip([*outputs, *grads], expected, strict=True)):
            assert relative_error(got, want) < TOLERANCE[dtype], (i, packed)
        if "streamed" in text:
            assert launches in (2 * T, None)
        else:
            assert launches in (1, None)
        assert backward_launches == launches


@only_emulated
@pytest.mark.parametrize("recorded", [False, True])
def test_a_bidirectional_module_is_one_launch_each_way(recorded):
    rnn = FusedRNN(I, H, bidirectional=True)
    with GradientFlow(rnn if recorded else FusedRNN(I, H)) as flow:
        (output, _), launches = launches_of(rnn, torch.randn(T, B, I))
        _, backward_launches = launches_of(output.sum().backward)
    assert launches == 1
    # With norms, one more for each direction, which adds up the parts.
    assert backward_launches == (3 if recorded else 1)
    assert list(flow.adjoint_norm) == (["l0", "l0_reverse"] if recorded else [])


@only_emulated
@pytest.mark.parametrize("directions", [1, 2])
def test_the_plan_of_both_directions_is_what_a_module_runs_with(directions, monkeypatch):
    sizes = (64, 64, 64, 512)  # where the plans of one and of two directions differ
    plan = rnn_cuda.plan(*sizes, directions=directions, device=DEVICE)
    other = rnn_cuda.plan(*sizes, directions=3 - directions, device=DEVICE)
    fields = ("residency", "fuse_input", "blocks", "columns", "row_warps", "depth_split")
    words = [{name: getattr(p, name) for name in fields} for p in (plan, other)]
    assert words[0] != words[1]
    time_steps, batch, inputs, hidden = sizes
    rnn = FusedRNN(inputs, hidden, bidirectional=directions == 2)
    monkeypatch.setenv("RNN_CUDA_EMULATOR_SCHEDULE", "sideways")  # the error names the plan
    with torch.no_grad(), pytest.raises(RuntimeError, match="The plan was") as caught:
        rnn(torch.randn(time_steps, batch, inputs))
    for name, value in words[0].items():
        value = int(value) if isinstance(value, bool) else value
        assert f"{name}={value}" in str(caught.value)


# ---- edges ---------------------------------------------------------------------------------------


@every_plan
def test_one_step_one_sample_and_a_batch_beyond_a_tile(dtype, text):
    tensors, _ = problem(dtype, False, 1)
    for steps, batch in ((1, 1), (2, 1), (1, 35), (3, 35)):
        tensors["x"] = torch.randn(steps, batch, I, device=DEVICE).to(dtype)
        tensors["h0"] = torch.randn(batch, H, device=DEVICE).to(dtype)
        with rnn_cuda.plan_override(text):
            got = elman_rnn(*tensors.values())
        want = reference.elman_rnn(*[t.double() for t in tensors.values()])
        for actual, expected in zip(got, want, strict=True):
            assert relative_error(actual, expected) < TOLERANCE[dtype], (steps, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_number_of_hidden_units_and_inputs(dtype):
    rng = random.Random(0)
    for hidden in (1, 2, 7, 16, 31, 33, 64, 129):
        inputs = rng.choice([1, 5, 33, 64])
        x = torch.randn(3, 4, inputs, device=DEVICE).to(dtype)
        W = (torch.randn(hidden, inputs, device=DEVICE) / inputs**0.5).to(dtype)
        U = (torch.randn(hidden, hidden, device=DEVICE) / hidden**0.5).to(dtype)
        for reverse in (False, True):
            got, _ = elman_rnn(x, None, W, U, reverse=reverse)
            want, _ = reference.elman_rnn(x.double(), None, W.double(), U.double(), reverse=reverse)
            assert relative_error(got, want) < TOLERANCE[dtype], (hidden, inputs)


def test_an_input_without_features_leaves_the_bias():
    U, b = torch.randn(H, H, device=DEVICE) / 8, torch.randn(H, device=DEVICE)
    x, W = torch.zeros(T, B, 0, device=DEVICE), torch.zeros(H, 0, device=DEVICE)
    for text in ("residency=one_sm", "residency=cluster,blocks=5", "residency=streamed"):
        with rnn_cuda.plan_override(text):
            got, _ = elman_rnn(x, None, W, U, b)
        want, _ = reference.elman_rnn(x, None, W, U, b)
        torch.testing.assert_close(got, want)


def test_an_empty_batch_gives_empty_results_and_zero_weight_gradients():
    W = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    U = torch.randn(4, 4, device=DEVICE, requires_grad=True)
    output, h_n = elman_rnn(torch.randn(5, 0, 3, device=DEVICE), None, W, U)
    assert output.shape == (5, 0, 4)
    assert h_n.shape == (0, 4)
    for grad, weight in zip(torch.autograd.grad(output.sum(), (W, U)), (W, U), strict=True):
        assert torch.equal(grad, torch.zeros_like(weight))


@pytest.mark.parametrize("text", ["residency=one_sm", "residency=cluster,blocks=2,fuse_input=0"])
def test_memory_layout_does_not_matter(text):
    for direction in ("forward", "both"):
        args = gradient_arguments(torch.float32, packed=False, direction=direction, seed=1)
        leaves, spec = tree_flatten([*args, wanting(args)])

        def run(leaves, spec=spec):
            changed = tree_unflatten(leaves, spec)
            forward = torch.ops.rnn_cuda.layer_forward(*changed[1:4], *changed[6:9])
            return [*forward, *operator(*changed)]

        with rnn_cuda.plan_override(text), torch.no_grad():
            expected = run(leaves)
            for i, leaf in enumerate(leaves):
                if not isinstance(leaf, torch.Tensor):
                    continue
                others = [torch.stack([leaf, leaf], dim=-1)[..., 0], leaf.mT.contiguous().mT]
                if leaf.dim() == 3:  # batch first
                    others.append(leaf.transpose(0, 1).contiguous().transpose(0, 1))
                for other in others:
                    actual = run([*leaves[:i], other, *leaves[i + 1 :]])
                    torch.testing.assert_close(actual, expected)
            row = torch.randn(leaves[0].shape[-1], device=DEVICE)
            expanded = row.expand(T, B, -1)
            actual = run([expanded, *leaves[1:]])
            torch.testing.assert_close(actual, run([expanded.contiguous(), *leaves[1:]]))


@pytest.mark.parametrize("text", FLOAT32_PLANS[:1] + FLOAT32_PLANS[3:4] + FLOAT32_PLANS[-1:])
def test_nan_and_infinity_spread_as_in_the_reference(text):
    tensors, sizes = problem(torch.float32, True, 1)
    tensors["x"][3, 0] = float("nan")
    tensors["W"][0, 1] = float("inf")
    for reverse, h0 in itertools.product([False, True], [tensors["h0"], None]):
        tensors["h0"] = h0
        with rnn_cuda.plan_override(text):
            got, _ = elman_rnn(*tensors.values(), reverse=reverse, batch_sizes=sizes)
        want, _ = reference.elman_rnn(*tensors.values(), reverse=reverse, batch_sizes=sizes)
        torch.testing.assert_close(got, want, equal_nan=True)
    U = torch.full((4, 4), float("nan"), device=DEVICE)
    with (
        rnn_cuda.plan_override(text.partition(",")[0])
        if "cluster" not in text
        else (rnn_cuda.plan_override("residency=one_sm"))
    ):
        x, W = torch.randn(1, 2, 3, device=DEVICE), torch.randn(4, 3, device=DEVICE)
        assert elman_rnn(x, None, W, U)[0].isnan().all()


@only_emulated
@pytest.mark.parametrize("schedule", ["descending", "random:7", "starving:3"])
def test_results_do_not_depend_on_which_thread_runs_first(schedule, monkeypatch):
    for dtype, text in (PLANS[1], PLANS[4], PLANS[7], PLANS[11], PLANS[13]):
        args = gradient_arguments(dtype, packed=True, direction="reverse", seed=1)
        with rnn_cuda.plan_override(text):
            monkeypatch.delenv("RNN_CUDA_EMULATOR_SCHEDULE", raising=False)
            expected = operator(*args, wanting(args))
            monkeypatch.setenv("RNN_CUDA_EMULATOR_SCHEDULE", schedule)
            actual = operator(*args, wanting(args))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), text


# ---- settings and errors -------------------------------------------------------------------------


def test_float32_is_float32_unless_torch_allows_tf32():
    tensors, _ = problem(torch.float32, False, 1)
    want, _ = reference.elman_rnn(*[None if t is None else t.double() for t in tensors.values()])
    before = torch.backends.cuda.matmul.fp32_precision
    errors = {}
    try:
        for setting in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = setting
            chosen = "arithmetic=tf32," if setting == "tf32" else ""
            for place in ("one_sm", "cluster,blocks=3", "grid,blocks=3"):
                with rnn_cuda.plan_override(f"{chosen}residency={place},fuse_input=1"):
                    got, _ = elman_rnn(*tensors.values())
                errors[setting, place] = relative_error(got, want)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for (setting, place), error in errors.items():
        if setting == "ieee":
            assert error < 1e-6, place
        else:
            assert 1e-5 < error < 2e-3, place  # TF32 keeps ten bits


def test_an_impossible_override_is_an_error_that_names_its_field():
    tensors, _ = problem(torch.float32, False, 1)
    with (
        rnn_cuda.plan_override(residency="cluster", blocks=17),
        pytest.raises(ValueError, match="plan override: blocks=17: a cluster of this device"),
    ):
        elman_rnn(*tensors.values())
    with (
        rnn_cuda.plan_override(residency="grid"),
        pytest.raises(ValueError, match="residency=grid: float64 has no persistent kernel"),
    ):
        elman_rnn(*[t.double() for t in tensors.values()])


@only_emulated
def test_a_launch_that_fails_names_the_plan(monkeypatch):
    tensors, _ = problem(torch.float32, False, 1)
    monkeypatch.setenv("RNN_CUDA_EMULATOR_SCHEDULE", "sideways")
    with (
        rnn_cuda.plan_override("residency=cluster,blocks=5,columns=2"),
        pytest.raises(
            RuntimeError,
            match=r"launching a kernel failed: .*sideways.*The plan was residency=cluster,"
            r"arithmetic=fma,fuse_input=\d,blocks=5,columns=2,.*RNN_CUDA_PLAN",
        ),
    ):
        elman_rnn(*tensors.values())


BAD_TENSORS = [
    ({"x": torch.zeros(T, B, I + 1)}, r"weight_ih must have shape \[70, 10\], got \[70, 9\]"),
    ({"h0": torch.zeros(B + 1, H)}, r"the initial state must have shape \[1, 11, 70\]"),
    ({"U": torch.zeros(H, H + 1)}, r"weight_hh must have shape \(H, H\)"),
    ({"W": torch.zeros(H, I, dtype=torch.float64)}, "weight_ih must be float on .* got Double"),
    ({"b_hh": torch.zeros(H + 1)}, r"a bias must be Float \(70\)"),
    ({"x": torch.zeros(0, B, I)}, "expected at least one time step"),
    ({"x": torch.zeros(T, B, I, dtype=torch.int64)}, "expected a tensor of float32, float64"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS, ids=lambda v: str(v)[:20])
def test_the_operator_itself_names_a_bad_tensor(change, message):
    tensors, _ = problem(torch.float32, False, 1)
    del tensors["b_ih"]
    for name, value in change.items():
        tensors[name] = value.to(DEVICE)
    backend.use_native(DEVICE, torch.float32)  # loads the operators
    x, h0, *weights = tensors.values()
    states = [] if h0 is None else [h0.unsqueeze(0)]
    with pytest.raises(RuntimeError, match=f"rnn_cuda: {message}"):
        torch.ops.rnn_cuda.layer_forward(x, states, weights, "elman.tanh", "forward", None)


def test_the_plan_of_this_device_is_to_be_had():
    chosen = rnn_cuda.plan(T, B, I, H, device=DEVICE)
    assert chosen.residency in ("one_sm", "cluster")
