"""`GradientFlow` beside others: refusals, errors, copies, other flows, threads and processes."""

import contextlib
import copy
import functools
import gc
import io
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from rnn_cuda import FusedRNN
from rnn_cuda.instruments import GradientFlow
from tests.gradient_flow_scenes import MAIN, Encoder, Scene, assert_close
from tests.unrolled_calls import UnrolledCalls

pytestmark = pytest.mark.usefixtures("one_thread")

OF_TORCH = ("RNN", "LSTM", "GRU")
every_kind = pytest.mark.parametrize("kind", ["RNN", "LSTM", "FusedRNN", "LeakyRNN"])
Flow = functools.partial(GradientFlow, vectors=True)


# ---- what cannot be followed ---------------------------------------------------------------------


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4)

    def forward(self, x):
        return self.rnn(x)[0]


def compiled_inside():
    model = nn.Sequential(FusedRNN(3, 4))
    model[0].compile()
    return model


def parallel():
    model = nn.DataParallel(nn.LSTM(3, 4))
    model.device_ids = [0, 1]
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: 3, TypeError, r"expected a torch\.nn\.Module, got int"),
        (
            lambda: nn.Linear(2, 3),
            ValueError,
            "recurrent layer .*somewhere in it",
        ),
        (lambda: torch.compile(nn.LSTM(3, 4)), ValueError, "it is compiled"),
        (lambda: torch.compile(FusedRNN(3, 4)), ValueError, "it is compiled"),
        (compiled_inside, ValueError, "model: 0 is compiled"),
        (parallel, ValueError, "it is a DataParallel module"),
        (
            lambda: nn.Sequential(torch.jit.script(Part()), nn.GRU(4, 3)),
            ValueError,
            r"0\.rnn is scripted or traced",
        ),
        (
            lambda: nn.Sequential(torch.jit.trace(Part(), torch.randn(5, 2, 3)), nn.GRU(4, 3)),
            ValueError,
            r"0\.rnn is scripted or traced",
        ),
    ],
)
def test_a_model_that_cannot_be_recorded_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        GradientFlow(make())


def own_recurrence(layer, x):
    """Another recurrence than that of the layer's class."""
    state, states = x.new_zeros(x.shape[1], layer.hidden_size), []
    for x_t in x:
        state = torch.tanh(x_t.sum() * layer.weight_hh_l0[: layer.hidden_size, 0] + state)
        states.append(state)
    return torch.stack(states), state[None]


class OtherLayer(FusedRNN):
    def _layer(self, *args):
        output, h_n = super()._layer(*args)
        return 2 * output, 2 * h_n


class OwnTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def another_recurrence(s, layer):
    layer.forward = functools.partial(own_recurrence, layer)
    layer(s.x)


def another_recurrence_as_a_method(s, layer):
    layer.forward = own_recurrence.__get__(layer)
    layer(s.x)


def a_bias_changed_before_the_backward_pass(s, layer):
    loss = s.loss(layer(s.x))
    with torch.no_grad():
        layer.bias_ih_l0.add_(1)  # which autograd does not need again
    loss.backward()


def an_input_changed_before_the_backward_pass(s, layer):
    layer.requires_grad_(False)  # autograd does not need the input again
    x = 1 * s.x
    loss = s.loss(layer(x))
    x.mul_(2)
    loss.backward()


def a_tensor_with_functions_of_its_own(s, layer):
    layer(s.x.as_subclass(OwnTensor))


def a_reentrant_checkpoint(s, layer):
    s.loss(checkpoint(layer, s.x, use_reentrant=True)).backward()


def compiling_inside_the_block(s, layer):
    layer.compile(backend="eager")


def a_block_in_itself(s, layer):
    s.flow.__enter__()


def a_transform(s, layer):
    def loss(parameters):
        return torch.func.functional_call(layer, parameters, s.x)[0].sum()

    torch.func.grad(loss)(dict(layer.named_parameters()))


def a_mapped_backward_pass(s, layer):
    output, _ = layer(s.x)
    cotangents = torch.randn(2, *output.shape).double()
    torch.autograd.grad(output, layer.weight_hh_l0, cotangents, is_grads_batched=True)


def a_full_graph(s, layer):
    torch._dynamo.reset()
    torch.compile(lambda x: s.loss(layer(x)), backend="eager", fullgraph=True)(s.x)


REFUSED = [
    (another_recurrence, MAIN, "encoder"),
    (another_recurrence_as_a_method, MAIN, "encoder"),
    (a_tensor_with_functions_of_its_own, ["LSTM"], "encoder.*OwnTensor"),
    (a_bias_changed_before_the_backward_pass, OF_TORCH, "encoder.*modified by an inplace"),
    (an_input_changed_before_the_backward_pass, OF_TORCH, "encoder.*modified by an inplace"),
    (a_reentrant_checkpoint, MAIN, "encoder .*use_reentrant=False"),
    (a_transform, MAIN, r"encoder under torch\.func"),
    (a_mapped_backward_pass, MAIN, "vmap"),
    (a_full_graph, MAIN, "GradientFlow cannot record|does not support RNN"),
    (compiling_inside_the_block, MAIN, "did not record encoder: it was compiled"),
    (a_block_in_itself, ["LSTM"], "recording already"),
]


