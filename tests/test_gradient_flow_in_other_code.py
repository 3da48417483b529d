"""`GradientFlow` in other people's code: what their hooks, subclasses and wrappers do to gradients.

The contract: the adjoint recorded is dL/dh_t of the underlying layer. What enters and leaves its
recurrence counts, after all hooks, whoever set them and when. What cannot be followed raises and
names the module; no value is wrong or missing.

A situation is a function of a `Scene` (tests/gradient_flow_scenes.py). What GradientFlow records is
compared with the same program's unrolled recurrences, and all else with the program without it.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.func import functional_call
from torch.nn.functional import dropout, layer_norm, relu
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rnn_cuda.instruments import GradientFlow
from tests.gradient_flow_scenes import (
    KINDS,
    MAIN,
    VARIANTS,
    Encoder,
    H,
    I,
    Scene,
    data_of,
    mapped,
    recorded_equals_unrolled,
    states_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

HOOKED = ("dense", "batch_first", "packed", "two_steps")
SITUATIONS = {}


def situation(
    function=None,
    *,
    kinds=MAIN,
    variants=("dense",),
    name=None,
    all_pairs=False,
    records_nothing=False,
):
    """Add a function to the table of situations.

    It is played with each kind of layer and with each variant, but not with all pairs of these
    unless they are asked for. The pairs are others from one situation to the next.
    """
    if function is None:
        return functools.partial(
            situation,
            kinds=kinds,
            variants=variants,
            name=name,
            all_pairs=all_pairs,
            records_nothing=records_nothing,
        )
    name = name or function.__name__
    assert name not in SITUATIONS
    function.records_nothing = records_nothing
    kinds, variants, first = list(kinds), list(variants), len(SITUATIONS)
    pairs = [
        (kinds[k % len(kinds)], variants[(first + k) % len(variants)])
        for k in range(max(len(kinds), len(variants)))
    ]
    SITUATIONS[name] = function, list(itertools.product(kinds, variants)) if all_pairs else pairs
    return function


def cases():
    return [
        pytest.param(function, kind, variant, id=f"{name}-{kind}-{variant}")
        for name, (function, pairs) in SITUATIONS.items()
        for kind, variant in pairs
    ]


# ---- nothing special -----------------------------------------------------------------------------


@situation(kinds=KINDS, variants=VARIANTS, all_pairs=True)
def a_plain_call(s):
    layer = s.layer()
    with s.watch(layer):
        s.loss(layer(s.x)).backward()


# ---- 1. tensor hooks -----------------------------------------------------------------------------

twice_plus_one = lambda g: 2 * g + 1  # noqa: E731


@situation(kinds=KINDS, variants=VARIANTS)
def a_hook_on_the_output_that_zeroes_the_gradient(s):
    layer = s.layer()
    with s.watch(layer):
        output, _ = layer(s.x)
        data_of(output).register_hook(lambda g: 0 * g)
        s.loss(output).backward()


@situation(variants=HOOKED)
def hooks_on_every_result(s):
    layer = s.layer()
    with s.watch(layer):
        output, state = layer(s.x)
        for k, tensor in enumerate((data_of(output), *states_of(state))):
            tensor.register_hook(lambda g, k=k: (k + 2) * g)
        s.loss(output, state).backward()


@situation(variants=HOOKED)
def a_hook_set_after_the_block(s):
    layer = s.layer()
    with s.watch(layer):
        output, state = layer(s.x)
    data_of(output).register_hook(twice_plus_one)
    s.loss(output, state).backward()


@situation(variants=HOOKED)
def several_hooks_in_order_one_of_them_removed(s):
    layer = s.layer()
    with s.watch(layer):
        data = data_of(layer(s.x)[0])
        data.register_hook(twice_plus_one)
        removed = data.register_hook(lambda g: 100 * g)
        data.register_hook(lambda g: g.clamp(-0.5, 1))
        removed.remove()
        s.loss(data).backward()


@situation(variants=HOOKED)
def hooks_on_views_of_the_results(s):
    layer = s.layer()
    with s.watch(layer):
        output, state = layer(s.x)
        last, transposed = data_of(output)[-1], data_of(output).transpose(0, -1)
        last.register_hook(lambda g: 3 * g)
        transposed.register_hook(lambda g: g.abs())
        first_state = states_of(state)[0][0]
        first_state.register_hook(lambda g: -g)
        s.loss(output, state, last, transposed, first_state).backward()


@situation(variants=HOOKED)
def retain_grad_on_the_results(s):
    layer = s.layer()
    with s.watch(layer):
        output, state = layer(s.x)
        for tensor in (data_of(output), *states_of(state)):
            tensor.retain_grad()
        data_of(output).register_hook(twice_plus_one)
        s.loss(output, state).backward()
    return [t.grad for t in (data_of(output), *states_of(state))]


@situation(variants=HOOKED)
def hooks_on_leaf_inputs_and_initial_states(s):
    layer = s.layer()
    with s.watch(layer):
        s.leaf.register_hook(lambda g: 0 * g)
        output, state = layer(s.x)
        state = tuple(t.detach().requires_grad_() for t in states_of(state))
        for tensor in state:
            tensor.register_hook(lambda g: 0 * g)
        s.loss(layer(s.x, state if len(state) > 1 else state[0]), output).backward()
    return [t.grad for t in state]


@situation(variants=HOOKED)
def a_hook_between_two_layers(s):
    first = s.layer()
    output_size = data_of(first(s.x)[0]).shape[-1]
    second = s.cls(output_size, H, **s.options)
    with s.watch_model(nn.Sequential(first, second)):
        output, _ = first(s.x)
        data_of(output).register_hook(twice_plus_one)
        s.loss(second(output)).backward()


@situation(variants=HOOKED)
def a_prehook_on_the_graphs_node(s):
    layer = s.layer()
    with s.watch(layer):
        output, _ = layer(s.x)
        data_of(output).grad_fn.register_prehook(lambda grads: (3 * grads[0], *grads[1:]))
        s.loss(output).backward()


@situation(variants=HOOKED)
def a_hook_on_a_weight(s):
    layer = s.layer()
    layer.weight_hh_l0.register_hook(lambda g: 0 * g)
    with s.watch(layer):
        s.loss(layer(s.x)).backward()


# ---- 2. module hooks -----------------------------------------------------------------------------


def scaled_output(module, args, result):
    return mapped(lambda t: 10 * t, result[0]), result[1]


def shifted_input(module, args):
    return mapped(lambda t: 2 * t + 1, args[0]), *args[1:]


def module_hooks():
    """Forward hooks that change the output, and pre-hooks that change the input."""
    for when in ("before", "inside"):
        for options in ({}, {"prepend": True}, {"with_kwargs": True}, {"always_call": True}):
            for pre in (False, True):
                if not (pre and "always_call" in options):
                    yield when, options, pre


def with_module_hook(when, options, pre, s):
    layer = s.layer()

    def register():
        kwargs = options.get("with_kwargs")
        if pre and kwargs:

            def hook(module, args, kwargs):
                return args, {**kwargs, "input": shifted_input(module, (kwargs["input"],))[0]}
        elif pre:
            hook = shifted_input
        elif kwargs:

            def hook(module, args, kwargs, result):
                return scaled_output(module, args, result)
        else:
            hook = scaled_output
        register = layer.register_forward_pre_hook if pre else layer.register_forward_hook
        register(hook, **options)

    if when == "before":
        register()
    with s.watch(layer):
        if when == "inside":
            register()
        s.loss(layer(input=s.x) if "with_kwargs" in options else layer(s.x)).backward()


for when, options, pre in module_hooks():
    name = f"a_forward_{'pre_' * pre}hook_set_{when}_with_{next(iter(options), 'no_options')}"
    function = functools.partial(with_module_hook, when, options, pre)
    situation(function, name=name, variants=("packed",))


@situation(variants=("dense", "packed"))
def global_module_hooks(s):
    layer = s.layer()

    def before(module, args):
        return shifted_input(module, args) if module is layer else None

    def after(module, args, result):
        return scaled_output(module, args, result) if module is layer else None

    with (
        register_module_forward_pre_hook(before),
        s.watch(layer),
        register_module_forward_hook(after),
    ):
        s.loss(layer(s.x)).backward()


def backward_hooks_on(s, module, call):
    module.register_full_backward_pre_hook(lambda _, grads: tuple(3 * g for g in grads))
    module.register_full_backward_hook(lambda _, grads, __: tuple(2 * g for g in grads))
    with s.watch_model(module):
        s.loss(call(s.x)).backward()


@situation(kinds=("RNN", "GRU", "FusedRNN", "LeakyRNN"), variants=("dense", "two_steps"))
def backward_hooks_on_the_layer(s):
    layer = s.layer()
    backward_hooks_on(s, layer, layer)


@situation(variants=("dense", "two_steps"))
def backward_hooks_on_the_parent(s):
    encoder = Encoder(s.layer())
    backward_hooks_on(s, encoder, encoder)


# ---- 2. subclasses and replaced forwards ---------------------------------------------------------


class Result(NamedTuple):
    output: object
    state: object


@dataclasses.dataclass
class Returned:
    state: object
    output: object


FORWARDS = {
    "scales_its_output": lambda run, x: scaled_output(None, (x,), run(x)),
    "normalises_its_input": lambda run, x: run(mapped(lambda t: layer_norm(t, t.shape[-1:]), x)),
    "normalises_its_output": lambda run, x: mapped(
        lambda t: layer_norm(t, t.shape[-1:]), run(x)[0]
    ),
    "returns_its_output_alone": lambda run, x: run(x)[0],
    "returns_its_state_alone": lambda run, x: run(x)[1],
    "returns_its_state_first": lambda run, x: run(x)[::-1],
    "returns_three_values": lambda run, x: (*run(x), 2 * data_of(x)),
    "returns_a_dictionary": lambda run, x: dict(zip(("y", "state"), run(x), strict=True)),
    "returns_a_named_tuple": lambda run, x: Result(*run(x)),
    "returns_a_dataclass": lambda run, x: Returned(*reversed(run(x))),
    "returns_both_in_a_list": lambda run, x: list(run(x)),
    "detaches_its_state": lambda run, x: (run(x)[0], None),
    "runs_twice": lambda run, x: (run(x)[0], run(mapped(lambda t: -t, x))[0]),
    "runs_on_its_own_state": lambda run, x: run(x, run(x)[1]),
    "calls_by_keyword": lambda run, x: run(hx=None, input=x),
    "adds_its_input": lambda run, x: mapped(
        lambda t: t + data_of(x).sum(dim=-1, keepdim=True), run(x)[0]
    ),
}
SUBCLASSED = ("two_steps", "packed")


def in_a_subclass(forward, s):
    class Own(s.cls):
        def forward(self, x):
            return forward(super().forward, x)

    layer = s.layer(Own)
    with s.watch(layer):
        s.loss([r for r in results_of(layer(s.x)) if r is not None]).backward()


def results_of(result):
    return result if isinstance(result, tuple | list) and not is_packed(result) else [result]


def is_packed(value):
    return isinstance(value, PackedSequence)


for name, forward in FORWARDS.items():
    function = functools.partial(in_a_subclass, forward)
    situation(function, name=f"a_subclass_that_{name}", variants=SUBCLASSED)


@situation(variants=SUBCLASSED)
def a_subclass_with_a_signature_of_its_own(s):
    class Own(s.cls):
        def forward(self, lengths, /, state=None, *, sequence):
            assert lengths == "lengths"
            return super().forward(sequence, state)

    layer = s.layer(Own)
    with s.watch(layer):
        s.loss(layer("lengths", sequence=s.x)).backward()


@situation(variants=("dense", "two_steps"))
def a_subclass_that_runs_in_chunks(s):
    class Chunked(s.cls):
        def forward(self, x):
            outputs, state = [], None
            for chunk in x.split(1, dim=int(self.batch_first)):
                output, state = super().forward(chunk, state)
                outputs.append(output)
            return torch.cat(outputs, dim=int(self.batch_first))

    layer = s.layer(Chunked)
    with s.watch(layer):
        s.loss(layer(s.x)).backward()


@situation(variants=("dense", "packed"))
def a_forward_replaced_on_the_instance(s):
    layer = s.layer()
    original = layer.forward
    layer.forward = lambda x: scaled_output(layer, (x,), original(x))
    with s.watch(layer):
        s.loss(layer(s.x)).backward()


@situation(variants=("dense", "packed"))
def a_forward_replaced_inside_the_block(s):
    layer = s.layer()
    with s.watch(layer):
        original = layer.forward
        layer.forward = lambda x: scaled_output(layer, (x,), original(x))
        s.loss(layer(s.x)).backward()


# The other kinds' forward shows itself to nobody: test_gradient_flow_beside_others.py.
@situation(kinds=("FusedRNN", "LeakyRNN"), variants=("dense", "packed"))
def a_forward_called_by_name(s):
    layer = s.layer()
    with s.watch(layer):
        s.loss(layer.forward(s.x)).backward()


# ---- 4. and 5. weights that change ---------------------------------------------------------------


class DropConnect(nn.Module):
    def forward(self, weight):
        return dropout(weight, 0.5)


@situation(kinds=KINDS, variants=("dense", "packed"))
def a_random_parametrization(s):
    layer = s.layer()
    parametrize.register_parametrization(layer, "weight_hh_l0", DropConnect())
    with s.watch(layer):
        s.loss(layer(s.x)).backward()


@situation(kinds=KINDS, variants=("dense", "packed"))
def an_optimizer_that_steps_inside_the_backward_pass(s):
    layer = s.layer()

    def step(parameter):
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with s.watch(layer):
        for _ in range(2):
            s.loss(layer(s.x)).backward()


def parametrized(how, s):
    layer = how(s.layer())
    with s.watch(layer):
        for _ in range(2):
            s.loss(layer(s.x)).backward()


PARAMETRIZED = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer, "weight_hh_l0"),
    "old_weight_norm": lambda layer: nn.utils.weight_norm(layer, "weight_hh_l0"),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer, "weight_hh_l0"),
    "old_spectral_norm": lambda layer: nn.utils.spectral_norm(layer, "weight_hh_l0"),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer, "weight_hh_l0"),
    "pruning": lambda layer: prune.random_unstructured(layer, "weight_hh_l0", 0.3),
}
for name, how in PARAMETRIZED.items():
    situation(functools.partial(parametrized, how), name=f"weights_under_{name}")


class WeightDrop(nn.Module):
    """Drop recurrent weights anew in each call, as AWD-LSTM does."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.raw = layer, nn.Parameter(layer.weight_hh_l0.detach().clone())
        del layer.weight_hh_l0

    def forward(self, x):
        self.layer.weight_hh_l0 = dropout(self.raw, 0.5)
        return self.layer(x)


