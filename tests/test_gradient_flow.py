"""What `GradientFlow` records, against autograd through the same program with unrolled recurrences.

A situation is a function of a `Scene` (tests/gradient_flow_scenes.py). What GradientFlow records is
compared with the same program's unrolled recurrences, and all else with the program without it.
"""

import functools
import gc
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

from rnn_cuda import backend
from rnn_cuda.instruments import GradientFlow, adjoint
from tests import unrolled_calls
from tests.gradient_flow_scenes import (
    KINDS,
    MAIN,
    VARIANTS,
    Encoder,
    I,
    Scene,
    Situations,
    assert_close,
    assert_records,
    assert_same,
    data_of,
    mapped,
    play,
    recorded_equals_unrolled,
    states_of,
)
from tests.layers import Forgetful
from tests.unrolled import step_of
from tests.unrolled_calls import UnrolledCalls

pytestmark = pytest.mark.usefixtures("one_thread")

SITUATIONS = Situations()
situation = SITUATIONS.add
LSTMS = ("LSTM", "LSTM_projected", "FusedLSTM")
OF_THIS_PACKAGE = (
    *("FusedRNN", "FusedRNN_relu", "FusedGRU", "FusedLSTM"),
    *("LeakyRNN", "AntisymmetricRNN"),
)
Flow = functools.partial(GradientFlow, vectors=True)


def on_the_reference_backend(function, s):
    with backend.use("reference"):
        return function(s)


# ---- calls ---------------------------------------------------------------------------------------


@situation(kinds=KINDS, variants=VARIANTS, all_pairs=True)
def a_call_from_given_states(s):
    with s.watched() as layer:
        states = s.initial_states(layer)
        s.loss(layer(s.x, states)).backward()
    return [state.grad for state in states_of(states)]


@situation(kinds=KINDS, variants=("packed", "deep"), all_pairs=True)
def dropout_between_layers_and_around_them(s):
    with s.watched(dropout=0.5) as layer:
        output, state = layer(mapped(lambda t: dropout(t, 0.1), s.x))
        # Random numbers are drawn between the call and its backward pass, too.
        s.loss(mapped(lambda t: dropout(t, 0.1), output), state).backward()


@situation(variants=("dense", "batch_first", "unbatched"))
def one_call_for_each_time_step(s):
    with s.watched() as layer:
        outputs, state = [], None
        for x_t in s.x.split(1, dim=int(s.batch_first)):
            output, state = layer(x_t, state)
            outputs.append(output)
        # The gradients of the outputs are parts of one tensor.
        s.loss(torch.cat(outputs, dim=int(s.batch_first)), state).backward()


for function, kinds in (
    (a_call_from_given_states, (*OF_THIS_PACKAGE, "RNN")),
    (dropout_between_layers_and_around_them, OF_THIS_PACKAGE),
    (one_call_for_each_time_step, OF_THIS_PACKAGE),
):
    situation(
        functools.partial(on_the_reference_backend, function),
        name=f"{function.__name__}_on_the_reference_backend",
        kinds=kinds,
        variants=("dense",) if function is one_call_for_each_time_step else ("packed", "deep"),
    )


def a_sweep_in_blocks(rows, s):
    with s.watched() as layer:
        loss = s.loss(layer(s.x, s.initial_states(layer)))
        with mock.patch.object(adjoint, "_BLOCK_VALUES", rows * len(layer.weight_hh_l0)):
            loss.backward()


for rows in (1, 5):  # of one time step and of two
    situation(
        functools.partial(a_sweep_in_blocks, rows),
        name=f"a_sweep_in_blocks_of_{rows}",
        kinds=("LSTM", "LSTM_projected", "GRU", "LeakyRNN"),
        variants=("dense", "packed"),
        all_pairs=True,
    )


MODELS = {
    "that_is_the_layer": lambda layer: (layer, layer),
    "that_has_it_under_two_names": lambda layer: (nn.ModuleDict({"a": layer, "b": layer}), layer),
    "that_wraps_it": lambda layer: (nn.DataParallel(Encoder(layer)),) * 2,
}


