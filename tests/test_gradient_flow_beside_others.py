"""`GradientFlow` beside others: refusals, errors, copies, other flows, threads and processes."""

import contextlib
import copy
import functools
import gc
import io
import pickle
import threading

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.overrides import TorchFunctionMode

from rnn_cuda.instruments import GradientFlow
from tests.gradient_flow_scenes import (
    MAIN,
    Encoder,
    Scene,
    assert_close,
    assert_records,
    play,
    recorded_equals_unrolled,
)
from tests.unrolled_calls import UnrolledCalls

pytestmark = pytest.mark.usefixtures("one_thread")

every_kind = pytest.mark.parametrize("kind", MAIN)
Flow = functools.partial(GradientFlow, vectors=True)


# ---- what cannot be followed ---------------------------------------------------------------------


def own_recurrence(layer, x):
    """Another recurrence than that of the layer's class."""
    state, states = x.new_zeros(x.shape[1], layer.hidden_size), []
    for x_t in x:
        state = torch.tanh(x_t.sum() * layer.weight_hh_l0[: layer.hidden_size, 0] + state)
        states.append(state)
    return torch.stack(states), state[None]


def overridden_in_a_subclass(s):
    return s.layer(type("Own", (s.cls,), {"forward": own_recurrence}))


def replaced_on_the_instance(s):
    layer = s.layer()
    layer.forward = functools.partial(own_recurrence, layer)
    return layer


def replaced_as_often_done(s):
    layer = s.layer()
    layer.forward = own_recurrence.__get__(layer)
    return layer


@every_kind
@pytest.mark.parametrize(
    "make", [overridden_in_a_subclass, replaced_on_the_instance, replaced_as_often_done]
)
def test_another_recurrence_is_refused_by_name(kind, make):
    s = Scene(kind, watcher=Flow)
    layer = make(s)
    with pytest.raises((RuntimeError, TypeError), match="encoder"), s.watch(layer):
        s.loss(layer(s.x)).backward()


def a_bias_changed_before_the_backward_pass(s):
    layer = s.layer()  # autograd does not need the biases again
    with s.watch(layer):
        loss = s.loss(layer(s.x))
        with torch.no_grad():
            layer.bias_ih_l0.add_(1)
        loss.backward()


def an_input_changed_after_the_call(s):
    layer = s.layer().requires_grad_(False)  # nor the input for frozen weights
    with s.watch(layer):
        x = 1 * s.x
        loss = s.loss(layer(x))
        x.mul_(2)
        loss.backward()


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize(
    "situation",
    [
        a_bias_changed_before_the_backward_pass,
        an_input_changed_after_the_call,
    ],
)
def test_what_can_hardly_be_followed_is_right_or_refused_by_name(situation, kind):
    try:
        play(situation, kind, "dense", Flow)
    except (RuntimeError, TypeError) as error:
        assert "encoder" in str(error)  # noqa: PT017
    else:
        recorded_equals_unrolled(situation, kind)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_a_recurrence_that_a_subclass_calls_itself_is_recorded(kind):
    def by_hand(module, x):
        zeros = x.new_zeros(module.num_layers, x.shape[1], module.hidden_size)
        hx = (zeros, zeros) if kind == "LSTM" else zeros
        function = getattr(torch, module.mode.lower())
        args = module._flat_weights, True, module.num_layers, 0.0, module.training
        return 2 * function(x, hx, *args, bidirectional=False, batch_first=False)[0]

    def by_torch(module, x):
        return 2 * module.plain_forward(x)[0]

    def play_it(forward, s):
        own = type("Own", (s.cls,), {"forward": forward, "plain_forward": s.cls.forward})
        layer = s.layer(own)
        with s.watch(layer):
            s.loss(layer(s.x)).backward()

    scenes = [play(functools.partial(play_it, f), kind, "dense", Flow) for f in (by_hand, by_torch)]
    (mine,), (torchs,) = (scene.flow.records for scene, _ in scenes)
    assert torch.equal(mine.adjoint, torchs.adjoint)


