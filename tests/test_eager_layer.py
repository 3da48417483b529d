"""The autograd node of a layer in ordinary eager training, ``csrc/layer_node.h``."""

import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from rnn_cuda import FusedRNN, FusedRNNCell, reference
from rnn_cuda.functional import bidirectional_elman_rnn, elman_rnn
from rnn_cuda.instruments import GradientFlow
from tests.layers import Forgetful, halves, needs_native

pytestmark = needs_native

T, B, I, H = 4, 3, 2, 5
SHAPES = {
    "input": (T, B, I),
    "h0": (B, H),
    "weight_ih": (H, I),
    "weight_hh": (H, H),
    "bias_ih": (H,),
    "bias_hh": (H,),
}
OPTIONAL = ("h0", "bias_ih", "bias_hh")


def is_in_python(node):
    return isinstance(node, torch.autograd.function.BackwardCFunction)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_eager_training_runs_no_python_in_its_graph_unless_it_is_recorded(bidirectional):
    rnn = FusedRNN(I, H, bidirectional=bidirectional)

    def runs_python(x):
        stack = rnn(x)[1].grad_fn
        return any(is_in_python(node) for node, _ in stack.next_functions)

    x = torch.randn(T, B, I)
    assert not runs_python(x)
    with GradientFlow(rnn):
        assert runs_python(x)
    assert not runs_python(x)
    assert not runs_python(torch.nn.Parameter(x))


def test_no_graph_is_built_where_there_is_nothing_to_differentiate():
    rnn, x = FusedRNN(I, H), torch.randn(T, B, I)
    with torch.no_grad():
        assert not any(result.requires_grad for result in rnn(x))
    weights = [weight.detach() for weight in rnn.all_weights[0]]
    assert not any(result.requires_grad for result in elman_rnn(x, None, *weights))


@pytest.mark.parametrize("absent", [(), ("h0",), ("bias_ih",), OPTIONAL], ids="-".join)
@pytest.mark.parametrize(
    "used", [None, (0, 1), (0,), (1,)], ids=["one direction", "both", "forward", "reverse"]
)
def test_each_argument_alone_gets_its_own_gradient(absent, used):
    torch.manual_seed(0)
    names = list(SHAPES)
    x, *forward = (None if n in absent else torch.randn(SHAPES[n]).double() for n in names)
    reverse = [torch.randn(SHAPES[name]).double() for name in names[1:]]  # lacks nothing
    for value in filter(torch.is_tensor, (x, *forward, *([] if used is None else reverse))):
        value.requires_grad_()
        expected = reference.elman_rnn(x, *forward), reference.elman_rnn(x, *reverse, reverse=True)
        actual = elman_rnn(x, *forward), None
        if used is not None:
            actual = bidirectional_elman_rnn(x, forward, reverse)
        gradients = []
        for each in (actual, expected):
            loss = sum((each[i][0].pow(2).sum() + each[i][1].pow(3).sum()) for i in used or (0,))
            # The two directions are one node: where an argument has no part, its gradient is zero.
            gradients += (
                torch.autograd.grad(loss, value, materialize_grads=True)
                if loss.requires_grad
                else [torch.zeros_like(value)]
            )
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
        value.requires_grad_(False)


@halves
@pytest.mark.parametrize("absent", [(), ("bias_ih",), ("bias_hh",)], ids="-".join)
def test_biases_of_half_precision_are_added_in_float32(dtype, absent):
    torch.manual_seed(0)
    values = {n: torch.randn(s).to(dtype).requires_grad_() for n, s in SHAPES.items()}
    values |= dict.fromkeys(absent)
    (output, _), (expected, _) = (f(*values.values()) for f in (elman_rnn, reference.elman_rnn))
    torch.testing.assert_close(output, expected)
    biases = [b for b in (values["bias_ih"], values["bias_hh"]) if b is not None]
    for gradient in torch.autograd.grad(output.float().sum(), biases):
        assert gradient.dtype == dtype