def in_a_model(wrap, s):
    layer, outside = s.layer(), s.layer()
    model, called = wrap(layer)
    with s.watch_model(model):
        s.loss(called(s.x), outside(s.x)).backward()


for name, wrap in MODELS.items():
    situation(functools.partial(in_a_model, wrap), name=f"a_model_{name}")


@situation(variants=("dense", "batch_first"))
def truncated_backpropagation_through_time(s):
    state = None
    with s.watched() as layer:
        for chunk in s.x.split(2, dim=int(s.batch_first)):
            output, state = layer(chunk, state)
            s.loss(output, state).backward()
            detached = tuple(t.detach() for t in states_of(state))
            state = detached if isinstance(state, tuple) else detached[0]


@situation
def losses_that_are_differentiated_in_another_order_than_called(s):
    with s.watched() as layer:
        losses = [s.loss(layer(k * s.x)) for k in range(3)]
        for loss in reversed(losses):
            loss.backward()


@situation
def calls_without_a_graph_and_without_a_loss_between_others(s):
    with s.watched() as layer:
        with torch.no_grad():
            layer(s.x)
        loss = s.loss(layer(s.x))
        with torch.inference_mode():
            layer(s.x)
        layer(s.x)
        (loss + s.loss(layer(-s.x))).backward()


@situation(variants=("dense", "batch_first", "packed", "two_steps"))
def a_backward_pass_and_other_calls_after_the_block(s):
    with s.watched() as layer:
        loss = s.loss(layer(input=s.x))
    s.loss(layer(s.x)).backward()
    loss.backward()


@situation
def a_block_that_is_entered_again(s):
    with s.watched() as layer:
        loss = s.loss(layer(s.x))
    loss.backward()
    with s.flow:
        loss = s.loss(layer(2 * s.x))
    loss.backward()


@situation
def an_empty_batch(s):
    s.batch = (0,)
    with s.watched() as layer:
        s.loss(layer(s.dense(s.T).requires_grad_())).backward()


@situation(variants=("dense", "packed"))
def a_parameter_as_the_input(s):
    s.leaf = nn.Parameter(s.leaf.detach())
    with s.watched() as layer:
        s.loss(layer(mapped(lambda _: s.leaf, s.x))).backward()


# ---- weights -------------------------------------------------------------------------------------


@situation(kinds=KINDS, variants=("packed", "deep"))
def frozen_layers_below_a_trained_one(s):
    with s.watched() as layer:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("_l1" in name)
        s.loss(layer(mapped(torch.Tensor.detach, s.x))).backward()


@situation(variants=("dense", "batch_first", "packed", "two_steps"))
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
def weights_tied_inside_and_between_modules(s):
    options = {**s.options, "dtype": s.dtype}
    first, second = s.cls(I, I, num_layers=2, **options), s.cls(I, I, **options)
    for name in ("weight_ih", "weight_hh", "bias_hh"):
        setattr(first, f"{name}_l1", getattr(first, f"{name}_l0"))
        setattr(second, f"{name}_l0", getattr(first, f"{name}_l0"))
    with s.watch_model(nn.ModuleList([first, second])):
        s.loss(second(first(s.x)[0])).backward()


@situation(variants=("dense", "packed"))
def functional_call_with_other_weights(s):
    with s.watched() as layer:
        other = {n: (2 * p).detach().requires_grad_() for n, p in layer.named_parameters()}
        loss = s.loss(functional_call(layer, other, (s.x,)), layer(s.x))
    loss.backward()  # the layer has its own weights again
    return [weight.grad for weight in other.values()]


# The backward pass of a FusedRNN or LeakyRNN reads the weights themselves, and so what was set.
@situation(kinds=("RNN", "LSTM", "GRU"))
def weights_set_through_data_after_the_call(s):
    with s.watched() as layer:
        loss = s.loss(layer(s.x))
        for parameter in layer.parameters():
            parameter.data = torch.zeros_like(parameter)  # autograd holds on to the values before
        loss.backward()


# ---- ways to differentiate -----------------------------------------------------------------------


def twice(s, output, state, layer):
    s.loss(output, state).backward(retain_graph=True)
    (3 * s.loss(output)).backward()


