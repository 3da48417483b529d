"""The operators with cells other than Elman's, against torch's layers or loops, in float64."""

import collections
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from rnn_cuda import FusedGRU, FusedLSTM, backend, reference
from rnn_cuda.cells import cell_named
from rnn_cuda.cells.elman import NONLINEARITIES
from rnn_cuda.instruments import GradientFlow
from rnn_cuda.operators.linearised import KERNEL_FORMS

pytestmark = pytest.mark.skipif(
    backend.requested() in ("reference", "emulated"), reason="only the CPU kernel has these cells"
)

backend.use_native("cpu", torch.float32)  # loads the operators

T, B, I, H = 6, 4, 3, 5


class LeakyLoop(nn.Module):
    """h_t = keep h_{t-1} + rate f(W x_t + U h_{t-1} + b), called as torch's layers are."""

    def __init__(self, inputs, hidden, dtype, nonlinearity, **options):
        super().__init__()
        self.f = {"identity": lambda z: z, "softplus": nn.functional.softplus}.get(
            nonlinearity, getattr(torch, nonlinearity, None)
        )
        shapes = nn.RNN(inputs, hidden, dtype=dtype, **options)
        wide = reference.compute_dtype(dtype)
        for suffix in ("_l0", "_l0_reverse")[: 1 + options["bidirectional"]]:
            for name, parameter in shapes.named_parameters():
                if name.endswith(suffix):
                    self.register_parameter(name, parameter)
            for name in ("keep", "rate"):
                constant = nn.Parameter(torch.rand(hidden, dtype=wide) / 2 + 0.1)
                self.register_parameter(name + suffix, constant)

    def forward(self, x, h0):
        is_packed = isinstance(x, PackedSequence)
        sizes = x.batch_sizes.tolist() if is_packed else [x.shape[1]] * len(x)
        steps = (x.data if is_packed else x.flatten(0, 1)).split(sizes)
        outputs, finals = [], []
        for d, suffix in enumerate(("_l0", "_l0_reverse")):
            if not hasattr(self, f"keep{suffix}"):
                break
            names = ("weight_ih", "weight_hh", "keep", "rate", "bias_ih", "bias_hh")
            w, u, keep, rate, *biases = (getattr(self, n + suffix, 0) for n in names)
            h = x.data.new_zeros(sizes[0], len(u)) if h0 is None else h0[d]
            states = [h] * len(sizes)
            for t in range(len(sizes))[:: -1 if d else 1]:
                before = h[: sizes[t]]
                z = steps[t] @ w.mT + before @ u.mT + sum(biases)
                states[t] = (keep * before + rate * self.f(z)).to(h.dtype)
                h = torch.cat([states[t], h[sizes[t] :]])
            outputs.append(torch.cat(states))
            finals.append(h)
        output = torch.cat(outputs, -1)
        output = x._replace(data=output) if is_packed else output.view(*x.shape[:2], -1)
        return output, torch.stack(finals)


LAYERS = {
    "gru": nn.GRU,
    "lstm": nn.LSTM,
    "leaky.tanh": functools.partial(LeakyLoop, nonlinearity="tanh"),
}
CASES = {
    "dense": {},
    "both_directions": {"bidirectional": True},
    "packed": {"batch_sizes": torch.tensor([4, 4, 3, 1, 1])},
    "packed_both": {"batch_sizes": torch.tensor([4, 2, 2, 1]), "bidirectional": True},
    "no_state": {"with_state": False},
    "no_bias": {"bias": False, "bidirectional": True},
    "one_sample": {"batch": 1, "hidden": 1, "inputs": 1},
    "several_panels": {"batch": 7, "hidden": 37, "inputs": 70},
    "many_rows_of_large_panels": {"batch": 216, "hidden": 299, "inputs": 2},
}