@situation(variants=("dense", "packed"))
def a_weight_that_is_replaced_in_each_call(s):
    wrapper = WeightDrop(s.layer())
    with s.watch_model(nn.ModuleDict({"encoder": wrapper})):
        losses = [s.loss(wrapper(s.x)) for _ in range(2)]
        sum(losses).backward()


@situation(variants=("dense", "packed"))
def functional_call_with_other_weights(s):
    layer = s.layer()
    other = {n: (2 * p).detach().requires_grad_() for n, p in layer.named_parameters()}
    with s.watch(layer):
        loss = s.loss(functional_call(layer, other, (s.x,)), layer(s.x))
    loss.backward()  # the layer has its own weights again
    return [weight.grad for weight in other.values()]


# A FusedRNN's backward pass reads the weights themselves, and so what was set.
@situation(kinds=("RNN", "LSTM", "GRU", "LeakyRNN"))
def weights_set_through_data_after_the_call(s):
    layer = s.layer()
    with s.watch(layer):
        loss = s.loss(layer(s.x))
        for parameter in layer.parameters():
            parameter.data = torch.zeros_like(parameter)  # autograd holds on to the values before
        loss.backward()


@situation
def weights_tied_between_layers(s):
    first, second = s.layer(), s.layer()
    second.weight_hh_l0, second.bias_hh_l0 = first.weight_hh_l0, first.bias_hh_l0
    with s.watch_model(nn.ModuleList([first, second])):
        output, state = first(s.x)
        s.loss(output, second(s.x, state)).backward()