class Tenfold(TorchFunctionMode):
    """Scales what torch's recurrences return."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in ("rnn_tanh", "lstm", "gru"):
            return (10 * result[0], *result[1:])
        return result


class TenfoldTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_what_another_mode_makes_of_a_recurrence_is_outside_of_it(kind):
    s = Scene(kind, watcher=Flow)
    layer = s.layer()
    with contextlib.ExitStack() as stack:
        flow = stack.enter_context(s.watch(layer))
        layer(s.x)[0].sum().backward()
        stack.enter_context(Tenfold())
        layer(s.x)[0].sum().backward()
        assert torch._C._len_torch_function_stack() == 1
    first, second = flow.records
    torch.testing.assert_close(second.adjoint, 10 * first.adjoint)


def test_a_tensor_that_may_change_the_recurrence_is_refused_by_name():
    s = Scene("LSTM", watcher=Flow)
    layer = s.layer()
    with s.watch(layer), pytest.raises(RuntimeError, match=r"encoder.*TenfoldTensor"):
        layer(s.x.as_subclass(TenfoldTensor))


@pytest.mark.parametrize(("name", "value"), [("leak", 0.9), ("nonlinearity", "relu")])
def test_adjoints_are_of_the_layer_as_it_was_when_it_ran(name, value):
    s = Scene("LeakyRNN", "deep", watcher=Flow)
    layer = s.layer()
    with s.watch(layer) as flow:
        loss = s.loss(layer(s.x))
        loss.backward(retain_graph=True)
        setattr(layer, name, value)
        loss.backward()
    for layer_name in {record.layer for record in flow.records}:
        first, second = (r.adjoint for r in flow.records if r.layer == layer_name)
        assert torch.equal(first, second)


@pytest.mark.parametrize("convert", [torch.jit.script, lambda m: torch.jit.trace(m, m.example)])
def test_a_scripted_or_traced_layer_is_refused_by_name(convert):
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(3, 4)

        def forward(self, x):
            return self.rnn(x)[0]

    part = Part()
    part.__dict__["example"] = torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match=r"0\.rnn is scripted or traced"):
        GradientFlow(nn.Sequential(convert(part), nn.GRU(4, 3)))


@every_kind
def test_a_layer_that_is_compiled_inside_the_block_is_no_silent_loss(kind):
    layer = Scene(kind).layer()
    flow = GradientFlow(layer)
    with pytest.raises(RuntimeError, match="did not record the model: it was compiled"), flow:
        layer.compile(backend="eager")


def test_flows_that_end_in_the_order_they_began_leave_nothing():
    layer = nn.LSTM(3, 4)
    first, second = GradientFlow(layer), GradientFlow(layer)
    first.__enter__()
    second.__enter__()
    first.__exit__(None)
    second.__exit__(None)
    assert "_compiled_call_impl" not in vars(layer)


# ---- compilers -----------------------------------------------------------------------------------


@every_kind
def test_a_compiled_program_records_what_it_runs_eagerly_and_has_no_full_graph(kind):
    def adjoint(compile_with):
        torch._dynamo.reset()
        s = Scene(kind, watcher=Flow)
        layer = s.layer()
        with s.watch(layer) as flow:
            loss = torch.compile(lambda x: s.loss(layer(x)), backend="eager", **compile_with)
            loss(s.x).backward()
        return flow.records[0].adjoint

    s = Scene(kind, watcher=Flow)
    layer = s.layer()
    with s.watch(layer) as flow:
        s.loss(layer(s.x)).backward()
    torch.testing.assert_close(adjoint({}), flow.records[0].adjoint)
    with pytest.raises(Exception, match=r"GradientFlow cannot record|does not support RNN"):
        adjoint({"fullgraph": True})


@every_kind
def test_compiled_autograd_is_recorded_right_or_refused_by_name(kind):
    def play_it(backward, s):
        layer = s.layer()
        with s.watch(layer):
            backward(s.loss(layer(s.x)))

    def compiled(loss):
        with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
            loss.backward()

    if kind == "FusedRNN":
        scenes = [
            play(functools.partial(play_it, f), kind, "dense", Flow)
            for f in (compiled, torch.Tensor.backward)
        ]
        first, second = (scene.flow.records[0].adjoint for scene, _ in scenes)
        assert torch.equal(first, second)
    else:
        with pytest.raises(RuntimeError, match="cannot record encoder under compiled autograd"):
            play(functools.partial(play_it, compiled), kind, "dense", Flow)


# ---- errors --------------------------------------------------------------------------------------


def raising(*_):
    raise KeyError("on purpose")


def a_wrong_input(s, layer):
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.zeros(2, 3, 99, dtype=torch.float64))


def a_hook_that_fails_in_the_call(s, layer):
    with layer.register_forward_hook(raising), pytest.raises(KeyError):
        layer(s.x)


def a_pre_hook_that_fails_in_the_call(s, layer):
    with layer.register_forward_pre_hook(raising), pytest.raises(KeyError):
        layer(s.x)


def a_hook_that_fails_in_the_backward_pass(s, layer):
    x = s.x.detach()  # in front of the layer: its gradients were known
    output, _ = layer(x)
    output.register_hook(raising)
    with pytest.raises(KeyError):
        output.sum().backward()


def a_weight_changed_before_the_backward_pass(s, layer):
    loss = s.loss(layer(s.x))
    with torch.no_grad():
        layer.weight_hh_l0.mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    layer.zero_grad()
    s.leaf.grad = None


def a_second_backward_pass_through_a_freed_graph(s, layer):
    loss = s.loss(layer(s.x))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


FAULTS = [
    a_wrong_input,
    a_hook_that_fails_in_the_call,
    a_pre_hook_that_fails_in_the_call,
    a_hook_that_fails_in_the_backward_pass,
    a_weight_changed_before_the_backward_pass,
    a_second_backward_pass_through_a_freed_graph,
]


@every_kind
@pytest.mark.parametrize("fault", FAULTS)
def test_errors_are_those_without_recording_and_what_follows_is_right(fault, kind):
    def run(watcher):
        s = Scene(kind, watcher=watcher)
        layer = s.layer()
        with s.watch(layer):
            fault(s, layer)
            s.loss(layer(s.x)).backward()
        return s

    run(None)
    unrolled, recorded = run(UnrolledCalls), run(Flow)
    last, right = recorded.flow.records[-1], unrolled.flow.records[-1]
    assert_close(last.adjoint, right.hidden, kind)


@every_kind
def test_an_error_in_the_block_ends_the_recording(kind):
    s = Scene(kind, watcher=Flow)
    layer = s.layer()
    with pytest.raises(KeyError), s.watch(layer) as flow:
        raising()
    s.loss(layer(s.x)).backward()
    assert flow.records == []


def what_can_be_patched(layer):
    """What is set on the layer, on classes of modules and in torch, as it is now."""
    owners = [layer, *type(layer).__mro__[:-1], torch._VF, torch.nn.modules.module, torch]
    return [
        {key: copy.copy(v) if isinstance(v, dict) else v for key, v in vars(owner).items()}
        for owner in owners
    ]


@every_kind
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(kind, fails):
    s = Scene(kind, watcher=Flow)
    layer = s.layer()
    s.loss(layer(s.x)).backward()
    before = what_can_be_patched(layer)
    with contextlib.suppress(KeyError), s.watch(layer):
        s.loss(layer(s.x)).backward()
        if fails:
            raising()
    assert what_can_be_patched(layer) == before


# ---- copies --------------------------------------------------------------------------------------


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_made_inside_the_block_is_an_ordinary_module(kind, copied):
    s = Scene(kind, watcher=Flow)
    layer = s.layer()
    plain = copied(layer)
    with s.watch(layer) as flow:
        s.loss(layer(s.x)).backward()
        other = copied(s.model)["encoder"]
        # Torch's recurrent modules copy even their own places for hooks; what is there is None.
        attributes = {name for name, value in vars(other).items() if value is not None}
        assert attributes <= vars(plain).keys()
        assert not any(value for key, value in vars(other).items() if "hooks" in key)
        s.loss(other(s.x)).backward()
        s.loss(copy.copy(layer)(s.x)).backward()
        assert len(flow.records) == 1
        s.loss(layer(s.x)).backward()
    s.loss(other(s.x)).backward()
    first, second = flow.records
    assert torch.equal(first.adjoint, second.adjoint)
    assert [first.call, second.call] == [0, 1]


@every_kind
def test_layers_outside_the_model_are_not_recorded(kind):
    s = Scene(kind, watcher=Flow)
    inside, outside = s.layer(), s.layer()
    with s.watch(inside) as flow:
        s.loss(inside(s.x), outside(s.x)).backward()
    assert [r.layer for r in flow.records] == ["encoder.l0"]


# ---- several flows -------------------------------------------------------------------------------


def two_layers(s):
    layer = s.layer()
    return layer, nn.ModuleDict({"encoder": layer, "decoder": s.cls(5, 5, **s.options)})


def run_both(s, model):
    output, _ = model["encoder"](s.x)
    output.register_hook(lambda g: 2 * g)
    s.loss(model["decoder"](output)).backward()


@every_kind
@pytest.mark.parametrize("order", ["outer_first", "inner_first"])
def test_flows_on_a_model_and_on_its_part_do_not_disturb_each_other(kind, order):
    s = Scene(kind)
    layer, model = two_layers(s)
    with UnrolledCalls(model) as expected:
        run_both(s, model)
    flows = [Flow(model), Flow(model), Flow(layer)]
    for flow in flows:
        flow.__enter__()
    run_both(s, model)
    if order == "inner_first":
        flows.reverse()
    for flow in flows:
        flow.__exit__(None, None, None)
        if flow is not flows[-1]:
            run_both(s, model)  # of which those that have ended learn nothing
    flows.sort(key=lambda flow: len(flow.records[-1].layer), reverse=True)
    for flow in flows[:2]:
        first = [r for r in flow.records if r.call == 0]
        for actual, right in zip(first, expected.records, strict=True):
            assert actual.layer == right.layer
            assert_close(actual.adjoint, right.hidden, kind)
    assert flows[2].records[0].layer == "l0"
    assert_close(flows[2].records[0].adjoint, expected.records[0].hidden, kind)
    calls = sorted(max(r.call for r in flow.records) for flow in flows)
    assert calls == [0, 1, 2]


@every_kind
def test_a_flow_that_is_entered_again_goes_on(kind):
    s = Scene(kind)
    layer = s.layer()
    flow, unrolled = Flow(layer), UnrolledCalls(layer)
    for each in (flow, unrolled):
        for factor in (1, 2):
            with each:
                loss = s.loss(layer(factor * s.x))
            loss.backward()
    assert_records(flow, unrolled)


@every_kind
def test_a_call_made_in_the_block_of_one_flow_may_be_differentiated_in_anothers(kind):
    s = Scene(kind)
    layer = s.layer()
    with Flow(layer) as first:
        loss = s.loss(layer(s.x))
    with Flow(layer) as second:
        loss.backward()
    assert [len(first.records), len(second.records)] == [1, 0]


# ---- threads and processes -----------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("shared", [False, True], ids=["a_flow_each", "one_flow"])
def test_threads_do_not_mix_up_their_calls(kind, shared):
    s = Scene(kind)
    layers = nn.ModuleList(s.layer() for _ in range(2))
    inputs = [s.dense(s.T) for _ in range(2)]

    def train(k):
        for _ in range(5):
            s.loss(layers[k](inputs[k])).backward()

    with UnrolledCalls(layers) as expected:
        train(0)
        train(1)
    failures, barrier = [], threading.Barrier(2)

    def work(k, flow):
        try:
            with flow:
                barrier.wait(60)
                train(k)
                barrier.wait(60)
        except BaseException as error:
            failures.append(error)

    flow = Flow(layers)
    flows = [flow] if shared else [Flow(layer) for layer in layers]
    contexts = [contextlib.nullcontext()] * 2 if shared else flows
    threads = [threading.Thread(target=work, args=(k, contexts[k])) for k in range(2)]
    with flow if shared else contextlib.nullcontext():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    records = [record for flow in flows for record in flow.records]
    assert len(records) == 10
    for actual, right in zip(records, expected.records, strict=True):
        assert_close(actual.adjoint, right.hidden, kind)


def sharded(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def sharded_by_layer(model):
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.layer, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh)


def record_wrapped_and_alone(wrap, kind):
    s, records = Scene(kind, "packed"), []
    model = Encoder(s.layer())
    for wrapped in (model, wrap(copy.deepcopy(model))):
        with GradientFlow(wrapped, vectors=True) as flow:
            s.loss(wrapped(s.x)).backward()
            loss = s.loss(wrapped(s.x))
        loss.backward()
        records.append([r.adjoint.nan_to_num() for r in flow.records])
    assert len(records[0]) == 8, (wrap, kind)
    assert all(map(torch.equal, *records)), (wrap, kind)


def distributed_worker(rank, folder):
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for wrap in (sharded, sharded_by_layer, nn.parallel.DistributedDataParallel):
        for kind in MAIN:
            record_wrapped_and_alone(wrap, kind)
    # No wrapped model may outlive the group: the destructor of DistributedDataParallel's would wait
    # for gloo's threads and hold the lock of Python's interpreter, for which these wait.
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_record_what_one_does(tmp_path):
    torch.multiprocessing.spawn(distributed_worker, (str(tmp_path),), nprocs=2)