class Layer:
    """One of torch's layers, and the operators' arguments that say the same."""

    def __init__(self, cell, dtype=torch.float64, requires_grad=True, **case):
        torch.manual_seed(0)
        self.cell, self.batch_sizes = cell, case.get("batch_sizes")
        hidden, inputs, batch = case.get("hidden", H), case.get("inputs", I), case.get("batch", B)
        self.directions = 2 if case.get("bidirectional") else 1
        options = {"bias": case.get("bias", True), "bidirectional": self.directions == 2}
        if cell.startswith("leaky"):
            options["nonlinearity"] = cell.removeprefix("leaky.")
        self.module = LAYERS.get(cell, LeakyLoop)(inputs, hidden, dtype=dtype, **options)
        self.weights = [weight.detach() for weight in self.module.parameters()]
        rows = (T, batch) if self.batch_sizes is None else (int(self.batch_sizes.sum()),)
        kinds = 2 if cell == "lstm" else 1
        shape = (self.directions, batch, hidden)
        self.input = torch.randn(*rows, inputs, dtype=dtype)
        self.states = [torch.randn(shape, dtype=dtype) for _ in range(kinds)]
        self.states = self.states if case.get("with_state", True) else []
        for tensor in (self.input, *self.states, *self.weights):
            tensor.requires_grad_(requires_grad)
        self.tensors = [self.input, *self.states, *self.weights]
        self.direction = "both" if self.directions == 2 else "forward"

    def arguments(self, tensors=None):
        tensors = self.tensors if tensors is None else list(tensors)
        count = 1 + len(self.states)
        lists = tensors[0], tensors[1:count], tensors[count:]
        return (*lists, self.cell, self.direction, self.batch_sizes)

    def ours(self, *tensors, operator="layer", **options):
        return getattr(torch.ops.rnn_cuda, operator)(*self.arguments(tensors or None), **options)

    def torchs(self, *tensors):
        input, states, weights, *_ = self.arguments(tensors or None)
        x = input if self.batch_sizes is None else PackedSequence(input, self.batch_sizes)
        state = tuple(states) if len(states) == 2 else states[0] if states else None
        names = [name for name, _ in self.module.named_parameters()]
        named = dict(zip(names, weights, strict=True))
        output, final = torch.func.functional_call(self.module, named, (x, state))
        output = output if self.batch_sizes is None else output.data
        return [output, *(final if isinstance(final, tuple) else (final,))]

    def gradients(self, results, tensors=None, retain_graph=True):
        grads = [torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape) for r in results]
        return torch.autograd.grad(
            results, tensors or self.tensors, grads, allow_unused=True, retain_graph=retain_graph
        )


def close(ours, theirs, rtol=1e-11):
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cell", LAYERS)
def test_values_and_gradients_are_torchs(cell, case):
    layer = Layer(cell, **CASES[case])
    results, expected = layer.ours(), layer.torchs()
    close(results, expected)
    gradients, expected = layer.gradients(results), layer.gradients(expected)
    close(gradients, expected)
    recomputed = layer.gradients(layer.ours(recompute=True))
    assert all(map(torch.equal, recomputed, gradients))


@pytest.mark.parametrize("cell", LAYERS)
def test_a_final_state_alone_and_an_output_alone_have_gradients(cell):
    layer = Layer(cell)
    results, expected = layer.ours(), layer.torchs()
    for ours, theirs in zip(results, expected, strict=True):
        close(layer.gradients([ours]), layer.gradients([theirs]))


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_in_narrow_types_are_of_the_size_of_torchs(cell, dtype):
    layer = Layer(cell, dtype, bidirectional=True, hidden=32)
    exact = Layer(cell, bidirectional=True, hidden=32)
    tensors = [tensor.detach().double().requires_grad_() for tensor in layer.tensors]

    def errors(results):
        expected = exact.torchs(*tensors)
        pairs = zip(
            (*results, *layer.gradients(results)),
            (*expected, *exact.gradients(expected, tensors)),
            strict=True,
        )
        return [((r.double() - e).norm() / e.norm()).item() for r, e in pairs]

    for ours, theirs in zip(errors(layer.ours()), errors(layer.torchs()), strict=True):
        # Three: the kernel adds up products one after the other, torch in blocks.
        assert ours < 3 * theirs + torch.finfo(dtype).eps