@pytest.mark.parametrize(
    ("use", "message", "kind"),
    [
        pytest.param(use, message, kind, id=f"{use.__name__}-{kind}")
        for use, kinds, message in REFUSED
        for kind in kinds
    ],
)
def test_what_cannot_be_followed_is_refused(use, message, kind):
    error = Exception if use is a_full_graph else (RuntimeError, TypeError)
    s = Scene(kind, watcher=Flow)
    with pytest.raises(error, match=message), s.watched() as layer:
        use(s, layer)


@pytest.mark.parametrize("kind", MAIN)
def test_a_subclass_with_another_recurrence_is_refused(kind):
    s = Scene(kind, watcher=Flow)
    own = [type("Own", (s.cls,), {"forward": own_recurrence})]
    for cls in own + [OtherLayer] * (kind == "FusedRNN"):
        message = f"encoder.*{cls.__name__}"
        with pytest.raises((RuntimeError, TypeError), match=message), s.watched(cls) as layer:
            layer(s.x)


@pytest.mark.parametrize("attribute", ["adjoint", "cell_adjoint"])
def test_vectors_that_were_not_asked_for_are_refused(attribute):
    with pytest.raises(RuntimeError, match="vectors=True"):
        getattr(GradientFlow(nn.LSTM(3, 4)), attribute)


@pytest.mark.parametrize("kind", OF_TORCH)
def test_a_recurrence_that_a_subclass_calls_itself_is_recorded(kind):
    def by_hand(module, x):
        zeros = x.new_zeros(module.num_layers, x.shape[1], module.hidden_size)
        hx = (zeros, zeros) if kind == "LSTM" else zeros
        function = getattr(torch, module.mode.lower())
        args = module._flat_weights, True, module.num_layers, 0.0, module.training
        return 2 * function(x, hx, *args, bidirectional=False, batch_first=False)[0]

    def by_torch(module, x):
        return 2 * module.plain_forward(x)[0]

    adjoints = []
    for forward in (by_hand, by_torch):
        s = Scene(kind, watcher=Flow)
        own = type("Own", (s.cls,), {"forward": forward, "plain_forward": s.cls.forward})
        with s.watched(own) as layer:
            s.loss(layer(s.x)).backward()
        adjoints.append(s.flow.adjoint["encoder.l0"])
    assert torch.equal(*adjoints)