def with_a_graph(s, output, state, layer):
    grads = torch.autograd.grad(s.loss(output, state), [s.leaf], create_graph=True)
    return [grad.detach() for grad in grads]


READS = {
    "the_last_element": lambda s, y, h, _: y[-1, -1:].sum().backward(),
    "the_first_row": lambda s, y, h, _: s.loss(y[0]).backward(),
    "h_n_alone": lambda s, y, h, _: s.loss(states_of(h)[0]).backward(),
    "c_n_alone": lambda s, y, h, _: s.loss(states_of(h)[-1]).backward(),
    "an_output_without_gradient": lambda s, y, h, _: s.loss(Forgetful.apply(y), h).backward(),
    "gradients_given_by_hand": lambda s, y, h, _: torch.autograd.backward(
        [y, states_of(h)[0]], [y.detach().cos(), states_of(h)[0].detach().sin()]
    ),
    "gradients_of_the_input_alone": lambda s, y, h, _: torch.autograd.grad(s.loss(y, h), s.leaf),
    "a_graph_of_the_gradients": with_a_graph,
    "twice": twice,
    "an_expanded_gradient": lambda s, y, h, _: y.sum().backward(),
}


def differentiated(read, s):
    with s.watched() as layer:
        output, state = layer(s.x)
        return read(s, data_of(output), state, layer)


for name, read in READS.items():
    situation(
        functools.partial(differentiated, read),
        name=f"a_backward_pass_of_{name}",
        variants=("dense", "batch_first", "packed"),
    )


@situation
def a_backward_pass_of_gradients_of_a_weight_alone(s):
    with s.watched() as layer:
        torch.autograd.grad(s.loss(layer(s.x)), layer.weight_hh_l0)


@situation(kinds=("FusedRNN",), variants=("dense", "two_steps", "packed"))
def a_backward_pass_through_gradients(s):
    with s.watched() as layer:
        loss = s.loss(mapped(torch.square, layer(s.x)[0]))
        (grad,) = torch.autograd.grad(loss, s.leaf, create_graph=True)
        grad.square().sum().backward()


def hooked(layer, x):
    output, state = layer(x)
    data_of(output).register_hook(lambda g: 2 * g + 1)
    return output, state


CHECKPOINTS = {
    "the_layer": lambda save, layer, x: save(layer, x),
    "more_than_the_layer": lambda save, layer, x: save(lambda x: layer(layer(x)[0][..., :I])[0], x),
    "a_checkpoint": lambda save, layer, x: save(save, layer, x),
    "a_hook": lambda save, layer, x: save(hooked, layer, x),
    "other_things": lambda save, layer, x: save(torch.tanh, layer(save(torch.sin, x))[0]),
}


def checkpointed(run, s):
    with s.watched(num_layers=2, dropout=0.5) as layer:
        loss = s.loss(run(functools.partial(checkpoint, use_reentrant=False), layer, s.x))
        loss.backward()


for name, run in CHECKPOINTS.items():
    situation(functools.partial(checkpointed, run), name=f"a_checkpoint_around_{name}")


# ---- the comparison ------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "kind", "variant"), SITUATIONS.cases())
def test_records_are_those_of_the_unrolled_program(function, kind, variant):
    recorded_equals_unrolled(function, kind, variant)


@pytest.mark.parametrize("variant", ["packed", "deep"])
@pytest.mark.parametrize(
    ("kind", "option"),
    [(k, "vectors") for k in KINDS] + [(k, "cell_through_hidden") for k in LSTMS],
)
def test_other_options_record_the_same(kind, option, variant):
    options = {option: option != "vectors"}
    recorded_equals_unrolled(a_call_from_given_states, kind, variant, **options)
    if kind == "RNN":  # whose norms alone come from a kernel
        with backend.use("reference"):
            recorded_equals_unrolled(a_call_from_given_states, kind, variant, **options)


CUTS = {
    "h": lambda module, weights, x, h, c: step_of(module, weights, x, h.detach(), c),
    "c": lambda module, weights, x, h, c: step_of(module, weights, x, h, c.detach()),
}


