"""``torch.compile``, ``torch.export``, AOTInductor and the operators' registrations.

Expected everywhere: what eager mode computes, to the last bits that a compiler may change.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.convert_frame import ConvertFrameAssert
from torch._dynamo.decorators import skip
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.func import grad, hessian, jvp, vmap
from torch.library import opcheck
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rnn_cuda import FusedGRU, FusedRNN, FusedRNNCell
from rnn_cuda.functional import bidirectional_elman_rnn, elman_rnn, linear_recurrence
from rnn_cuda.instruments import GradientFlow
from rnn_cuda.operators.linear_recurrence import LinearRecurrence
from rnn_cuda.remedies import LeakyRNN
from tests.layers import needs_native

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
    assert native_calls(forward) == ["layer_forward"] * 2  # of both layers
    assert native_calls(backward) == ["layer_gradients"] * 2
    # About forty nodes per layer, however long the sequence is.
    assert len(forward.graph.nodes) < 100
    assert len(backward.graph.nodes) < 120


@needs_native
def test_inductor_trains_as_eager_mode_does():
    models = [Regressor(num_layers=1, bidirectional=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    steps = [torch.compile(models[0], fullgraph=True, dynamic=True), models[1]]
    batches = [(torch.randn(T, B, I), torch.randn(B, 1)) for T, B in TIMES_AND_BATCHES]
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
@pytest.mark.parametrize(("with_hx", "bidirectional"), [(False, True), (True, False)])
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


@needs_native
def test_transforms_inside_a_compiled_function_equal_eager_ones():
    x, W, U = torch.randn(4, 3, I), torch.randn(H, I), torch.randn(H, H)
    pair, ones = torch.stack([U, -U]), torch.ones_like(U)

    def f(U):
        return elman_rnn(x, None, W, U)[0].pow(2).sum()

    def run(U, pair):
        products = jvp(f, (U,), (ones,)), jvp(grad(f), (U,), (ones,))
        return grad(f)(U), hessian(f)(U), *products, vmap(f)(pair), vmap(grad(f))(pair)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(U, pair), run(U, pair))


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


# The table of derivatives has the third combination; torch.compile does not support the fourth.
@pytest.mark.parametrize(("use_reentrant", "compiled"), [(True, False), (False, True)])
def test_activation_checkpointing_changes_no_gradient(use_reentrant, compiled):
    model = Regressor()
    x, target = torch.randn(4, 3, I, requires_grad=True), torch.randn(3, 1)
    expected = gradients(model, model(x, target))

    def run(x):
        return checkpoint(model, x, target, use_reentrant=use_reentrant)

    run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    run(x).backward()  # the reentrant variant knows backward() alone
    torch.testing.assert_close(tuple(p.grad for p in model.parameters()), expected)


# ---- torch.compile with graph breaks -------------------------------------------------------------
# What Dynamo cannot trace runs as plain Python, and Dynamo looks at every function called from it.


def packed_loss(model, packed):
    output, h_n = model(packed)
    return output.data.sin().sum() + h_n.pow(2).sum()


def packed_problem(**options):
    """A layer without an initial state, over a packed sequence: Dynamo cannot know its B."""
    rnn = FusedRNN(I, H, dtype=torch.float64, **options)
    sequences = [torch.randn(n, I, dtype=torch.float64) for n in (4, 2, 2)]
    return rnn, pack_sequence(sequences)


@pytest.mark.parametrize(("bidirectional", "compiler"), [(False, "eager"), (True, "inductor")])
def test_a_packed_sequence_without_initial_state_trains_outside_a_full_graph(
    bidirectional, compiler
):
    rnn, packed = packed_problem(bidirectional=bidirectional)
    results = []
    for module in (torch.compile(rnn, backend=compiler), rnn, rnn.to_torch()):
        loss = packed_loss(module, packed)
        results.append((loss, gradients(module, loss)))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[1], results[2])


def after_an_error(f, model, packed):
    try:
        model(packed, torch.zeros(1, 2, 3))
    except RuntimeError:
        return f(model, packed)


def with_hooks(f, model, packed):
    handles = [
        model.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break()),
        model.register_forward_hook(lambda *_: torch._dynamo.graph_break()),
    ]
    try:
        return f(model, packed)
    finally:
        for handle in handles:
            handle.remove()


class Rebuilt(torch.autograd.Function):
    """Differentiates a graph of its own in its backward pass."""

    @staticmethod
    def forward(ctx, scale, f, model, packed):
        with torch.enable_grad():
            ctx.scale = scale.detach().requires_grad_()
            ctx.result = f(model, packed) * ctx.scale
        return ctx.result.detach()

    @staticmethod
    def backward(ctx, cotangent):
        print(end="")
        return (*torch.autograd.grad(ctx.result, ctx.scale, cotangent), None, None, None)


def inside_a_users_function(f, model, packed):
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(Rebuilt.apply(scale, f, model, packed), scale)
    return f(model, packed) * gradient


BREAKS = [after_an_error, with_hooks, inside_a_users_function]


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.__name__)
def test_graph_breaks_change_no_value(broken):
    rnn, packed = packed_problem(bidirectional=True)

    def loss_and_gradients(model, packed):
        loss = broken(packed_loss, model, packed)
        return loss.detach(), gradients(model, loss)

    compiled = torch.compile(loss_and_gradients, backend="aot_eager")
    torch.testing.assert_close(compiled(rnn, packed), loss_and_gradients(rnn.to_torch(), packed))


def cell_loss(model, packed):
    states, state = [], None
    for row in packed.data:
        state = model(row, state)
        print(end="")
        states.append(state)
    return torch.stack(states).sin().sum()


def training_step(loss_of, model, packed):
    """Two steps of an optimizer, the second one with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, packed).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", [FusedRNN, FusedGRU, LeakyRNN, FusedRNNCell])