@pytest.mark.parametrize("kind", ["layer", "pair", "cell"])
def test_each_bias_has_a_gradient_of_its_own_and_inference_mode_records_nothing(kind):
    module = FusedRNNCell(I, H) if kind == "cell" else FusedRNN(I, H, bidirectional=kind == "pair")
    x = torch.randn(*([] if kind == "cell" else [T]), B, I)
    gradients = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    assert len({gradient.data_ptr() for gradient in gradients}) == len(gradients)
    with torch.inference_mode(), torch.enable_grad():
        assert not any(result.requires_grad for result in module(x))


def test_a_consumed_graph_says_so():
    output, _ = FusedRNN(I, H)(torch.randn(T, B, I))
    output.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        output.sum().backward()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_node_that_no_gradient_reaches_has_none_to_give(bidirectional):
    rnn = FusedRNN(I, H, bidirectional=bidirectional)
    output, h_n = rnn(torch.randn(T, B, I))
    reached = []
    h_n.grad_fn.register_hook(lambda *_: reached.append(True))
    loss = Forgetful.apply(output).sum()
    parameters = list(rnn.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert reached
    assert gradients == (None,) * len(parameters)


# ---- misfits: in eager code the native operator has to find them, and Python says what they are --


def misfits(name, good, packed):
    """Values for the argument ``name`` that do not fit the others; ``good`` does."""
    for axis, size in enumerate(good.shape):
        is_length = name == "input" and axis == 0
        for other in {0, 1, size + 1} - {size}:
            if other == 0 or packed or not is_length:  # any number of time steps will do
                yield good.new_zeros(*good.shape[:axis], other, *good.shape[axis + 1 :])
    yield good.unsqueeze(0)
    if packed or name != "input":  # a sequence may be without a batch
        yield good[0]
    yield from (good.to(d) for d in (torch.float64, torch.float16, torch.int64, torch.complex64))
    yield good.to("meta")
    yield 0.5
    if "weight" in name:
        yield None


def misfitting_problems(packed, dtype):
    """Yield ``(name, arguments, batch_sizes)``; the named one does not fit."""
    shapes = {**SHAPES, "input": (5, I)} if packed else SHAPES
    sizes = torch.tensor([B, 2]) if packed else None
    good = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    for name, tensor in good.items():
        for misfit in misfits(name, tensor, packed):
            yield name, [*{**good, name: misfit}.values()], sizes
    no_units = torch.zeros(0, I, dtype=dtype), torch.zeros(0, 0, dtype=dtype)
    yield "weight_hh", [good["input"], None, *no_units, None, None], sizes
    on_meta = {name: tensor.to("meta") for name, tensor in good.items() if name != "input"}
    yield "weight_hh", [good["input"], *on_meta.values()], sizes
    if packed:
        wrong = [[B, 1], [2, B], [B, 2, 0], [5, 0], [-1, 6], [], [[B, 2]]]
        tensors = [torch.tensor(counts, dtype=torch.int64) for counts in wrong]
        for other in (*tensors, sizes.int(), sizes.double(), sizes.to("meta"), sizes.tolist()):
            yield "batch_sizes", [*good.values()], other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("trains", [False, True], ids=["no_grad", "grad"])
def test_native_layers_refuse_whatever_does_not_fit(packed, dtype, trains):
    good = (torch.zeros(SHAPES[name], dtype=dtype) for name in list(SHAPES)[1:])
    fitting = [tensor.requires_grad_(trains) for tensor in good]
    for name, arguments, sizes in misfitting_problems(packed, dtype):
        said = f"{name}: {arguments}, batch_sizes {sizes}"
        own = arguments[1:]
        for pair in ((own,), (own, fitting), (fitting, own)):
            starts = [start for start, *_ in pair if start is not None]
            fit = len(starts) == len(pair) and all(map(torch.is_tensor, starts))
            fit = fit and len({(start.shape, start.dtype, start.device) for start in starts}) == 1
            states = [torch.stack(starts)] if fit else []
            weights = [w for _, *its in pair for w in its if w is not None]
            direction = "both" if len(pair) == 2 else "forward"
            if not fit and name == "h0":
                continue  # it cannot be told to the operator
            try:
                torch.ops.rnn_cuda.layer(
                    arguments[0], states, weights, "elman.tanh", direction, sizes
                )
            except (RuntimeError, IndexError, ValueError):
                continue
            pytest.fail(f"the operator takes {said}")
        for function, its_arguments in (
            (elman_rnn, arguments),
            (bidirectional_elman_rnn, (arguments[0], own, fitting)),
            (bidirectional_elman_rnn, (arguments[0], fitting, own)),
        ):
            with pytest.raises((ValueError, TypeError), match=r"^\w+: expected") as caught:
                function(*its_arguments, batch_sizes=sizes)
            assert caught.value.__context__ is None, said


def test_an_error_that_no_argument_explains_is_the_operators_own():
    rnn, x = FusedRNN(I, H), torch.randn(T, B, I)
    with torch.inference_mode():
        weights = [weight.clone() for weight in rnn.all_weights[0]]
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        elman_rnn(x.requires_grad_(), None, *weights)


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_tensors_without_data_are_checked_as_well(kind):
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        x, h0, W, U, b_ih, b_hh = (torch.empty(shape) for shape in SHAPES.values())
        assert elman_rnn(x, h0, W, U, b_ih, b_hh)[0].shape == (T, B, H)
        with pytest.raises(ValueError, match=r"input: expected shape \(T, B, 2\)"):
            elman_rnn(torch.empty(T, B, I + 1), None, W, U)
        with pytest.raises(ValueError, match=r"h0_reverse: expected shape \(3, 5\)"):
            bidirectional_elman_rnn(x, (h0, W, U), (h0[1:], W, U))


def test_a_refusal_keeps_nothing_alive():
    W, U = torch.zeros(SHAPES["weight_ih"]), torch.zeros(SHAPES["weight_hh"])

    def refused(call):
        x = torch.zeros(T, B, I + 1)
        with pytest.raises(ValueError, match="input: expected shape"):
            call(x)
        return weakref.ref(x)

    gc.collect()
    gc.disable()  # which would find a cycle, some day
    try:
        kept = [
            refused(lambda x: elman_rnn(x, None, W, U)),
            refused(lambda x: bidirectional_elman_rnn(x, (None, W, U), (None, W, U))),
        ]
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("has_h0", [False, True])
def test_a_checkpoint_that_stops_inside_a_layer_keeps_nothing_alive(bidirectional, has_h0):
    """Recomputing ends with an exception, raised where the last tensor is saved."""
    rnn, stops, made = FusedRNN(I, H, bidirectional=bidirectional), [], []

    def run(x, h0):
        try:
            output, _ = rnn(x, h0)
        except Exception as stop:
            stops.append(type(stop))
            raise
        made.append(weakref.ref(output))
        return output

    def train():
        x = torch.randn(T, B, I)
        h0 = torch.randn(1 + bidirectional, B, H) if has_h0 else None
        checkpoint(run, x, h0, use_reentrant=False).sum().backward()
        made.append(weakref.ref(x))

    train()
    made.clear()
    gc.collect()
    gc.disable()
    try:
        train()
        assert len(stops) == 2
        assert [reference() for reference in made] == [None] * len(made)
    finally:
        gc.enable()


def test_a_hook_that_refuses_to_save_leaves_the_layer_as_it_was():
    class RefusedError(Exception):
        pass

    def refuse(tensor):
        raise RefusedError

    rnn, x = FusedRNN(I, H), torch.randn(T, B, I)
    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse), pytest.raises(RefusedError):
        rnn(x)
    rnn(x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in rnn.parameters())