# ---- ways to call --------------------------------------------------------------------------------


@situation
def a_module_under_two_names(s):
    layer = s.layer()
    with s.watch_model(nn.ModuleDict({"encoder": layer, "alias": layer})):
        s.loss(layer(s.x)).backward()


@situation
def data_parallel_without_devices(s):
    model = nn.DataParallel(Encoder(s.layer()))
    with s.watch_model(model):
        s.loss(model(s.x)).backward()


@situation(variants=("dense", "batch_first"))
def truncated_backpropagation_through_time(s):
    layer, state = s.layer(), None
    with s.watch(layer):
        for chunk in s.x.split(2, dim=int(s.batch_first)):
            output, state = layer(chunk, state)
            s.loss(output, state).backward()
            detached = tuple(t.detach() for t in states_of(state))
            state = detached if isinstance(state, tuple) else detached[0]


@situation
def losses_that_are_differentiated_in_another_order_than_called(s):
    layer = s.layer()
    with s.watch(layer):
        losses = [s.loss(layer(k * s.x)) for k in range(3)]
        for loss in reversed(losses):
            loss.backward()


@situation
def calls_without_a_graph_between_others(s):
    layer = s.layer()
    with s.watch(layer):
        with torch.no_grad():
            layer(s.x)
        loss = s.loss(layer(s.x))
        with torch.inference_mode():
            layer(s.x)
        (loss + s.loss(layer(-s.x))).backward()