@pytest.mark.parametrize(("kind", "cut"), [(k, "h") for k in MAIN] + [("LSTM", "c")])
def test_the_comparison_rejects_adjoints_that_miss_what_passes_through_later_steps(kind, cut):
    recorded, _ = play(a_call_from_given_states, kind, "deep", Flow)
    with mock.patch.object(unrolled_calls, "step_of", CUTS[cut]):
        unrolled, _ = play(a_call_from_given_states, kind, "deep", UnrolledCalls)
    for actual, right in zip(recorded.flow.records, unrolled.flow.records, strict=True):
        with pytest.raises(AssertionError, match="wrong"):
            assert_close(actual.adjoint, right.hidden, "wrong", tolerance=0.01)


def test_the_comparison_rejects_the_other_reading_of_the_cell_adjoint_and_a_step_too_late():
    recorded, _ = play(a_call_from_given_states, "LSTM", "deep", Flow)
    unrolled, _ = play(a_call_from_given_states, "LSTM", "deep", UnrolledCalls)
    for actual, right in zip(recorded.flow.records, unrolled.flow.records, strict=True):
        for wrong in (right.cell_total, right.cell.roll(1, 0)):
            with pytest.raises(AssertionError, match="wrong"):
                assert_close(actual.cell_adjoint, wrong, "wrong", tolerance=0.01)


def test_both_readings_of_the_cell_adjoint_are_what_stepping_torchs_own_modules_shows():
    s = Scene("LSTM")
    lstm, cell = s.layer(), nn.LSTMCell(4, 5).double()
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in lstm.state_dict().items()})

    def step_lstm(x_t, state):
        state = tuple(s.unsqueeze(0) for s in state)
        return tuple(s.squeeze(0) for s in lstm(x_t.unsqueeze(0), state)[1])

    # The h of an LSTMCell hangs on the c that it returns; that of an nn.LSTM does not.
    for step, through_hidden in ((step_lstm, False), (cell, True)):
        states = [(torch.zeros(3, 5).double(),) * 2]
        for x_t in s.x:
            states.append(step(x_t, states[-1]))
        loss = sum(h.square().sum() for h, _ in states)
        adjoints = torch.autograd.grad(loss, [c for _, c in states[1:]], materialize_grads=True)
        with GradientFlow(lstm, vectors=True, cell_through_hidden=through_hidden) as flow:
            lstm(s.x)[0].square().sum().backward()
        assert_close(flow.cell_adjoint["l0"], torch.stack(adjoints), "dL/dc")


@pytest.mark.parametrize("kind", MAIN)
def test_gradients_of_a_reverse_direction_alone_are_recorded_too(kind):
    whole = Scene(kind, "two_steps", UnrolledCalls)
    with whole.watched() as layer:
        whole.loss(layer(whole.x)).backward()
    s = Scene(kind, "two_steps", Flow)
    with s.watched() as layer:
        torch.autograd.grad(s.loss(layer(s.x)), layer.weight_ih_l0_reverse)
    (actual,) = (r for r in s.flow.records if r.layer == "encoder.l0_reverse")
    assert_close(actual.adjoint, whole.flow.records[1].hidden, kind)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_a_pass_through_gradients_is_not_recorded_for_torchs_modules_with_a_warning(kind):
    def first_and_second(passes_through, s):
        with s.watched() as layer:
            loss = s.loss(layer(s.x)[0].square())
            (grad,) = torch.autograd.grad(loss, s.leaf, create_graph=True)
            if passes_through:
                with pytest.warns(UserWarning, match="does not record"):
                    grad.square().sum().backward()

    first = functools.partial(first_and_second, False)
    unrolled, _ = play(first, kind, "two_steps", UnrolledCalls)
    recorded, _ = play(functools.partial(first_and_second, True), kind, "two_steps", Flow)
    assert_records(recorded.flow, unrolled.flow)