def test_a_compiled_training_loop_with_breaks_moves_the_weights_as_eager_mode_does(kind):
    _, packed = packed_problem()
    is_cell = kind is FusedRNNCell
    model = kind(I, H, dtype=torch.float64, **({} if is_cell else {"bidirectional": True}))
    # What calls the layer is plain Python, which a break in its middle would come to as well.
    loss_of = torch._dynamo.disable(cell_loss if is_cell else packed_loss, recursive=False)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    expected = training_step(loss_of, model, packed)
    model.load_state_dict(start)
    compiled = torch.compile(training_step, backend="eager")
    torch.testing.assert_close(compiled(loss_of, model, packed), expected)


def double_backward(f, *args):
    first = torch.autograd.grad(f(*args), args, create_graph=True)
    return torch.autograd.grad(sum(g.sin().sum() for g in first), args)


def batched_gradients(f, *args):
    loss = f(*args)
    cotangents = torch.stack([torch.ones_like(loss), 2 * torch.ones_like(loss)])
    return torch.autograd.grad(loss, args, cotangents, is_grads_batched=True)


def tangent(f, *args):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.detach(), t.detach().cos()) for t in args]
        return forward_ad.unpack_dual(f(*duals)).tangent


def shape_on_meta(f, *args):
    with torch.inference_mode():  # where nothing of autograd runs
        return f(*(t.to("meta") for t in args)).shape


DERIVATIVES = {
    "gradient": lambda f, *args: torch.autograd.grad(f(*args), args),
    "second derivative": double_backward,
    "batched gradients": batched_gradients,
    "forward mode": tangent,
    "vmap": lambda f, *args: vmap(f)(*(torch.stack([t, -t]) for t in args)),
    "per-sample gradients": lambda f, *args: vmap(grad(f))(*(torch.stack([t, -t]) for t in args)),
    "Hessian-vector product": lambda f, *args: jvp(grad(f), args, args),
    "meta": shape_on_meta,
}


@pytest.fixture
def traced(monkeypatch):
    """The functions of this package, by file, that Dynamo has tried to trace as they were called.

    Those that it inlines into the trace of another do not count.
    """
    names, convert = set(), ConvertFrameAssert.__call__

    def spy(self, frame, *args, **kwargs):
        code = frame.f_code
        if "/rnn_cuda/" in code.co_filename:
            names.add(f"{os.path.basename(code.co_filename)}: {code.co_qualname}")
        return convert(self, frame, *args, **kwargs)

    monkeypatch.setattr(ConvertFrameAssert, "__call__", spy)
    return names


def native_losses(batch_sizes):
    """Scalar functions of (sequence, W or M, U), each on another operator, run as plain Python."""
    operators = torch.ops.rnn_cuda

    @skip
    def one(x, W, U):
        results = operators.layer_forward(x, [], [W, U], "elman.tanh", "forward", batch_sizes)
        return sum([t.sin().sum() for t in results])

    @skip
    def both(x, W, U):
        weights = [W, U, W, U.mT]
        results = operators.layer_forward(x, [], weights, "elman.tanh", "both", batch_sizes)
        return sum([t.sin().sum() for t in results])

    @skip
    def linear(x, W, U):
        d, g = (x @ W.mT).cos(), x @ W.mT
        return operators.linear_recurrence(d, g, U, None, True, batch_sizes).sin().sum()

    return one, both, linear


@needs_native
@pytest.mark.parametrize(
    ("derive", "packed"),
    [(derive, k % 2 == 1) for k, derive in enumerate(DERIVATIVES.values())],
    ids=DERIVATIVES.keys(),
)
def test_dynamo_traces_no_kernel_and_no_rule(derive, packed, traced):
    batch_sizes = torch.tensor([3, 2, 2]) if packed else None
    shapes = [(7, I) if packed else (4, 3, I), (H, I), (H, H)]
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    losses = native_losses(batch_sizes)

    def run(*args):
        return [skip(derive)(loss, *args) for loss in losses]

    torch.testing.assert_close(torch.compile(run, backend="eager")(*args), run(*args))
    assert not traced


