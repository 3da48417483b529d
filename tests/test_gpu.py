"""On a GPU: every residency against float64 on the CPU; streams, graphs, devices, errors.

    RNN_CUDA_BACKEND=native pytest -m gpu tests/test_gpu.py

Nothing here runs on the reference: without kernels for CUDA tensors these tests fail.
"""

import random
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn.utils.rnn import pack_padded_sequence

from rnn_cuda import FusedRNN, backend, reference
from rnn_cuda.cuda_plan import plan, plan_override
from rnn_cuda.functional import (
    NONLINEARITIES,
    bidirectional_elman_rnn,
    elman_rnn,
    linear_recurrence,
)

DEVICE, BACKEND = "cuda", "native"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PERSISTENT = ("one_sm", "cluster", "grid")
RESIDENCIES = (*PERSISTENT, "streamed")

# float64 accumulates less than a thousand roundings here, float32 likewise; the half types round
# each state, and each delta, once per step: two units in the last place.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 2 * torch.finfo(torch.float16).eps,
}


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


COMBINATIONS = [
    pytest.param(residency, dtype, id=f"{residency}-{name_of(dtype)}")
    for residency in RESIDENCIES
    for dtype in TOLERANCE
    if residency == "streamed" or dtype != torch.float64
]


@pytest.fixture(autouse=True)
def kernels_only() -> Iterator[None]:
    """Nothing falls back, and float32 is float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with backend.use(BACKEND):
        yield
    torch.set_float32_matmul_precision(before)


def need(residency: str) -> None:
    if residency == "cluster" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this card runs no clusters")


def relative_error(actual, expected):
    actual, expected = actual.detach().cpu().double(), expected.detach()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def both_directions_of_the_reference(x, *tensors, **options):
    run = reference.elman_rnn
    return *run(x, *tensors[:5], **options), *run(x, *tensors[5:], reverse=True, **options)


def both_directions(x, *tensors, **options):
    first, second = bidirectional_elman_rnn(x, tensors[:5], tensors[5:], **options)
    return *first, *second


class Problem:
    """One random layer: on the GPU in some dtype, and in float64 on the CPU.

    In one direction, or in ``both`` at once.
    """

    def __init__(self, seed, dtype, **fixed):
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        # At least three row tiles of every engine, so that a team has several blocks; odd sizes.
        T, B = rng.choice([1, 2, 3, 19, 40]), rng.choice([1, 2, 5, 17, 40])
        I, H = rng.choice([1, 2, 33, 70]), rng.choice([70, 100, 130, 200])
        if T * B * I < 16:
            I = 33  # of few numbers the gradient may cancel to almost nothing, and leave rounding
        drawn = {"T": T, "B": B, "I": I, "H": H}
        T, B, I, H = (fixed.get(name, size) for name, size in drawn.items())
        packed = fixed.get("packed", rng.random() < 0.4)

        def normal(*shape, scale=1.0):
            return (scale * torch.randn(*shape, generator=generator)).to(dtype)

        self.shape = T, B, I, H
        self.dtype = dtype
        self.options = {
            "nonlinearity": fixed.get("nonlinearity", rng.choice(NONLINEARITIES)),
            "reverse": fixed.get("reverse", rng.random() < 0.5),
            "batch_sizes": None,
        }
        rows = (T, B)
        if packed:
            lengths = sorted([T] + [rng.randint(1, T) for _ in range(B - 1)], reverse=True)
            sizes = [sum(n > t for n in lengths) for t in range(T)]
            self.options["batch_sizes"] = torch.tensor(sizes)
            rows = (sum(lengths),)
        # Contracting, or relu and identity leave the range of float16.
        self.tensors = {"x": normal(*rows, I)}
        self.runs, suffixes = (elman_rnn, reference.elman_rnn), [""]
        if fixed.get("both", False):
            del self.options["reverse"]
            self.runs, suffixes = (both_directions, both_directions_of_the_reference), ["", "_r"]
        for suffix in suffixes:
            self.tensors |= {
                f"h0{suffix}": normal(B, H) if rng.random() < 0.5 else None,
                f"W{suffix}": normal(H, I, scale=(I + 1) ** -0.5),
                f"U{suffix}": normal(H, H, scale=0.4 * H**-0.5),
                f"b_ih{suffix}": normal(H) if rng.random() < 0.5 else None,
                f"b_hh{suffix}": normal(H) if rng.random() < 0.5 else None,
            }
        self.cotangents = [normal(*shape) for _ in suffixes for shape in ((*rows, H), (B, H))]

    def leaves(self, device):
        return {
            name: None if tensor is None else tensor.to(device).requires_grad_()
            for name, tensor in self.tensors.items()
        }

    def run(self, device=None):
        """Return outputs and all gradients, by name."""
        leaves = self.leaves(device or DEVICE)
        return self.results(leaves, [c.to(device or DEVICE) for c in self.cotangents])

    def expected(self):
        leaves = {
            name: None if tensor is None else tensor.double().requires_grad_()
            for name, tensor in self.tensors.items()
        }
        return self._results(self.runs[1], leaves, [c.double() for c in self.cotangents])

    def results(self, leaves, cotangents):
        return self._results(self.runs[0], leaves, cotangents)

    def _results(self, run, leaves, cotangents):
        outputs = run(*leaves.values(), **self.options)
        inputs = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        gradients = torch.autograd.grad(outputs, list(inputs.values()), cotangents)
        names = ["output", "h_n", "output_r", "h_n_r"][: len(outputs)]
        names += [f"d{name}" for name in inputs]
        return dict(zip(names, [*outputs, *gradients], strict=True))

    def check(self, found):
        for name, expected in self.expected().items():
            error = relative_error(found[name], expected)
            assert error < TOLERANCE[self.dtype], (name, error, self.shape, self.options)


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("residency", "dtype"), COMBINATIONS)
def test_values_and_gradients_equal_the_float64_reference(residency, dtype, seed):
    need(residency)
    problem = Problem(seed, dtype)
    with plan_override(residency=residency):
        problem.check(problem.run())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("residency", "dtype"), COMBINATIONS)
def test_both_directions_at_once_equal_the_float64_reference(residency, dtype, seed):
    need(residency)
    problem = Problem(seed, dtype, both=True)
    with plan_override(residency=residency):
        problem.check(problem.run())


@pytest.mark.parametrize("residency", PERSISTENT)
def test_both_directions_are_one_launch_each_way(residency):
    need(residency)
    problem = Problem(3, torch.float32, both=True, B=5, H=100)
    with plan_override(residency=residency):
        problem.run()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            problem.run()
            torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if "walk_kernel" in event.name]
    assert len(kernels) == 2, kernels


@pytest.mark.parametrize("residency", PERSISTENT)
def test_an_override_decides_what_the_kernels_run_with(residency):
    need(residency)
    with plan_override(residency=residency):
        assert plan(20, 8, 33, 200, device=DEVICE).residency == residency


@pytest.mark.parametrize("fuse_input", [0, 1])
@pytest.mark.parametrize("residency", PERSISTENT)
def test_the_input_product_may_be_inside_the_kernel_or_before_it(residency, fuse_input):
    need(residency)
    problem = Problem(3, torch.bfloat16, T=19, I=33, H=100)
    with plan_override(residency=residency, fuse_input=fuse_input):
        problem.check(problem.run())


@pytest.mark.parametrize("residency", PERSISTENT)
def test_tf32_is_used_only_where_torch_allows_it(residency):
    need(residency)
    problem = Problem(1, torch.float32, T=40, B=17, I=33, H=200, nonlinearity="tanh", packed=False)
    expected = problem.expected()["output"]
    errors = {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        with plan_override(residency=residency):
            errors[precision] = relative_error(problem.run()["output"], expected)
    assert errors["highest"] < TOLERANCE[torch.float32]
    assert errors["high"] < TOLERANCE[torch.float16]  # both carry ten bits


def test_what_the_planner_chooses_is_right_over_the_sizes_of_studies():
    for T, B, I, H in [(28, 128, 28, 128), (784, 4, 1, 128), (100, 16, 2, 100), (64, 1, 64, 256)]:
        for dtype in (torch.float32, torch.bfloat16):
            problem = Problem(7, dtype, T=T, B=B, I=I, H=H, nonlinearity="tanh", packed=False)
            problem.check(problem.run())


@pytest.mark.parametrize("residency", PERSISTENT)
def test_more_batch_tiles_than_fit_the_card_at_once(residency):
    need(residency)
    problem = Problem(5, torch.float32, T=3, B=1500, I=2, H=100, packed=False)
    with plan_override(residency=residency):
        problem.check(problem.run())


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_the_linear_recurrence_equals_the_reference(residency):
    need(residency)
    generator = torch.Generator().manual_seed(2)
    T, B, H = 19, 5, 130
    d, g = (torch.randn(T, B, H, generator=generator) for _ in range(2))
    m = 0.4 * H**-0.5 * torch.randn(H, H, generator=generator)
    y0 = torch.randn(B, H, generator=generator)
    for reverse in (False, True):
        with plan_override(residency=residency):
            found = linear_recurrence(*(t.to(DEVICE) for t in (d, g, m, y0)), reverse=reverse)
        wide = (t.double() for t in (d, g, m, y0))
        expected = reference.linear_recurrence(*wide, reverse=reverse)
        assert relative_error(found, expected) < TOLERANCE[torch.float32]


def test_float64_passes_gradcheck():
    problem = Problem(0, torch.float64, T=4, B=3, I=2, H=5, nonlinearity="tanh", packed=False)
    leaves = problem.leaves(DEVICE)
    assert gradcheck(
        lambda *tensors: elman_rnn(*tensors, **problem.options), tuple(leaves.values())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_bidirectional_module_equals_torchs_in_float64(layers, packed, dtype):
    torch.manual_seed(4)
    options = {"num_layers": layers, "bidirectional": True, "batch_first": True}
    oracle = nn.RNN(7, 70, **options).to(dtype).double()
    fused = FusedRNN(7, 70, **options).to(DEVICE, dtype)
    fused.load_state_dict(oracle.state_dict())
    x = torch.randn(5, 19, 7).to(dtype)
    wide = x.double()
    x = x.to(DEVICE)
    if packed:
        lengths = torch.tensor([4, 19, 1, 12, 12])
        x, wide = (
            pack_padded_sequence(t, lengths, batch_first=True, enforce_sorted=False)
            for t in (x, wide)
        )
    found, expected = fused(x), oracle(wide)
    pairs = [(found[1], expected[1])]
    outputs = [result[0].data if packed else result[0] for result in (found, expected)]
    pairs.append(tuple(outputs))
    for output in outputs:
        output.square().sum().backward()
    pairs += [
        (p.grad, q.grad) for p, q in zip(fused.parameters(), oracle.parameters(), strict=True)
    ]
    # A layer rounds its input too.
    for actual, wanted in pairs:
        assert relative_error(actual, wanted) < layers * TOLERANCE[dtype]


# ---- what a GPU adds -----------------------------------------------------------------------------


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_results_repeat_to_the_bit(residency):
    need(residency)
    problem = Problem(6, torch.float32, T=40, B=40, H=200)
    with plan_override(residency=residency):
        first = problem.run()
        for _ in range(5):
            again = problem.run()
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_work_waits_for_the_current_stream_and_the_stream_for_it(residency, packed, both):
    need(residency)
    problem = Problem(8, torch.float32, T=19, B=17, H=130, packed=packed, both=both)
    with plan_override(residency=residency):
        expected = problem.run()
        leaves = problem.leaves(DEVICE)
        late = {n: None if t is None else torch.zeros_like(t) for n, t in leaves.items()}
        cotangents = [c.to(DEVICE) for c in problem.cotangents]
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        # Work that went to the default stream would come first on one side and last on the other.
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            with torch.no_grad():
                for name, tensor in leaves.items():
                    if tensor is not None:
                        late[name].copy_(tensor)
            late = {n: None if t is None else t.requires_grad_() for n, t in late.items()}
            found = problem.results(late, cotangents)
            copies = {name: tensor.detach().clone() for name, tensor in found.items()}
        stream.synchronize()
    for name, tensor in expected.items():
        assert torch.equal(copies[name], tensor), name


@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_training_step_can_be_captured_in_a_graph(residency, packed, both):
    need(residency)
    problem = Problem(9, torch.float32, T=19, B=17, I=33, H=130, packed=packed, both=both)
    leaves = problem.leaves(DEVICE)
    cotangents = [c.to(DEVICE) for c in problem.cotangents]

    def step():
        return problem.results(leaves, cotangents)

    with plan_override(residency=residency):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for scale in (1.0, -0.5):  # a replay reads what is there then
            with torch.no_grad():
                leaves["x"].copy_(scale * problem.tensors["x"].to(DEVICE))
            graph.replay()
            expected = step()
            for name, tensor in expected.items():
                assert torch.equal(captured[name], tensor), (name, scale)


@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_nothing_waits_for_the_device(residency, packed, both):
    need(residency)
    problem = Problem(10, torch.float32, T=19, B=5, H=100, packed=packed, both=both)
    leaves = problem.leaves(DEVICE)
    cotangents = [c.to(DEVICE) for c in problem.cotangents]
    with plan_override(residency=residency):
        problem.results(leaves, cotangents)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = problem.results(leaves, cotangents)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    problem.check(found)


def test_memory_comes_from_torchs_allocator_alone():
    problem = Problem(11, torch.float32, T=40, B=40, I=70, H=200, packed=False)

    def outside():
        """Bytes of the card in use that torch does not know of."""
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    for residency in RESIDENCIES:
        if residency == "cluster" and torch.cuda.get_device_capability()[0] < 9:
            continue
        with plan_override(residency=residency):
            problem.run()
            torch.cuda.synchronize()
            before = outside()
            for _ in range(3):
                problem.run()
            torch.cuda.synchronize()
            assert outside() <= before, residency


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_work_runs_where_the_tensors_are(residency):
    need(residency)
    problem = Problem(12, torch.float32)
    with plan_override(residency=residency), torch.cuda.device(0):
        found = problem.run("cuda:1")
        assert torch.cuda.current_device() == 0
    assert {tensor.device.index for tensor in found.values()} == {1}
    problem.check(found)


def test_the_figures_of_this_device_are_those_of_torch():
    properties = torch.cuda.get_device_properties(0)
    figures = torch.ops.rnn_cuda.cuda_device_figures(0)
    assert figures[:2] == [properties.major, properties.minor]
    assert figures[2] == properties.multi_processor_count
    assert figures[3] == properties.shared_memory_per_block_optin
    assert [8, 0] <= figures[6:] <= figures[:2]  # what the kernels were compiled for


# ---- errors --------------------------------------------------------------------------------------


def test_tensors_on_two_devices_are_refused_by_name():
    problem = Problem(13, torch.float32)
    leaves = problem.leaves(DEVICE)
    leaves["U"] = problem.tensors["U"]
    with pytest.raises(ValueError, match="weight_hh"):
        elman_rnn(*leaves.values(), **problem.options)


def test_an_impossible_override_is_refused_by_name():
    problem = Problem(14, torch.float64)
    with plan_override(residency="one_sm"), pytest.raises(ValueError, match="residency"):
        problem.run()


def test_an_error_leaves_the_device_usable():
    problem = Problem(15, torch.float32)
    with plan_override(residency="one_sm", blocks=3), pytest.raises(ValueError, match="blocks"):
        problem.run()
    problem.check(problem.run())