@pytest.mark.parametrize("cell", LAYERS)
def test_gradients_of_weights_keep_their_digits_over_many_steps(cell):
    layer = Layer(cell, torch.float32, inputs=1, hidden=32, with_state=False)
    x, grad, gradients = torch.randn(25_000, 2, 1), torch.randn(25_000, 2, 32), []
    for dtype in (torch.float64, torch.float32):
        weights = [weight.detach().to(dtype).requires_grad_() for weight in layer.weights]
        output, *_ = layer.ours(x.to(dtype), *weights)
        gradients.append(torch.autograd.grad(output, weights, grad.to(dtype)))
    for exact, ours in zip(*gradients, strict=True):
        assert (ours - exact).abs().max() < 2e-6 * exact.abs().max()


@pytest.mark.parametrize("cell", LAYERS)
def test_a_step_is_a_layer_of_one_step(cell):
    layer = Layer(cell)
    states = [state[0] for state in layer.states]
    after = torch.ops.rnn_cuda.step(layer.input[0], states, layer.weights, cell)
    tensors = (layer.input[:1], *layer.tensors[1:])
    _, *expected = layer.ours(*tensors)
    assert all(torch.equal(a, e[0]) for a, e in zip(after, expected, strict=True))
    gradients, expected = layer.gradients(after), layer.gradients([e[0] for e in expected])
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize("case", ["dense", "packed_both", "no_state", "no_bias"])
@pytest.mark.parametrize("cell", LAYERS)
def test_derivatives_of_higher_order_and_in_forward_mode(cell, case):
    small = {"hidden": 2, "inputs": 2, **CASES[case]}
    layer = Layer(cell, **small)
    tensors = tuple(tensor.detach().requires_grad_() for tensor in layer.tensors)

    def call(*tensors):
        return tuple(layer.ours(*tensors, operator="layer_forward", saves=True))[
            : 2 + (cell == "lstm")
        ]

    torch.autograd.gradcheck(call, tensors, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(call, tensors, check_fwd_over_rev=True, check_rev_over_rev=True)
    torch.autograd.gradgradcheck(lambda *t: tuple(layer.ours(*t)), tensors)


@pytest.mark.parametrize("cell", LAYERS)
def test_a_hessian_vector_product_takes_as_many_calls_at_any_length(cell):
    def calls(steps):
        layer = Layer(cell)
        x = layer.input.detach().repeat(steps, 1, 1).requires_grad_()
        counts = collections.Counter()

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                counts[func.name()] += 1
                return func(*args, **(kwargs or {}))

        with Count():
            loss = layer.ours(x, *layer.tensors[1:])[0].square().sum()
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            torch.autograd.grad(grad.square().sum(), [x, *layer.weights])
        return counts

    counts = calls(1)
    assert counts["rnn_cuda::linear_recurrence"] == (4 if cell == "lstm" else 2)
    assert calls(20) == counts


@pytest.mark.parametrize("cell", LAYERS)
def test_vmap_gives_what_a_loop_gives(cell):
    layer = Layer(cell, requires_grad=False)
    for mapped in range(len(layer.tensors)):
        dims = [None] * len(layer.tensors)
        dims[mapped] = 0
        tensors = list(layer.tensors)
        tensors[mapped] = torch.stack([tensors[mapped], 2 * tensors[mapped]])

        def loss(*tensors):
            results = layer.ours(*tensors, operator="layer_forward", saves=True)
            return sum(result.square().sum() for result in results[: 2 + (cell == "lstm")])

        every = tuple(range(len(tensors)))
        found = torch.func.vmap(torch.func.grad(loss, every), tuple(dims))(*tensors)
        for i in range(2):
            each = [t if dim is None else t[i] for t, dim in zip(tensors, dims, strict=True)]
            close([f[i] for f in found], torch.func.grad(loss, every)(*each))


@pytest.mark.parametrize("case", ["dense", "packed", "both_directions"])
@pytest.mark.parametrize("cell", LAYERS)
def test_operators_keep_pytorchs_rules(cell, case):
    layer = Layer(cell, **CASES[case])
    operators = torch.ops.rnn_cuda
    for saves in (False, True):
        arguments = (*layer.arguments(), saves)
        torch.library.opcheck(operators.layer_forward.default, arguments)
    results = [result.detach() for result in layer.ours(operator="layer_forward", saves=True)]
    kinds = 2 if cell == "lstm" else 1
    grads = [torch.ones_like(result) for result in results[: 1 + kinds]]
    input, states, weights, *options = layer.arguments([t.detach() for t in layer.tensors])
    arguments = (grads, input, states, weights, results[0], results[1 + kinds :], *options)
    for adjoints in (False, True):
        wanted = [True] * len(layer.tensors) + [adjoints, adjoints]
        torch.library.opcheck(operators.layer_gradients.default, (*arguments, wanted))


@pytest.mark.parametrize("cell", LAYERS)
def test_compiled_code_gives_the_same(cell):
    layer = Layer(cell, bidirectional=True)

    @torch.compile(fullgraph=True)
    def call(*tensors):
        return layer.ours(*tensors, operator="layer_forward", saves=True)[: 2 + (cell == "lstm")]

    results = call(*layer.tensors)
    close(results, layer.torchs(), rtol=1e-12)
    gradients = layer.gradients(results, retain_graph=False)
    close(gradients, layer.gradients(layer.torchs()))


@pytest.mark.parametrize("cell", LAYERS)
def test_the_reference_loop_is_torchs(cell):
    layer = Layer(cell, **CASES["packed"])
    input, states, (weight_ih, weight_hh, *others), *_ = layer.arguments()
    kind = cell_named(cell).with_constants(*others[2:])
    (output, *_), final = reference.run_direction(
        *(kind, input, [state[0] for state in states], weight_ih, weight_hh, others[:2]),
        reverse=False,
        batch_sizes=layer.batch_sizes,
    )
    close([output, *(state.unsqueeze(0) for state in final)], layer.torchs())


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_leaky_cells_have_every_nonlinearity(nonlinearity):
    layer = Layer(f"leaky.{nonlinearity}", **CASES["packed_both"], hidden=2, inputs=2)
    results, expected = layer.ours(), layer.torchs()
    close(results, expected)
    close(layer.gradients(results), layer.gradients(expected))
    tensors = tuple(tensor.detach().requires_grad_() for tensor in layer.tensors)

    def call(*tensors):
        return tuple(layer.ours(*tensors, operator="layer_forward", saves=True))[:2]

    torch.autograd.gradgradcheck(call, tensors, check_fwd_over_rev=True)


def test_constants_are_refused_where_they_do_not_fit():
    layer = Layer("leaky.tanh", requires_grad=False)
    x, states, weights, cell, direction, _ = layer.arguments()
    for change, message in (
        (weights[:3], "up to two biases, then keep and rate, of each of 1 directions, got 3"),
        ([*weights[:-1], weights[-1].float()], "a constant must be Double"),
        ([*weights[:-1], weights[-1][:2]], r"a constant must be .* got Double \[2\]"),
    ):
        with pytest.raises(Exception, match=message):
            torch.ops.rnn_cuda.layer(x, states, change, cell, direction, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, s, w: (x, s[:0], w[:3]), "weights: expected both biases or none"),
        (lambda x, s, w: (x, [s[0], s[0]], w), "states: expected h0 or nothing, got 2 tensors"),
        (lambda x, s, w: (x, s, [w[0], w[1].T.contiguous(), *w[2:]]), r"weight_hh .*\(3 H, H\)"),
        (lambda x, s, w: (x, s, [w[0][:5], *w[1:]]), "weight_ih must have shape"),
        (lambda x, s, w: (x, s, [*w[:3], w[3][:5]]), "a bias must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    layer = Layer("gru", requires_grad=False)
    arguments = change(layer.input, layer.states, layer.weights)
    with pytest.raises(Exception, match=message):
        torch.ops.rnn_cuda.layer(*arguments, "gru", "forward", None)


def adjoints_by_autograd(layer, grads):
    """Gradients of every h_t; also of every c_t, and of what later steps see of it."""
    input, states, weights, *_ = layer.arguments()
    kind, per_direction = cell_named(layer.cell), len(weights) // layer.directions
    hidden, count = weights[1].shape[1], kind.constants
    sizes = [input.shape[1]] * T if layer.batch_sizes is None else layer.batch_sizes.tolist()
    rows = input.flatten(0, -2).split(sizes)
    loss, all_values = 0, []
    for d in range(layer.directions):
        weight_ih, weight_hh, *others = weights[d * per_direction :][:per_direction]
        bias_ih, bias_hh = others[: len(others) - count] or (0, 0)
        kind = kind.with_constants(*others[len(others) - count :])
        state = [s[d] for s in states] or [input.new_zeros(sizes[0], hidden)] * kind.states
        outputs, values = [None] * len(sizes), [None] * len(sizes)
        for t in list(range(len(sizes)))[:: -1 if d else 1]:
            before = [part[: sizes[t]] for part in state]
            gates = kind.gates(rows[t] @ weight_ih.mT + bias_ih, before[0] @ weight_hh.mT + bias_hh)
            v = kind.carry(gates, before[-1])
            h, kept = kind.publish(gates, v) * 1, v * 1
            outputs[t] = h
            values[t] = (h, v, kept)[: kind.adjoints]
            after = (h, kept)[: kind.states]
            state = [torch.cat([n, s[sizes[t] :]]) for n, s in zip(after, state, strict=True)]
        of_output, *of_final = grads
        if of_output is not None:
            own = of_output.flatten(0, -2)[:, d * hidden :][:, :hidden]
            loss = loss + (torch.cat(outputs) * own).sum()
        for final, grad in zip(state, of_final, strict=True):
            loss = loss + (0 if grad is None else (final * grad[d]).sum())
        all_values.append([list(each) for each in zip(*values, strict=True)])
    flat = [value for its in all_values for each in its for value in each]
    loss = loss + 0 * flat[0].sum()  # there may be no gradient at all
    found = iter(torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True))
    shape = (*input.shape[:-1], hidden)
    adjoints = [
        [torch.cat([next(found) for _ in v]).view(shape) for v in its] for its in all_values
    ]
    norms = [torch.stack([a.norm(dim=-1) for a in each]) for each in zip(*adjoints, strict=True)]
    return norms + [torch.cat(each, -1) for each in zip(*adjoints, strict=True)]


def adjoints_of(layer, results, grads, norms=True, vectors=True):
    states = cell_named(layer.cell).states
    input, all_states, weights, *options = layer.arguments()
    wanted = [False] * len(layer.tensors) + [norms, vectors]
    return torch.ops.rnn_cuda.layer_gradients(
        *(grads, input, all_states, weights, results[0], results[1 + states :], *options, wanted)
    )


@pytest.mark.parametrize("given", ["all", "output", "final states", "one direction", "nothing"])
@pytest.mark.parametrize("case", ["dense", "packed_both", "no_state", "no_bias", "several_panels"])
@pytest.mark.parametrize("cell", LAYERS)
def test_adjoints_are_the_gradients_of_every_state(cell, case, given):
    layer = Layer(cell, **CASES[case])
    with torch.no_grad():
        results = layer.ours(operator="layer_forward", saves=True)
        grads = [torch.randn_like(result) for result in results[: 1 + cell_named(cell).states]]
    if given == "one direction":
        for grad in grads:
            (grad[..., H:] if grad is grads[0] else grad[1:]).zero_()
    grads[1:] = [None if given in ("output", "nothing") else grad for grad in grads[1:]]
    grads[0] = None if given in ("final states", "nothing") else grads[0]
    expected = adjoints_by_autograd(layer, grads)
    with torch.no_grad():
        close(adjoints_of(layer, results, grads), expected)
        count = cell_named(cell).adjoints
        close(adjoints_of(layer, results, grads, vectors=False), expected[:count])
        close(adjoints_of(layer, results, grads, norms=False), expected[count:])
    by_parts = adjoints_of(layer, results, grads)
    assert given == "nothing" or by_parts[0].requires_grad
    close(by_parts, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", LAYERS)
def test_adjoints_of_narrow_types_are_in_compute_precision(cell, dtype):
    layer = Layer(cell, dtype, bidirectional=True)
    exact = Layer(cell, bidirectional=True)
    exact.tensors = [tensor.detach().double().requires_grad_() for tensor in layer.tensors]
    with torch.no_grad():
        results = layer.ours(operator="layer_forward", saves=True)
        grads = [torch.randn_like(result) for result in results[: 1 + cell_named(cell).states]]
        found = adjoints_of(layer, results, grads)
    expected = adjoints_by_autograd(exact, [grad.double() for grad in grads])
    count = cell_named(cell).adjoints
    wide = reference.compute_dtype(dtype)
    assert [each.dtype for each in found] == [torch.float64] * count + [wide] * count
    for each, exactly in zip(found, expected, strict=True):
        assert (each - exactly).norm() < 8 * torch.finfo(dtype).eps * exactly.norm()


def test_the_eager_operators_refuse_what_they_would_lose():
    layer = Layer("gru", requires_grad=False)

    def call(x):
        return layer.ours(x, *layer.tensors[1:])[0]

    with pytest.raises(NotImplementedError, match="call rnn_cuda::layer_forward"):
        torch.func.jvp(call, (layer.input,), (layer.input,))
    with pytest.raises(NotImplementedError), torch.autograd.forward_ad.dual_level():
        call(torch.autograd.forward_ad.make_dual(layer.input, layer.input))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("gates", "exposes"), sorted(KERNEL_FORMS))
def test_every_form_of_the_linear_recurrence_has_its_derivatives(gates, exposes, transposed):
    features = [gates + 1 + 2 * exposes, 1 + exposes, 1 + exposes]  # of d, g and y0, times H
    d, g, y0 = (torch.randn(3, 2, 2 * f).double().requires_grad_() for f in features)
    m = torch.randn(2 * (gates + exposes), 2).double().requires_grad_()
    starts = () if transposed else (y0[0].detach().requires_grad_(),)

    def call(d, g, m, *starts):
        start = starts[0] if starts else None
        return torch.ops.rnn_cuda.linear_recurrence(d, g, m, start, True, None, transposed)

    torch.autograd.gradcheck(call, (d, g, m, *starts), check_forward_ad=True)
    torch.autograd.gradgradcheck(call, (d, g, m, *starts), check_fwd_over_rev=True)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [FusedGRU, FusedLSTM])