@pytest.mark.parametrize("kind", ["FusedRNN", "LSTM"])
def test_clear_forgets_records_and_begins_to_count_anew(kind):
    s = Scene(kind, watcher=Flow)
    with s.watched() as layer:
        for _ in range(2):
            s.loss(layer(s.x)).backward()
        norms = s.flow.adjoint_norm["encoder.l0"]
        s.flow.clear()
        assert s.flow.adjoint_norm == {}
        s.loss(layer(s.x)).backward()
    assert list(s.flow.adjoint_norm) == ["encoder.l0"]
    assert torch.equal(s.flow.adjoint_norm["encoder.l0"], norms)


@pytest.mark.parametrize("kind", MAIN)
def test_the_graph_is_gone_with_its_loss(kind):
    class Passenger(torch.autograd.Function):
        """Keeps an object alive as long as the graph lives."""

        @staticmethod
        def forward(ctx, x, passenger):
            ctx.passenger = passenger
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    s, passenger = Scene(kind, watcher=GradientFlow), nn.Identity()
    gone = weakref.ref(passenger)
    gc.disable()
    try:
        x = Passenger.apply(s.x, passenger)
        with s.watched() as layer:
            results = layer(x)
            loss = s.loss(results)
            loss.backward()
        del x, results, loss, passenger
        assert gone() is None  # no cycle holds the graph
    finally:
        gc.enable()


# ---- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_all_else_stays_the_same_to_the_bit(kind, name):
    with backend.use(name):
        call = dropout_between_layers_and_around_them, kind, "deep"
        _, plain = play(*call, dtype=torch.float32)
        for vectors in (False, True):
            watcher = functools.partial(GradientFlow, vectors=vectors)
            scene, recorded = play(*call, watcher, dtype=torch.float32)
            assert len(scene.flow.adjoint_norm) == 6
            assert_same(recorded, plain)


def under_autocast(weights_dtype, s):
    with s.watched() as layer:
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(weights_dtype).to(s.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=s.dtype == torch.float32):
            output, state = layer(s.x, s.initial_states(layer))
        for tensor in (output, *states_of(state)):
            tensor.register_hook(lambda g: g.abs())
        s.loss(output, state).backward()


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.usefixtures("any_half_precision")
def test_autocast_is_recorded_as_it_computes(kind):
    call = functools.partial(under_autocast, torch.float64), kind, "unbatched"
    exact, _ = play(*call, UnrolledCalls)
    recorded, _ = play(*call, GradientFlow, dtype=torch.float32)
    # Rounding errors of some steps with 8 bits; they add up at random.
    assert_records(recorded.flow, exact.flow, tolerance=0.03)
    # The weights are those that it computed with.
    call = functools.partial(under_autocast, torch.bfloat16), kind, "unbatched"
    same, _ = play(*call, GradientFlow, dtype=torch.float32)
    assert_same(same.flow.adjoint_norm, recorded.flow.adjoint_norm)


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
@pytest.mark.usefixtures("any_half_precision")
def test_half_precisions_are_recorded(kind, dtype, tolerance):
    call = a_call_from_given_states, kind, "packed"
    exact, _ = play(*call, UnrolledCalls, rounded=dtype)
    recorded, _ = play(*call, Flow, dtype=dtype, rounded=dtype)
    assert_records(recorded.flow, exact.flow, tolerance)
    assert all(r.adjoint.dtype == torch.float32 for r in recorded.flow.records)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "FusedRNN"])
def test_norms_of_float32_do_not_vanish_before_the_gradient(kind):
    torch.manual_seed(0)
    module, x = KINDS[kind][0](I, 64), torch.randn(400, 2, I)
    norms = []
    for dtype in (torch.float32, torch.float64):
        module.to(dtype)
        with GradientFlow(module) as flow:
            module(x.to(dtype))[0][-1, 0].sum().backward()
        norms.append(flow.adjoint_norm["l0"].flip(0))  # by lag
    norm, exact = norms
    assert (norm[:, 1] == 0).all()  # the second sample is in no loss
    # Ordinary numbers as far as the last element of a row: well below what squares can be.
    ordinary = exact[:, 0] > 1e-36
    assert exact[ordinary, 0].min() < 1e-33
    torch.testing.assert_close(norm[ordinary, 0], exact[ordinary, 0], rtol=1e-3, atol=0)
    assert exact[-1, 0] < 1e-46
    assert norm[-1, 0] == 0