@situation(variants=HOOKED)
def a_frozen_layer_above_an_input_with_gradients(s):
    layer = s.layer().requires_grad_(False)
    with s.watch(layer):
        s.loss(layer(s.x)).backward()


@situation(records_nothing=True)
def a_frozen_layer_above_an_input_without_gradients(s):
    layer, readout = s.layer().requires_grad_(False), torch.ones((), requires_grad=True)
    with s.watch(layer):
        (readout * s.loss(layer(s.x.detach()))).backward()


@situation
def an_empty_batch(s):
    layer = s.layer()
    with s.watch(layer):
        s.loss(layer(s.dense(s.T, 0).requires_grad_())).backward()


@situation(variants=("dense", "packed"))
def a_parameter_as_the_input(s):
    s.leaf = nn.Parameter(s.leaf.detach())
    layer = s.layer()
    with s.watch(layer):
        s.loss(layer(mapped(lambda _: s.leaf, s.x))).backward()


# ---- ways to differentiate -----------------------------------------------------------------------


def differentiated(read, s):
    layer = s.layer()
    with s.watch(layer):
        output, state = layer(s.x)
        return read(s, data_of(output), state, layer)


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient is undefined."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def twice(s, output, state, layer):
    s.loss(output, state).backward(retain_graph=True)
    (3 * s.loss(output)).backward()