@needs_native
def test_dynamo_does_not_trace_the_way_around_the_dispatcher(traced):
    d, g, m = torch.rand(4, 3, H), torch.rand(4, 3, H), torch.rand(H, H, requires_grad=True)

    @skip
    def run():
        return LinearRecurrence.call(d, g, m, None, False, None)

    compiled = torch.compile(lambda: run(), backend="eager")
    torch.testing.assert_close(compiled(), linear_recurrence(d, g, m))
    assert not traced


@pytest.mark.parametrize("renamed", [False, True])
def test_untraced_functions_stay_untraced_where_pytorch_has_other_names(renamed, monkeypatch):
    from rnn_cuda._dynamo import untraced

    if renamed:
        monkeypatch.delattr(torch._C._dynamo.eval_frame, "set_code_exec_strategy", raising=False)

    def inner(x):
        return x.sin() if torch.compiler.is_compiling() else x.cos()

    def outer(x):
        return inner(x) if torch.compiler.is_compiling() else inner(x).exp()

    x = torch.randn(3)
    call = skip(lambda f: f(x))
    compiled = torch.compile(lambda f: call(f), backend="eager")
    torch.testing.assert_close(compiled(outer), x.sin())
    torch.testing.assert_close(compiled(untraced(outer)), x.cos().exp())


@pytest.mark.parametrize(("bidirectional", "compiler"), [(False, "aot_eager"), (True, "eager")])
def test_compiled_autograd_takes_the_nodes_of_compiled_and_recorded_layers(bidirectional, compiler):
    rnn, packed = packed_problem(bidirectional=bidirectional)
    expected = list(gradients(rnn, packed_loss(rnn, packed)))

    def run_backward(loss):
        rnn.zero_grad()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend=compiler)):
            loss.backward()
        return [parameter.grad for parameter in rnn.parameters()]

    compiled = torch.compile(packed_loss, backend=compiler)
    torch.testing.assert_close(run_backward(compiled(rnn, packed)), expected)
    with GradientFlow(rnn) as flow:
        torch.testing.assert_close(run_backward(packed_loss(rnn, packed)), expected)
    recorded = flow.adjoint_norm
    with GradientFlow(rnn) as flow:
        packed_loss(rnn, packed).backward()
    torch.testing.assert_close(recorded, flow.adjoint_norm, equal_nan=True)


# ---- torch.export --------------------------------------------------------------------------------


def input_and_states(rnn, T, B):
    return torch.randn(T, B, I), torch.randn(rnn.num_layers * 2, B, H)


def export_with_dynamic_shapes(rnn, strict=False):
    time, batch = Dim("time", min=2), Dim("batch", min=2)
    shapes = {"input": {0: time, 1: batch}, "hx": {1: batch}}
    return export(rnn, input_and_states(rnn, 4, 3), dynamic_shapes=shapes, strict=strict)


def assert_runs_as(rnn, program):
    for T, B in TIMES_AND_BATCHES:
        problem = input_and_states(rnn, T, B)
        torch.testing.assert_close(program(*problem), rnn(*problem))


@needs_native
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_saved_and_loaded_serves_every_batch_size_and_length(strict, tmp_path):
    rnn = FusedRNN(I, H, num_layers=2, bidirectional=True)
    program = export_with_dynamic_shapes(rnn, strict)
    torch.export.save(program, tmp_path / "rnn.pt2")
    loaded = torch.export.load(tmp_path / "rnn.pt2")
    assert native_calls(loaded.graph_module) == ["layer_forward"] * 2
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
    problem = input_and_states(rnn, 9, 7)
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

    found = []
    for direction, cell, biases, wants_delta_alone in (
        ("reverse" if packed else "forward", "elman.tanh", 2 * with_state, packed),
        ("both", "elman.relu", 2 * (packed != with_state), not packed),
    ):
        count = 2 if direction == "both" else 1
        shapes = count * [(H, I), (H, H), *[(H,)] * biases]
        states, weights = [leaf(count, 3, H)] if with_state else [], [leaf(*s) for s in shapes]
        lists, options = (leaf(*rows, I), states, weights), (cell, direction, sizes)
        found.append((operators.layer_forward, (*lists, *options)))
        tensors = 1 + len(states) + len(weights)
        wanted = [(i % 3 != 1) == with_state for i in range(tensors)] + [with_state, False]
        if wants_delta_alone:
            wanted = [False] * (tensors + 1) + [True]
        cotangents = [leaf(*rows, count * H), leaf(count, 3, H) if with_state else None]
        arguments = cotangents, *lists, leaf(*rows, count * H), [], *options, wanted
        found.append((operators.layer_gradients, arguments))
    state = leaf(3, H) if with_state else None
    tensors = leaf(*rows, H), leaf(*rows, H), leaf(H, H), state
    return [*found, (operators.linear_recurrence, (*tensors, packed, sizes))]


@needs_native
# Every two of them in every combination; what is composed of the others with gradients.
@pytest.mark.parametrize(
    ("packed", "with_state", "requires_grad"),
    [(False, False, True), (False, True, False), (True, False, False), (True, True, True)],
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


def test_shapes_are_known_without_data():
    for packed in (False, True):
        assert second_derivative_shapes("meta", packed) == second_derivative_shapes("cpu", packed)
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