class Tenfold(TorchFunctionMode):
    """Scales what torch's recurrences return."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in ("rnn_tanh", "lstm", "gru"):
            return (10 * result[0], *result[1:])
        return result


@pytest.mark.parametrize("kind", OF_TORCH)
def test_what_another_mode_makes_of_a_recurrence_is_outside_of_it(kind):
    s = Scene(kind, watcher=Flow)
    with s.watched() as layer:
        layer(s.x)[0].sum().backward()
        with Tenfold():
            layer(s.x)[0].sum().backward()
            assert torch._C._len_torch_function_stack() == 1
    first, second = s.flow.records
    torch.testing.assert_close(second.adjoint, 10 * first.adjoint)


@pytest.mark.parametrize(("name", "value"), [("leak", 0.9), ("nonlinearity", "relu")])
def test_adjoints_are_of_the_layer_as_it_was_when_it_ran(name, value):
    s = Scene("LeakyRNN", "deep", watcher=Flow)
    with s.watched() as layer:
        loss = s.loss(layer(s.x))
        loss.backward(retain_graph=True)
        setattr(layer, name, value)
        loss.backward()
    for first, second in zip(s.flow.records[::2], s.flow.records[1::2], strict=True):
        assert (first.layer, first.backward, second.backward) == (second.layer, 0, 1)
        assert torch.equal(first.adjoint, second.adjoint)


# ---- compilers -----------------------------------------------------------------------------------


@every_kind
def test_a_compiled_program_records_what_it_runs_eagerly(kind):
    torch._dynamo.reset()
    adjoints = []
    for wrap in (lambda run: run, functools.partial(torch.compile, backend="eager")):
        s = Scene(kind, watcher=Flow)
        with s.watched() as layer:
            wrap(lambda x, s=s, layer=layer: s.loss(layer(x)))(s.x).backward()
        adjoints.append(s.flow.adjoint["encoder.l0"])
    torch.testing.assert_close(*adjoints)


@pytest.mark.parametrize("kind", ["LSTM", "FusedRNN", "LeakyRNN"])
def test_compiled_autograd_is_recorded_right_or_refused_by_name(kind):
    # Not above: it takes seconds, in each of the processes below too.
    from torch._dynamo.compiled_autograd import _enable

    adjoints = []
    for context in (contextlib.nullcontext, _enable):
        s = Scene(kind, watcher=Flow)
        with s.watched() as layer:
            loss = s.loss(layer(s.x))
            is_compiled = context is not contextlib.nullcontext
            with context(*[lambda graph: graph] * is_compiled):
                if is_compiled and kind == "LSTM":
                    message = "cannot record encoder under compiled autograd"
                    with pytest.raises(RuntimeError, match=message):
                        loss.backward()
                    return
                loss.backward()
        adjoints.append(s.flow.adjoint["encoder.l0"])
    assert torch.equal(*adjoints)


# ---- errors --------------------------------------------------------------------------------------


def raising(*_):
    raise KeyError("on purpose")


def a_wrong_input(s, layer):
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.zeros(2, 3, 99, dtype=torch.float64))
    layer.eval()  # no dropout in what follows


def hooks_that_fail_in_the_call(s, layer):
    for register in (layer.register_forward_pre_hook, layer.register_forward_hook):
        with register(raising), pytest.raises(KeyError):
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


def a_second_backward_pass_through_a_freed_graph(s, layer):
    loss = s.loss(layer(s.x))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


FAULTS = [
    a_wrong_input,
    hooks_that_fail_in_the_call,
    a_hook_that_fails_in_the_backward_pass,
    a_weight_changed_before_the_backward_pass,
    a_second_backward_pass_through_a_freed_graph,
]


@every_kind
@pytest.mark.parametrize("fault", FAULTS)
def test_errors_are_those_without_recording_and_what_follows_is_right(fault, kind):
    records = []
    for watcher in (None, UnrolledCalls, Flow):
        s = Scene(kind, watcher=watcher)
        with s.watched(num_layers=2, dropout=0.5) as layer:
            fault(s, layer)
            s.loss(layer(s.x)).backward()
        records.append([r for r in s.flow.records if r.layer == "encoder.l0"] if watcher else [])
    _, unrolled, recorded = records
    assert_close(recorded[-1].adjoint, unrolled[-1].hidden, kind)


def what_can_be_patched(layer):
    """What is set on the layer, on classes of modules and in torch, as it is now."""
    owners = [layer, *type(layer).__mro__[:-1], torch._VF, torch.nn.modules.module, torch]
    return [
        {key: copy.copy(v) if isinstance(v, dict) else v for key, v in vars(owner).items()}
        for owner in owners
    ]


@every_kind
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind_and_nothing_recorded_any_more(kind, fails):
    s = Scene(kind, watcher=Flow)
    layer = s.layer()
    s.loss(layer(s.x)).backward()
    before = what_can_be_patched(layer)
    with contextlib.suppress(KeyError), s.watch(layer):
        s.loss(layer(s.x)).backward()
        if fails:
            raising()
    assert what_can_be_patched(layer) == before
    s.loss(layer(s.x)).backward()
    assert len(s.flow.records) == 1


# ---- copies --------------------------------------------------------------------------------------


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)  # a pickle
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
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


# ---- several flows -------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("order", ["outer_first", "inner_first"])
def test_flows_on_a_model_and_on_its_part_do_not_disturb_each_other(kind, order):
    s = Scene(kind)
    layer = s.layer()
    model = nn.ModuleDict({"encoder": layer, "decoder": s.cls(5, 5, dtype=s.dtype, **s.options)})

    def run():
        output, _ = layer(s.x)
        output.register_hook(lambda g: 2 * g)
        s.loss(model["decoder"](output)).backward()

    with UnrolledCalls(model) as expected:
        run()
    flows = [Flow(model), Flow(model), Flow(layer)]
    for flow in flows:
        flow.__enter__()
    run()
    ending = flows if order == "outer_first" else flows[::-1]
    for flow in ending:
        flow.__exit__(None, None, None)
        run()  # of which those that have ended learn nothing
    assert "_compiled_call_impl" not in vars(layer)
    for flow in flows[:2]:
        first = [r for r in flow.records if r.call == 0]
        for actual, right in zip(first, expected.records, strict=True):
            assert actual.layer == right.layer
            assert_close(actual.adjoint, right.hidden, kind)
    assert flows[2].records[0].layer == "l0"
    assert_close(flows[2].records[0].adjoint, expected.records[0].hidden, kind)
    assert [max(r.call for r in flow.records) for flow in ending] == [0, 1, 2]


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
        for kind in ("LSTM", "FusedRNN", "LeakyRNN"):
            record_wrapped_and_alone(wrap, kind)
    # No wrapped model may outlive the group: the destructor of DistributedDataParallel's would wait
    # for gloo's threads and hold the lock of Python's interpreter, for which these wait.
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_record_what_one_does(tmp_path):
    torch.multiprocessing.spawn(distributed_worker, (str(tmp_path),), nprocs=2)
