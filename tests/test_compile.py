"""``torch.compile``, ``torch.export``, AOTInductor and the operators' registrations.

Expected everywhere: what eager mode computes, to the last bits that a compiler may change.
"""

import functools
import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.func import grad, hessian, jvp, vmap
from torch.library import opcheck
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rnn_cuda import FusedRNN, backend
from rnn_cuda.functional import bidirectional_elman_rnn, elman_rnn

NATIVE = backend.use_native("cpu", torch.float32)
needs_native = pytest.mark.skipif(
    not NATIVE,
    reason="asserts properties of the native operators, and the reference is the active backend",
)
pytestmark = pytest.mark.usefixtures("one_thread")

I, H = 6, 5
# Sizes are distinct from each other and from I and H: equal ones would share a symbol.
TIMES_AND_BATCHES = [(4, 3), (9, 7), (13, 2)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Regressor(nn.Module):
    """An RNN, with two bidirectional layers by default, and a read-out of the last step."""

    def __init__(self, num_layers=2, bidirectional=True):
        super().__init__()
        self.rnn = FusedRNN(I, H, num_layers=num_layers, bidirectional=bidirectional)
        self.head = nn.Linear(2 * H if bidirectional else H, 1)

    def forward(self, x, target):
        output, h_n = self.rnn(x)
        return (self.head(output[-1]) - target).pow(2).mean() + h_n.pow(2).mean()


def gradients(module, loss):
    return torch.autograd.grad(loss, list(module.parameters()))


def native_calls(graph_module):
    return [
        node.target.overloadpacket.__name__
        for node in graph_module.graph.nodes
        if getattr(node.target, "namespace", None) == "rnn_cuda"
    ]


# ---- torch.compile -------------------------------------------------------------------------------


@needs_native
def test_one_graph_serves_every_batch_size_and_length_and_holds_no_time_steps():
    model, recorder = Regressor(), AotEagerAndRecordGraphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=recorder)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T, B in TIMES_AND_BATCHES:
            x, target = torch.randn(T, B, I), torch.randn(B, 1)
            loss, expected = compiled(x, target), model(x, target)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(gradients(model, loss), gradients(model, expected))
    (forward,), (backward,) = recorder.fw_graphs, recorder.bw_graphs
    assert native_calls(forward) == ["elman_forward_pair"] * 2  # of both layers
    assert native_calls(backward) == ["elman_gradients_pair"] * 2
    # About forty nodes per layer, however long the sequence is.
    assert len(forward.graph.nodes) < 100
    assert len(backward.graph.nodes) < 120


def test_a_training_step_compiles_for_static_shapes():
    model, counter = Regressor(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    x, target = torch.randn(4, 3, I), torch.randn(3, 1)
    for _ in range(2):
        loss, expected = compiled(x, target), model(x, target)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(model, loss), gradients(model, expected))
    assert counter.frame_count == 1


