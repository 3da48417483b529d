"""`GradientFlow` in other people's code: what their hooks, subclasses and wrappers do to gradients.

The contract: the adjoint recorded is dL/dh_t of the underlying layer. What enters and leaves its
recurrence counts, after all hooks, whoever set them and when. What cannot be followed raises and
names the module; no value is wrong or missing. Situations are explained in test_gradient_flow.py.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.nn.functional import dropout, layer_norm, relu
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rnn_cuda import backend
from tests.gradient_flow_scenes import (
    KINDS,
    MAIN,
    Encoder,
    H,
    Situations,
    data_of,
    mapped,
    recorded_equals_unrolled,
    states_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

HOOKED = ("dense", "batch_first", "packed", "two_steps")
SITUATIONS = Situations()
situation = SITUATIONS.add


# ---- 1. hooks on what a layer returns, and changes of that in place ------------------------------


def twice_plus_one(grad):
    return 2 * grad + 1


def several_in_order_one_of_them_removed(output, _):
    output.register_hook(twice_plus_one)
    removed = output.register_hook(lambda g: 100 * g)
    output.register_hook(lambda g: g.clamp(-0.5, 1))
    removed.remove()


def on_views(output, states):
    views = output[-1], output.transpose(0, -1), states[0][0]
    for view, change in zip(views, (lambda g: 3 * g, torch.abs, torch.neg), strict=True):
        view.register_hook(change)
    return views


def retained_gradients(output, states):
    for tensor in (output, *states):
        tensor.retain_grad()
    output.register_hook(twice_plus_one)


HOOKS = {
    "that_zeroes_the_gradient": lambda output, _: output.register_hook(lambda g: 0 * g),
    "on_every_result": lambda output, states: [
        tensor.register_hook(lambda g, k=k: (k + 2) * g)
        for k, tensor in enumerate((output, *states))
    ],
    "several_in_order_one_of_them_removed": several_in_order_one_of_them_removed,
    "on_views": on_views,
    "retained_gradients": retained_gradients,
    "before_the_graphs_node": lambda output, _: output.grad_fn.register_prehook(
        lambda grads: (3 * grads[0], *grads[1:])
    ),
}


def on_results(change, s):
    with s.watched() as layer:
        output, state = layer(s.x)
        views = change(data_of(output), states_of(state))
        s.loss(output, state, views if isinstance(views, tuple) else ()).backward()
    results = (data_of(output), *states_of(state))
    return [t.grad for t in results if t.retains_grad]


for name, change in HOOKS.items():
    situation(functools.partial(on_results, change), name=f"a_hook_{name}", variants=HOOKED)


def between_hooks(output, _):
    output.register_hook(twice_plus_one)
    output.mul_(3)
    output.register_hook(lambda g: g.abs())


IN_PLACE = {
    "the_output": lambda output, _: output.mul_(2),
    "the_output_by_relu": lambda output, _: relu(output, inplace=True),
    "a_part_of_the_output": lambda output, _: output[:1].zero_(),
    "the_states": lambda _, states: [state.mul_(2) for state in states],
    "the_output_between_hooks": between_hooks,
}


for name, change in IN_PLACE.items():
    situation(
        functools.partial(on_results, change),
        name=f"a_change_in_place_of_{name}",
        # The backward pass of these reads their output: autograd refuses the change.
        kinds=tuple(k for k in MAIN if k not in ("FusedRNN", "LeakyRNN") or name == "the_states"),
        variants=(*HOOKED, "unbatched"),
        all_pairs=True,  # which results are views, and of what, hangs on both
    )


@situation(variants=HOOKED)
def a_hook_set_after_the_block(s):
    with s.watched() as layer:
        output, state = layer(s.x)
    data_of(output).register_hook(twice_plus_one)
    s.loss(output, state).backward()


@situation(variants=HOOKED)
def hooks_on_leaf_inputs_and_initial_states(s):
    with s.watched() as layer:
        s.leaf.register_hook(lambda g: 0 * g)
        state = s.initial_states(layer)
        for tensor in states_of(state):
            tensor.register_hook(lambda g: 0 * g)
        s.loss(layer(s.x, state)).backward()
    return [t.grad for t in states_of(state)]


@situation(variants=HOOKED)
def a_hook_between_two_layers(s):
    first = s.layer()
    output_size = data_of(first(s.x)[0]).shape[-1]
    second = s.cls(output_size, H, dtype=torch.float64, **s.options)
    with s.watch_model(nn.Sequential(first, second)):
        output, _ = first(s.x)
        data_of(output).register_hook(twice_plus_one)
        s.loss(second(output)).backward()


# ---- 2. what is set on a module, before the block or inside of it --------------------------------


def scaled_output(module, args, *kwargs_and_result):
    output, state = kwargs_and_result[-1]
    return mapped(lambda t: 10 * t, output), state


def shifted_input(module, args, kwargs=None):
    args = (mapped(lambda t: 2 * t + 1, args[0]), *args[1:])
    return args if kwargs is None else (args, kwargs)


def with_another_forward(layer):
    original = layer.forward
    layer.forward = lambda x: scaled_output(layer, (x,), original(x))


def prepared(prepare, is_inside, backend_name, s):
    layer = s.layer()
    if not is_inside:
        prepare(layer)
    with s.watch(layer), backend.use(backend_name):
        if is_inside:
            prepare(layer)
        for _ in range(2):
            s.loss(layer(s.x)).backward()


def add_prepared(name, prepare, is_inside=False, backend_name="auto", **options):
    function = functools.partial(prepared, prepare, is_inside, backend_name)
    situation(function, name=f"{name}_set_inside" if is_inside else name, **options)


for is_inside, option in itertools.product(
    (False, True), ("no_options", "prepend", "with_kwargs", "always_call")
):
    options = {} if option == "no_options" else {option: True}
    add_prepared(
        f"a_forward_hook_with_{option}",
        lambda layer, options=options: layer.register_forward_hook(scaled_output, **options),
        is_inside,
        variants=("packed",),
    )
    if option != "always_call":  # pre-hooks have no such option
        add_prepared(
            f"a_forward_pre_hook_with_{option}",
            lambda layer, options=options: layer.register_forward_pre_hook(
                shifted_input, **options
            ),
            is_inside,
            variants=("packed",),
        )
for is_inside in (False, True):
    variants = ("dense", "packed")
    add_prepared("another_forward", with_another_forward, is_inside, variants=variants)


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


def backward_hooks(wrap, s):
    module = wrap(s.layer())
    module.register_full_backward_pre_hook(lambda _, grads: tuple(3 * g for g in grads))
    module.register_full_backward_hook(lambda _, grads, __: tuple(2 * g for g in grads))
    with s.watch_model(module):
        s.loss(module(s.x)).backward()


for name, wrap, kinds in (
    # These hooks take no tuple in a tuple, as an LSTM returns it.
    ("layer", lambda layer: layer, ("RNN", "GRU", "FusedRNN", "LeakyRNN")),
    ("parent", Encoder, MAIN),
):
    function = functools.partial(backward_hooks, wrap)
    variants = ("dense", "two_steps")
    situation(function, name=f"backward_hooks_on_the_{name}", kinds=kinds, variants=variants)


# ---- 3. subclasses and replaced forwards ---------------------------------------------------------


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


def in_a_subclass(forward, s):
    class Own(s.cls):
        def forward(self, x):
            return forward(super().forward, x)

    with s.watched(Own) as layer:
        s.loss(layer(s.x)).backward()


for name, forward in FORWARDS.items():
    function = functools.partial(in_a_subclass, forward)
    situation(function, name=f"a_subclass_that_{name}", variants=("two_steps", "packed"))


@situation(variants=("two_steps", "packed"))
def a_subclass_with_a_signature_of_its_own(s):
    class Own(s.cls):
        def forward(self, lengths, /, state=None, *, sequence):
            assert lengths == "lengths"
            return super().forward(sequence, state)

    with s.watched(Own) as layer:
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

    with s.watched(Chunked) as layer:
        s.loss(layer(s.x)).backward()


# The other kinds' forward shows itself to nobody.
@situation(kinds=("FusedRNN", "LeakyRNN"), variants=("dense", "packed"))
def a_forward_called_by_name(s):
    with s.watched() as layer:
        s.loss(layer.forward(s.x)).backward()


# ---- 4. weights that change ----------------------------------------------------------------------


class DropConnect(nn.Module):
    def forward(self, weight):
        return dropout(weight, 0.5)


def optimizer_that_steps_inside_the_backward_pass(layer):
    def step(parameter):
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(step)


def spectral_norm(layer):
    """One with vectors of another matrix, so that it learns each time that it is read."""
    parametrizations.spectral_norm(layer, "weight_hh_l0")
    for buffer in layer.buffers():
        buffer.normal_()


WEIGHTS = {
    "a_hook": lambda layer: layer.weight_hh_l0.register_hook(lambda g: 0 * g),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer, "weight_hh_l0"),
    "old_weight_norm": lambda layer: nn.utils.weight_norm(layer, "weight_hh_l0"),
    "spectral_norm": spectral_norm,
    "old_spectral_norm": lambda layer: nn.utils.spectral_norm(layer, "weight_hh_l0"),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer, "weight_hh_l0"),
    "pruning": lambda layer: prune.random_unstructured(layer, "weight_hh_l0", 0.3),
}
for name, prepare in WEIGHTS.items():
    add_prepared(f"weights_under_{name}", prepare)
add_prepared(
    "weights_under_spectral_norm_on_the_reference_backend",
    spectral_norm,
    backend_name="reference",
    kinds=("FusedRNN", "LeakyRNN"),
)
for name, prepare in (
    (
        "a_random_parametrization",
        lambda layer: parametrize.register_parametrization(layer, "weight_hh_l0", DropConnect()),
    ),
    ("an_optimizer_that_steps_inside", optimizer_that_steps_inside_the_backward_pass),
):
    add_prepared(name, prepare, kinds=KINDS, variants=("dense", "packed"))


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


# ---- 5. contexts ---------------------------------------------------------------------------------


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


def in_context(context, is_around_all, s):
    with s.watched(num_layers=2) as layer, context():
        loss = s.loss(layer(s.x))
        if is_around_all:
            loss.backward()
    if not is_around_all:
        loss.backward()


for name, context in CONTEXTS.items():
    for is_around_all in (False, True):
        situation(
            functools.partial(in_context, context, is_around_all),
            name=f"{name}_around_{'all' if is_around_all else 'the_call'}",
            kinds=("LSTM", "FusedRNN", "LeakyRNN"),
        )


# ---- the comparison ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils:FutureWarning")
@pytest.mark.parametrize(("function", "kind", "variant"), SITUATIONS.cases())
def test_records_are_those_of_the_unrolled_program(function, kind, variant):
    recorded_equals_unrolled(function, kind, variant)