def test_a_long_sequence_that_goes_back_in_segments_has_torchs_gradients(kind, bidirectional):
    hidden, length = 64, 2100  # three segments
    torch.manual_seed(0)
    layer = kind(2, hidden, bidirectional=bidirectional, dtype=torch.float64)
    x = torch.randn(length, 1, 2, dtype=torch.float64, requires_grad=True)
    outcomes = []
    for module in (layer, layer.to_torch()):
        states = [x.new_ones(1 + bidirectional, 1, hidden).requires_grad_() for _ in range(2)]
        with GradientFlow(module, vectors=True) as flow:
            output, finals = module(x, tuple(states) if kind is FusedLSTM else states[0])
        results = [output, *finals] if kind is FusedLSTM else [output, finals]
        inputs = [x, *states[: len(results) - 1], *module.parameters()]
        weights = torch.linspace(1, 2, length, dtype=torch.float64)[:, None, None]
        loss = (output * weights).sum() + sum(final.sin().sum() for final in results[1:])
        gradients = torch.autograd.grad(loss, inputs)
        records = [(r.adjoint, r.adjoint_norm, r.cell_adjoint) for r in flow.records]
        outcomes.append((gradients, [t for r in records for t in r if t is not None]))
    torch.testing.assert_close(*outcomes, rtol=1e-10, atol=1e-10)