def test_inductor_trains_as_eager_mode_does():
    models = [Regressor(num_layers=1, bidirectional=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    steps = [torch.compile(models[0], fullgraph=True, dynamic=NATIVE), models[1]]
    batches = [
        (torch.randn(T, B, I), torch.randn(B, 1))
        for T, B in (TIMES_AND_BATCHES if NATIVE else TIMES_AND_BATCHES[:1])
    ]
    losses = []
    for model, step in zip(models, steps, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for x, target in batches:
            optimizer.zero_grad()
            loss = step(x, target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(list(model.parameters()) for model in models))


@needs_native
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
def test_one_graph_serves_every_packed_sequence(with_hx, bidirectional):
    rnn = FusedRNN(I, H, bidirectional=bidirectional)
    compiled = torch.compile(rnn, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in [(4, 3, 1), (8, 8, 2, 1, 1, 1, 1), (9, 3)]:
            packed = pack_sequence([torch.randn(n, I) for n in lengths])
            hx = torch.randn(1 + bidirectional, len(lengths), H) if with_hx else None
            results = []
            for module in (compiled, rnn):
                output, h_n = module(packed, hx)
                loss = output.data.pow(2).sum() + h_n.sum()
                results.append((output.data, h_n, gradients(rnn, loss)))
            torch.testing.assert_close(*results)


@needs_native
def test_a_wrong_initial_state_of_a_packed_sequence_is_still_refused_when_compiled():
    packed = pack_sequence([torch.randn(n, I) for n in (4, 3, 1)])
    compiled = torch.compile(FusedRNN(I, H), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="initial state must have shape"):
        compiled(packed, torch.zeros(1, 2, H))


FUNCTIONAL = {
    "grad": lambda f, U: grad(f)(U),
    "Hessian-vector product": lambda f, U: jvp(grad(f), (U,), (torch.ones_like(U),)),
    "hessian": lambda f, U: hessian(f)(U),
    "jvp": lambda f, U: jvp(f, (U,), (torch.ones_like(U),)),
    "vmap": lambda f, U: vmap(f)(torch.stack([U, -U])),
    "per-sample grad": lambda f, U: vmap(grad(f))(torch.stack([U, -U])),
}


@needs_native
@pytest.mark.parametrize("transform", FUNCTIONAL.values(), ids=FUNCTIONAL.keys())
def test_transforms_inside_a_compiled_function_equal_eager_ones(transform):
    x, W, U = torch.randn(4, 3, I), torch.randn(H, I), torch.randn(H, H)

    def f(U):
        return elman_rnn(x, None, W, U)[0].pow(2).sum()

    run = functools.partial(transform, f)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(U), run(U))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_dual_numbers_inside_a_compiled_function_keep_their_tangents(compiler):
    x, W = torch.randn(4, 3, I), torch.randn(H, I)
    U, tangent = torch.randn(H, H), torch.randn(H, H)

    def run(U, tangent):
        with forward_ad.dual_level():
            output, _ = elman_rnn(x, None, W, forward_ad.make_dual(U, tangent))
            return forward_ad.unpack_dual(output).tangent

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(U, tangent), run(U, tangent))


def test_a_second_derivative_of_a_compiled_function_is_refused_by_torch_not_wrong():
    x, W = torch.randn(4, 3, I), torch.randn(H, I)
    U = torch.randn(H, H, requires_grad=True)
    compiled = torch.compile(
        lambda U: elman_rnn(x, None, W, U)[0].sum(), fullgraph=True, backend="aot_eager"
    )
    (gradient,) = torch.autograd.grad(compiled(U), U, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()


# torch.compile does not support the reentrant variant.
@pytest.mark.parametrize(
    ("use_reentrant", "compiled"), [(False, False), (True, False), (False, True)]
)
def test_activation_checkpointing_changes_no_gradient(use_reentrant, compiled):
    model = Regressor()
    x, target = torch.randn(4, 3, I, requires_grad=True), torch.randn(3, 1)

    def checkpointed(x):
        return checkpoint(model, x, target, use_reentrant=use_reentrant)

    if compiled:
        checkpointed = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    results = []
    for run in (checkpointed, lambda x: model(x, target)):
        model.zero_grad()
        run(x).backward()  # the reentrant variant knows backward() alone
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results)


# ---- torch.export --------------------------------------------------------------------------------


def states_of(rnn, batch):
    return torch.randn(rnn.num_layers * 2, batch, H)


def export_with_dynamic_shapes(rnn, strict=False):
    time, batch = Dim("time", min=2), Dim("batch", min=2)
    example = (torch.randn(4, 3, I), states_of(rnn, 3))
    shapes = {"input": {0: time, 1: batch}, "hx": {1: batch}}
    return export(rnn, example, dynamic_shapes=shapes, strict=strict)


def assert_runs_as(rnn, program):
    for T, B in TIMES_AND_BATCHES:
        x, hx = torch.randn(T, B, I), states_of(rnn, B)
        torch.testing.assert_close(program(x, hx), rnn(x, hx))


@needs_native
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_saved_and_loaded_serves_every_batch_size_and_length(strict, tmp_path):
    rnn = FusedRNN(I, H, num_layers=2, bidirectional=True)
    program = export_with_dynamic_shapes(rnn, strict)
    torch.export.save(program, tmp_path / "rnn.pt2")
    loaded = torch.export.load(tmp_path / "rnn.pt2")
    assert native_calls(loaded.graph_module) == ["elman_forward_pair"] * 2
    assert_runs_as(rnn, loaded.module())
    assert_runs_as(rnn, loaded.run_decompositions().module())


@needs_native
@pytest.mark.slow
def test_an_aotinductor_package_serves_every_batch_size_and_length(tmp_path):
    rnn = FusedRNN(I, H, bidirectional=True)
    with torch.no_grad():
        program = export_with_dynamic_shapes(rnn)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "rnn.pt2"))
    assert_runs_as(rnn, torch._inductor.aoti_load_package(path))

    # A process that knows nothing of the model loads the operators, then the package.
    problem = torch.randn(9, 7, I), states_of(rnn, 7)
    torch.save((problem, rnn(*problem)), tmp_path / "problem.pt")
    subprocess.run([sys.executable, "-c", LOAD, path, tmp_path / "problem.pt"], check=True)


LOAD = """
import sys
import torch
from rnn_cuda import backend

assert backend.use_native("cpu", torch.float32)
problem, expected = torch.load(sys.argv[2])
torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[1])(*problem), expected)
"""