def with_a_graph(s, output, state, layer):
    grads = torch.autograd.grad(s.loss(output, state), [s.leaf], create_graph=True)
    return [grad.detach() for grad in grads]


READS = {
    "the_last_element": lambda s, y, h, _: y[-1, -1, -1:].sum().backward(),
    "the_first_row": lambda s, y, h, _: s.loss(y[0]).backward(),
    "h_n_alone": lambda s, y, h, _: s.loss(states_of(h)[0]).backward(),
    "c_n_alone": lambda s, y, h, _: s.loss(states_of(h)[-1]).backward(),
    "an_output_without_gradient": lambda s, y, h, _: s.loss(NoGradient.apply(y), h).backward(),
    "gradients_given_by_hand": lambda s, y, h, _: torch.autograd.backward(
        [y, states_of(h)[0]], [y.detach().cos(), states_of(h)[0].detach().sin()]
    ),
    "gradients_of_the_input_alone": lambda s, y, h, _: torch.autograd.grad(s.loss(y, h), s.leaf),
    "gradients_of_a_weight_alone": lambda s, y, h, m: torch.autograd.grad(
        s.loss(y, h), m.weight_hh_l0
    ),
    "a_graph_of_the_gradients": with_a_graph,
    "twice": twice,
    "an_expanded_gradient": lambda s, y, h, _: y.sum().backward(),
}
for name, read in READS.items():
    situation(
        functools.partial(differentiated, read),
        name=f"a_backward_pass_of_{name}",
        variants=("dense", "batch_first"),
    )


@situation(kinds=("FusedRNN",))
def a_backward_pass_through_gradients(s):
    layer = s.layer()
    with s.watch(layer):
        loss = s.loss(layer(s.x)[0].square())
        (grad,) = torch.autograd.grad(loss, s.leaf, create_graph=True)
        grad.square().sum().backward()


def checkpointed(run, s):
    layer = s.layer(num_layers=2, dropout=0.5)
    with s.watch(layer):
        loss = s.loss(run(functools.partial(checkpoint, use_reentrant=False), layer, s.x))
        loss.backward()


def hooked(layer, x):
    output, state = layer(x)
    data_of(output).register_hook(twice_plus_one)
    return output, state


CHECKPOINTS = {
    "the_layer": lambda save, layer, x: save(layer, x),
    "more_than_the_layer": lambda save, layer, x: save(lambda x: layer(layer(x)[0][..., :I])[0], x),
    "a_checkpoint": lambda save, layer, x: save(save, layer, x),
    "a_hook": lambda save, layer, x: save(hooked, layer, x),
    "other_things": lambda save, layer, x: save(torch.tanh, layer(save(torch.sin, x))[0]),
}
for name, run in CHECKPOINTS.items():
    situation(functools.partial(checkpointed, run), name=f"a_checkpoint_around_{name}")


# ---- results modified in place -------------------------------------------------------------------


def in_place(change, s):
    layer = s.layer()
    with s.watch(layer):
        output, state = layer(s.x)
        change(data_of(output), states_of(state))
        s.loss(output, state).backward()


def hook_around_a_change(output, _):
    output.register_hook(twice_plus_one)
    output.mul_(3)
    output.register_hook(lambda g: g.abs())


IN_PLACE = {
    "the_output": lambda output, _: output.mul_(2),
    "the_output_by_relu": lambda output, _: relu(output, inplace=True),
    "a_part_of_the_output": lambda output, _: output[:1].zero_(),
    "the_states": lambda _, states: [state.mul_(2) for state in states],
    "the_output_between_hooks": hook_around_a_change,
}
for name, change in IN_PLACE.items():
    situation(
        functools.partial(in_place, change),
        name=f"a_change_in_place_of_{name}",
        # The backward pass of a FusedRNN reads its output: autograd refuses the change.
        kinds=tuple(kind for kind in MAIN if kind != "FusedRNN" or name == "the_states"),
        variants=HOOKED,
        all_pairs=True,  # which results are views, and of what, hangs on both
    )


# ---- contexts ------------------------------------------------------------------------------------


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


CONTEXTS = {
    "save_on_cpu": save_on_cpu,
    "packed_saved_tensors": lambda: saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy),
    "forbidden_saved_tensors_hooks": lambda: disable_saved_tensors_hooks("not here"),
    "anomaly_detection": lambda: torch.autograd.set_detect_anomaly(True),
    "a_default_device": lambda: torch.device("cpu"),
    "a_dispatch_mode": Passing,
    "a_count_of_operations": lambda: FlopCounterMode(display=False),
    "cached_parametrizations": parametrize.cached,
    "autograd_on_one_thread": lambda: torch.autograd.set_multithreading_enabled(False),
}


def in_context(context, around_all, s):
    layer = s.layer(num_layers=2)
    with s.watch(layer), context():
        loss = s.loss(layer(s.x))
        if around_all:
            loss.backward()
    if not around_all:
        loss.backward()


for name, context in CONTEXTS.items():
    for around_all in (False, True):
        situation(
            functools.partial(in_context, context, around_all),
            name=f"{name}_around_{'all' if around_all else 'the_call'}",
        )


# ---- the comparison ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils:FutureWarning")
@pytest.mark.parametrize(("function", "kind", "variant"), cases())
def test_records_are_those_of_the_unrolled_program(function, kind, variant):
    recorded_equals_unrolled(function, kind, variant)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"vectors": False}, {"cell_through_hidden": True}], ids=str)
@pytest.mark.parametrize("variant", ["packed"])
def test_other_options_record_the_same(kind, options, variant):
    recorded_equals_unrolled(hooks_on_every_result, kind, variant, **options)


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.usefixtures("any_half_precision")
def test_hooks_are_seen_under_autocast(kind):
    records = []
    for factor in (1, 4):  # a power of two changes no rounding
        s = Scene(kind, watcher=GradientFlow)
        layer, x = s.layer(dtype=torch.float32), s.x.float()
        with s.watch(layer), torch.autocast("cpu", torch.bfloat16):
            output, state = layer(x)
            for tensor in (output, *states_of(state)):
                tensor.register_hook(lambda g, factor=factor: factor * g)
            s.loss(output, state).backward()
        records.append(s.flow.adjoint_norm["encoder.l0"])
    assert torch.equal(4 * records[0], records[1])