# ---- registrations -------------------------------------------------------------------------------


def operator_arguments(packed, with_state, requires_grad):
    """Each operator with arguments that fit it."""
    operators = torch.ops.rnn_cuda
    sizes = torch.tensor([3, 2, 2]) if packed else None
    rows = (7,) if packed else (4, 3)

    def leaf(*shape):
        return torch.randn(shape, requires_grad=requires_grad)

    W, U, b = leaf(H, I), leaf(H, H), leaf(H)
    wanted = [packed, with_state, True, not packed, not with_state, packed != with_state]
    state = leaf(3, H) if with_state else None
    states, cotangent = leaf(*rows, H), leaf(*rows, H) if packed else None
    if cotangent is None and state is None:
        cotangent = leaf(*rows, H)
    found = [
        (operators.elman_forward, (leaf(*rows, I), state, W, U, b, "tanh", packed, sizes)),
        (operators.elman_backward, (cotangent, state, states, U, "sigmoid", packed, sizes)),
        (
            operators.elman_gradients,
            (cotangent, state, leaf(*rows, I), state, W, U, states, "relu", packed, sizes, wanted),
        ),
        (operators.linear_recurrence, (states, leaf(*rows, H), U, state, packed, sizes)),
    ]
    if packed != with_state:  # two kinds are enough of what is composed of the others
        return found
    return [
        *found,
        (
            operators.elman_forward_pair,
            (leaf(*rows, I), state, W, U, b, None, leaf(H, I), leaf(H, H), b, "relu", sizes),
        ),
        (
            operators.elman_gradients_pair,
            (
                leaf(*rows, I),
                *(cotangent, state, state, W, U, states),
                *(None, leaf(3, H), state, leaf(H, I), leaf(H, H), leaf(*rows, H)),
                *("tanh", sizes, [*wanted, *reversed(wanted[1:])]),
            ),
        ),
    ]


@needs_native
@pytest.mark.parametrize(
    ("packed", "with_state", "requires_grad"), list(itertools.product([False, True], repeat=3))
)
def test_opcheck_passes_all_four_of_its_tests(packed, with_state, requires_grad):
    for operator, arguments in operator_arguments(packed, with_state, requires_grad):
        outcome = opcheck(operator.default, arguments)
        assert outcome == {
            "test_schema": "SUCCESS",
            "test_autograd_registration": "SUCCESS",
            "test_faketensor": "SUCCESS",
            "test_aot_dispatch_dynamic": "SUCCESS",
        }


def second_derivative_shapes(device, packed):
    rnn = FusedRNN(I, H, num_layers=2, bidirectional=True, device=device)
    x = torch.randn(7, I, device=device) if packed else torch.randn(4, 3, I, device=device)
    input = PackedSequence(x, torch.tensor([3, 2, 2])) if packed else x
    output, h_n = rnn(input)
    output = output.data if packed else output
    first = torch.autograd.grad(output.sum() + h_n.sum(), rnn.weight_hh_l0, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), rnn.weight_ih_l1)[0]
    assert second.device.type == device
    return [tuple(t.shape) for t in (output, h_n, first, second)]


@pytest.mark.parametrize("packed", [False, True])
def test_shapes_are_known_without_data_on_the_meta_device(packed):
    assert second_derivative_shapes("meta", packed) == second_derivative_shapes("cpu", packed)


def test_shapes_are_known_without_data_under_fake_tensors():
    expected = second_derivative_shapes("cpu", False)
    with FakeTensorMode():
        assert second_derivative_shapes("cpu", False) == expected


# ---- FLOP counts ---------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("packed", [False, True])
def test_flops_are_those_of_the_matrix_products(packed):
    T, B = 4, 3
    sizes = torch.tensor([3, 3, 2, 1]) if packed else None
    rows = int(sizes.sum()) if packed else T * B
    later_rows = rows - B  # those with a step before them
    x = torch.randn((rows, I) if packed else (T, B, I), requires_grad=True)
    W = torch.randn(H, I, requires_grad=True)
    U = torch.randn(H, H, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        output, _ = elman_rnn(x, None, W, U, batch_sizes=sizes)
    assert forward.get_total_flops() == 2 * rows * H * (I + H)
    with FlopCounterMode(display=False) as both:
        bidirectional_elman_rnn(x, (None, W, U), (None, W, U), batch_sizes=sizes)
    assert both.get_total_flops() == 2 * forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(output.sum(), (x, W, U))
    recurrence, input_and_weight = 2 * rows * H * H, 2 * 2 * rows * H * I
    assert backward.get_total_flops() == recurrence + input_and_weight + 2 * later_rows * H * H
