"""Recorded adjoints against autograd through cells written out in float64 (tests/unrolled.py)."""

import contextlib
import gc
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import rnn_cuda
from benchmarks import instruments as benchmark
from rnn_cuda import FusedRNN, backend
from rnn_cuda.instruments import GradientFlow, adjoint
from tests.unrolled import adjoints

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).parents[1] / "docs" / "instruments.md"
T, B, I, H = 7, 3, 4, 6
LENGTHS = (4, 7, 5)  # of a packed batch: not sorted
MODELS = {
    "FusedRNN": FusedRNN,
    "FusedRNN_relu": lambda *a, **k: FusedRNN(*a, nonlinearity="relu", **k),
    "FusedRNN_sigmoid": lambda *a, **k: FusedRNN(*a, nonlinearity="sigmoid", **k),
    "RNN": nn.RNN,
    "RNN_relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
    "LSTM": nn.LSTM,
    "LSTM_projected": lambda *a, **k: nn.LSTM(*a, proj_size=2, **k),
    "GRU": nn.GRU,
    "LeakyRNN": rnn_cuda.LeakyRNN,
    "AntisymmetricRNN": rnn_cuda.AntisymmetricRNN,
}
LAYOUTS = ("dense", "batch_first", "packed", "unbatched")
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
main_models = pytest.mark.parametrize("make", [FusedRNN, nn.RNN, nn.LSTM, nn.GRU])
needs_native = pytest.mark.skipif(
    not backend.use_native("cpu", torch.float64), reason="the reference is the active backend"
)
TERMS = ("output", "h_n", "c_n")  # that a loss may read


class Problem:
    """A module, an input in one of the layouts, and a loss linear in what the module returns."""

    def __init__(self, make, layout="dense", *, initial=True, terms=TERMS, **options):
        torch.manual_seed(0)
        options = {"num_layers": 2, "bidirectional": True} | options
        self.module = make(I, H, batch_first=layout == "batch_first", **options).double()
        self.layout, self.terms = layout, terms
        batch = 1 if layout == "unbatched" else B
        lengths = LENGTHS if layout == "packed" else [T] * batch
        P = self.module.proj_size or H
        directions = 2 if self.module.bidirectional else 1
        states = self.module.num_layers * directions

        def normal(*shape):
            return torch.randn(shape, dtype=torch.float64)

        self.samples = [normal(length, I) for length in lengths]
        self.h0 = normal(states, batch, P) if initial else None
        self.c0 = normal(states, batch, H) if initial else None
        if not isinstance(self.module, nn.LSTM):
            self.c0 = None
        self.of_output = [normal(length, directions * P) for length in lengths]
        self.of_state = {"h_n": normal(states, batch, P), "c_n": normal(states, batch, H)}

    def arguments(self):
        if self.layout == "packed":
            x = pack_sequence(self.samples, enforce_sorted=False)
        else:
            x = self._sequence(self.samples)
        if self.h0 is None:
            return (x,)
        hx = self.h0 if self.c0 is None else (self.h0, self.c0)
        if self.layout == "unbatched":
            hx = tuple(s[:, 0] for s in hx) if isinstance(hx, tuple) else hx[:, 0]
        return x, hx

    def _sequence(self, samples):
        if self.layout == "unbatched":
            return samples[0]
        return torch.stack(samples, dim=0 if self.layout == "batch_first" else 1)

    def loss(self, output, states):
        h_n, c_n = states if isinstance(states, tuple) else (states, None)
        if self.layout == "packed":
            weights = pack_sequence(self.of_output, enforce_sorted=False)
            terms = {"output": (output.data * weights.data).sum()}
        else:
            terms = {"output": (output * self._sequence(self.of_output)).sum()}
        for name, state in (("h_n", h_n), ("c_n", c_n)):
            if state is not None:
                terms[name] = (state * self.of_state[name].view(state.shape)).sum()
        return sum(terms[name] for name in self.terms if name in terms)

    def loss_of_sample(self, b, run):
        terms = {"output": (run.output * self.of_output[b]).sum()}
        for name, state in (("h_n", run.h_n), ("c_n", run.c_n)):
            if state is not None:
                terms[name] = (state * self.of_state[name][:, b]).sum()
        return sum(terms[name] for name in self.terms if name in terms)

    def record(self, **options):
        with GradientFlow(self.module, **options) as flow:
            self.loss(*self.module(*self.arguments())).backward()
        return flow

    def expected(self, **options):
        return adjoints(self.module, self.samples, self.h0, self.c0, self.loss_of_sample, **options)


def assert_close(actual, expected, tolerance=1e-12):
    """Each row, a time step of a sample, is right in proportion to its own norm."""
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = actual.double().nan_to_num(), expected.nan_to_num()
    if actual.dim() == 2:
        actual, expected = actual.unsqueeze(-1), expected.unsqueeze(-1)
    error = (actual - expected).norm(dim=-1)
    assert (error <= tolerance * expected.norm(dim=-1)).all(), error.max()


def assert_flow_is(flow, hidden, cell, tolerance=1e-12):
    """Compare norms, and vectors if there are, with vectors by layer."""
    assert list(flow.adjoint_norm) == list(hidden)
    assert list(flow.cell_adjoint_norm) == list(cell)
    for name, vectors in hidden.items():
        norm = vectors.norm(dim=-1)
        assert_close(flow.adjoint_norm[name], norm, tolerance)
        assert flow.adjoint_norm[name].dtype == torch.float64
        if name in cell:
            assert_close(flow.cell_adjoint_norm[name], cell[name].norm(dim=-1), tolerance)
            norm = torch.cat([vectors, cell[name]], dim=-1).norm(dim=-1)
        assert_close(flow.joint_adjoint_norm[name], norm, tolerance)
    if flow.vectors:
        for actual, expected in ((flow.adjoint, hidden), (flow.cell_adjoint, cell)):
            assert list(actual) == list(expected)
            for name, vectors in expected.items():
                assert_close(actual[name], vectors, tolerance)


# ---- values --------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adjoints_are_those_of_the_unrolled_cell(make, layout):
    problem = Problem(make, layout)
    expected = problem.expected()
    for vectors in (False, True):
        assert_flow_is(problem.record(vectors=vectors), expected.hidden, expected.cell)


@every_model
@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("term", ["output", "h_n"])
def test_a_loss_may_read_outputs_or_final_states_alone(make, layout, term):
    problem = Problem(make, layout, terms=(term,), initial=False)
    expected = problem.expected()
    assert_flow_is(problem.record(), expected.hidden, expected.cell)


@every_model
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_any_number_of_layers_and_directions_without_biases(make, bidirectional, num_layers):
    options = {"bidirectional": bidirectional, "num_layers": num_layers, "bias": False}
    problem = Problem(make, **options)
    expected = problem.expected()
    assert_flow_is(problem.record(vectors=True), expected.hidden, expected.cell)


lstms = pytest.mark.parametrize("make", [nn.LSTM, MODELS["LSTM_projected"]])


@lstms
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_a_loss_may_read_final_cells_alone(make, layout):
    problem = Problem(make, layout, terms=("c_n",), initial=False)
    expected = problem.expected()
    assert_flow_is(problem.record(), expected.hidden, expected.cell)


@lstms
def test_the_cell_adjoint_can_count_what_goes_through_the_hidden_state(make):
    problem = Problem(make, "packed")
    expected = problem.expected()
    flow = problem.record(vectors=True, cell_through_hidden=True)
    assert_flow_is(flow, expected.hidden, expected.cell_total)


def test_both_readings_of_the_cell_adjoint_are_what_stepping_torchs_own_modules_shows():
    lstm, x = nn.LSTM(I, H).double(), torch.randn(T, B, I).double()
    cell = nn.LSTMCell(I, H).double()
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in lstm.state_dict().items()})
    zeros = torch.zeros(B, H).double()

    def step_lstm(x_t, state):
        state = tuple(s.unsqueeze(0) for s in state)
        return tuple(s.squeeze(0) for s in lstm(x_t.unsqueeze(0), state)[1])

    # The h of an LSTMCell hangs on the c that it returns; that of an nn.LSTM does not.
    for step, through_hidden in ((step_lstm, False), (cell, True)):
        states = [step(x[0], (zeros, zeros))]
        for x_t in x[1:]:
            states.append(step(x_t, states[-1]))
        loss = sum(h.square().sum() for h, _ in states)
        cells = [c for _, c in states]
        adjoint = torch.autograd.grad(loss, cells, materialize_grads=True)
        with GradientFlow(lstm, vectors=True, cell_through_hidden=through_hidden) as flow:
            lstm(x)[0].square().sum().backward()
        assert_close(flow.cell_adjoint["l0"], torch.stack(adjoint))


@every_model
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_the_reference_backend_records_the_same(make, layout):
    problem = Problem(make, layout)
    expected = problem.expected()
    with backend.use("reference"):
        flow = problem.record(vectors=True)
    assert_flow_is(flow, expected.hidden, expected.cell)


@every_model
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_a_sweep_in_several_blocks_is_right(make, layout, monkeypatch):
    problem = Problem(make, layout)
    gates = problem.module.weight_hh_l0.shape[0]
    expected = problem.expected()
    for rows in (1, 5, 8):
        monkeypatch.setattr(adjoint, "_BLOCK_VALUES", rows * gates)
        assert_flow_is(problem.record(vectors=True), expected.hidden, expected.cell)


@main_models
def test_an_orthogonal_parametrization_is_seen_through(make):
    problem = Problem(make)
    rnn_cuda.remedies.orthogonal_parametrization(problem.module)
    expected = problem.expected()
    assert_flow_is(problem.record(), expected.hidden, expected.cell)


@pytest.mark.parametrize("make", [nn.RNN, nn.LSTM, nn.GRU, rnn_cuda.LeakyRNN])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_results_may_be_modified_in_place_as_autograd_allows(make, layout, num_layers):
    problem = Problem(make, layout, num_layers=num_layers)
    with GradientFlow(problem.module, vectors=True) as flow:
        output, states = problem.module(*problem.arguments())
        (output.data if layout == "packed" else output).mul_(2)
        problem.loss(output, states).backward()
    problem.of_output = [2 * w for w in problem.of_output]
    expected = problem.expected()
    assert_flow_is(flow, expected.hidden, expected.cell)


@main_models
def test_an_empty_batch_has_empty_norms(make):
    module = make(I, H)
    with GradientFlow(module) as flow:
        module(torch.zeros(T, 0, I))[0].sum().backward()
    assert flow.adjoint_norm["l0"].shape == (T, 0)


# ---- what the comparison has to reject -----------------------------------------------------------


@main_models
def test_the_direct_part_alone_is_rejected(make):
    problem = Problem(make, num_layers=1, bidirectional=False)
    output, states = problem.module(*problem.arguments())
    (direct,) = torch.autograd.grad(problem.loss(output, states), output)
    total = problem.expected().hidden["l0"]
    with pytest.raises(AssertionError):
        assert_close(direct.norm(dim=-1), total.norm(dim=-1))
    with pytest.raises(AssertionError):
        assert_close(direct.norm(dim=-1), total.norm(dim=-1), tolerance=0.1)


def test_h_without_c_is_rejected():
    problem = Problem(nn.LSTM)
    flow = problem.record()
    for mistake in ({"cuts_cell": True}, {"cuts_hidden": True}):
        wrong = problem.expected(**mistake)
        for name in wrong.hidden:
            with pytest.raises(AssertionError):
                assert_close(flow.adjoint_norm[name], wrong.hidden[name].norm(dim=-1), 0.01)


def test_the_two_readings_of_the_cell_adjoint_are_told_apart():
    problem = Problem(nn.LSTM)
    expected, flow = problem.expected(), problem.record()
    for name in expected.cell:
        with pytest.raises(AssertionError):
            assert_close(flow.cell_adjoint_norm[name], expected.cell_total[name].norm(dim=-1), 0.01)


@main_models
def test_a_step_too_late_is_rejected(make):
    problem = Problem(make)
    flow, expected = problem.record(), problem.expected().hidden
    for name, vectors in expected.items():
        with pytest.raises(AssertionError):
            assert_close(flow.adjoint_norm[name], vectors.norm(dim=-1).roll(1, 0), 0.01)


# ---- nothing else changes ------------------------------------------------------------------------


def training_step(module, x, flow):
    """Outputs, gradients and the random state of a step, after some use of random numbers."""
    torch.manual_seed(5)
    module.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    with flow:
        output, states = module(dropout(x, 0.1))
        states = states if isinstance(states, tuple) else (states,)
        # Random numbers are drawn between the call and its backward pass, too.
        (dropout(output, 0.1).square().sum() + sum(s.sum() for s in states)).backward()
    gradients = [p.grad for p in module.parameters()]
    return [output.detach(), *states, x.grad, *gradients, torch.get_rng_state()]


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_outputs_gradients_and_random_state_stay_the_same_to_the_bit(make, dtype, name):
    if name == "native" and not backend.use_native("cpu", dtype):
        pytest.skip("the reference is the active backend")
    torch.manual_seed(0)
    module = make(I, H, num_layers=3, dropout=0.5, bidirectional=True, dtype=dtype)
    x = torch.randn(T, B, I, dtype=dtype)
    with backend.use(name):
        plain = training_step(module, x, contextlib.nullcontext())
        for vectors in (False, True):
            flow = GradientFlow(module, vectors=vectors)
            recorded = training_step(module, x, flow)
            assert len(flow.adjoint_norm) == 6
            assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_parametrization_that_learns_when_it_is_read_learns_no_more_than_without(name):
    if name == "native" and not backend.use_native("cpu", torch.float32):
        pytest.skip("the reference is the active backend")
    torch.manual_seed(0)
    module = nn.utils.parametrizations.spectral_norm(FusedRNN(I, H), "weight_hh_l0")
    # Of another matrix than the vectors that it has iterated so far.
    before = {key: torch.randn_like(value) for key, value in module.state_dict().items()}
    x, results = torch.randn(T, B, I), []
    with backend.use(name):
        for flow in (contextlib.nullcontext(), GradientFlow(module)):
            module.load_state_dict(before)
            step = training_step(module, x, flow)
            results.append(step + [value.clone() for value in module.state_dict().values()])
    assert len(flow.adjoint_norm) == 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@main_models
def test_hooks_are_gone_after_the_block_and_the_graph_with_its_loss(make):
    class Passenger(torch.autograd.Function):
        """Keeps an object alive as long as the graph lives."""

        @staticmethod
        def forward(ctx, x, passenger):
            ctx.passenger = passenger
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    module, passenger = make(I, H), nn.Identity()
    gone = weakref.ref(passenger)
    gc.disable()
    try:
        x = Passenger.apply(torch.randn(T, B, I, requires_grad=True), passenger)
        with GradientFlow(module):
            output, states = module(x)
            loss = output.sum()
            loss.backward()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        del x, output, states, loss, passenger
        assert gone() is None  # no cycle holds the graph
    finally:
        gc.enable()


# ---- dropout, autocast, precision ----------------------------------------------------------------


@every_model
@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_dropout_masks_are_those_of_the_call(make, name, layout):
    problem = Problem(make, layout, dropout=0.5)
    stack, wide = problem.module, problem.module
    # The same as two modules of one layer and a dropout of the test's own between them.
    single = nn.ModuleList(
        make(size, H, bidirectional=True).double() for size in (I, 2 * (stack.proj_size or H))
    )
    for k, module in enumerate(single):
        for key, parameter in module.named_parameters():
            parameter.data = getattr(stack, key.replace("_l0", f"_l{k}")).detach()
    x, hx = problem.arguments()
    hx = hx if isinstance(hx, tuple) else (hx,)

    def run_single():
        states, sequence = [], x
        for k, module in enumerate(single):
            start = tuple(s[2 * k : 2 * k + 2] for s in hx)
            sequence, state = module(sequence, start if len(start) == 2 else start[0])
            states.append(state)
            if k == 0:
                data = sequence.data if layout == "packed" else sequence
                data = dropout(data, 0.5)
                sequence = sequence._replace(data=data) if layout == "packed" else data
        if len(hx) == 1:
            return sequence, torch.cat(states)
        return sequence, tuple(map(torch.cat, zip(*states, strict=True)))

    with backend.use(name):
        torch.manual_seed(3)
        with GradientFlow(stack, vectors=True) as flow:
            problem.loss(*wide(*problem.arguments())).backward()
        torch.manual_seed(3)
        with GradientFlow(single, vectors=True) as flow_of_single:
            problem.loss(*run_single()).backward()
    for k, suffix in ((0, ""), (0, "_reverse"), (1, ""), (1, "_reverse")):
        ours, theirs = f"l{k}{suffix}", f"{k}.l0{suffix}"
        assert_close(flow.adjoint[ours], flow_of_single.adjoint[theirs])
        if isinstance(stack, nn.LSTM):
            assert_close(flow.cell_adjoint[ours], flow_of_single.cell_adjoint[theirs])


@main_models
def test_evaluation_after_a_failed_call_uses_no_mask(make):
    problem = Problem(make, dropout=0.5)
    with GradientFlow(problem.module) as flow:
        with pytest.raises((RuntimeError, ValueError)):
            problem.module(torch.zeros(T, B, I + 1).double())
        problem.module.eval()
        problem.loss(*problem.module(*problem.arguments())).backward()
    expected = problem.expected()
    assert_flow_is(flow, expected.hidden, expected.cell)


@main_models
@pytest.mark.usefixtures("any_half_precision")
def test_autocast_is_recorded_as_it_computes(make):
    problem = Problem(make)
    expected = problem.expected()
    problem.module.float()
    problem.samples = [x.float() for x in problem.samples]
    problem.h0 = problem.h0.float()
    problem.c0 = None if problem.c0 is None else problem.c0.float()
    with GradientFlow(problem.module) as flow:
        with torch.autocast("cpu", torch.bfloat16):
            output, states = problem.module(*problem.arguments())
        problem.loss(output, states).backward()
    for name, vectors in expected.hidden.items():
        # Rounding errors of some steps with 8 bits; they add up at random.
        assert_close(flow.adjoint_norm[name], vectors.norm(dim=-1), tolerance=0.03)


@main_models
@pytest.mark.usefixtures("any_half_precision")
def test_autocasts_weights_are_those_that_it_computed_with(make):
    torch.manual_seed(0)
    module, x = make(I, H, num_layers=2), torch.randn(T, B, I)
    norms = []
    for _ in range(2):
        with GradientFlow(module) as flow:
            with torch.autocast("cpu", torch.bfloat16):
                output, _ = module(x)
            output.float().square().sum().backward()
        norms.append(flow.adjoint_norm)
        for parameter in module.parameters():  # as autocast does
            parameter.data = parameter.data.bfloat16().float()
    assert all(torch.equal(norms[0][name], norms[1][name]) for name in norms[0])


@main_models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_are_recorded(make, dtype):
    problem = Problem(make)
    problem.module.to(dtype)
    expected = problem.expected()  # of the rounded weights
    problem.samples = [x.to(dtype) for x in problem.samples]
    problem.h0 = problem.h0.to(dtype)
    problem.c0 = None if problem.c0 is None else problem.c0.to(dtype)
    flow = problem.record(vectors=True)
    for name, vectors in expected.hidden.items():
        assert flow.adjoint[name].dtype == torch.float32
        tolerance = 0.03 if dtype == torch.bfloat16 else 0.005
        assert_close(flow.adjoint_norm[name], vectors.norm(dim=-1), tolerance)


@main_models
def test_norms_of_float32_do_not_vanish_before_the_gradient(make):
    torch.manual_seed(0)
    module = make(I, 64)
    x = torch.randn(400, 2, I)
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


# ---- names and calls -----------------------------------------------------------------------------


class Translator(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.encoder = make(I, H, num_layers=2, bidirectional=True)
        self.decoder = nn.ModuleDict({"rnn": make(2 * H, H)})
        self.alias = self.encoder

    def forward(self, x):
        return self.decoder["rnn"](self.encoder(x)[0])[0]


@main_models
def test_layers_are_named_as_torch_names_their_weights(make):
    model = Translator(make)
    with GradientFlow(model) as flow:
        model(torch.randn(T, B, I)).sum().backward()
    names = ["encoder.l0", "encoder.l0_reverse", "encoder.l1", "encoder.l1_reverse"]
    assert list(flow.adjoint_norm) == [*names, "decoder.rnn.l0"]
    assert [r.layer for r in flow.records] == list(flow.adjoint_norm)


@main_models
@pytest.mark.parametrize("layout", ["dense", "batch_first", "unbatched"])
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_every_call_of_a_layer_has_its_own_entry(make, layout, name):
    problem = Problem(make, layout, num_layers=1, bidirectional=False, terms=("output",))
    problem.samples = [x[:4] for x in problem.samples]
    problem.of_output = [w[:4] for w in problem.of_output]
    expected = problem.expected()
    x, state = problem.arguments()
    time = 1 if layout == "batch_first" else 0
    with backend.use(name), GradientFlow(problem.module, vectors=True) as flow:
        outputs = []
        for x_t in x.split(1, dim=time):  # a decoder's loop
            output, state = problem.module(x_t, state)
            outputs.append(output)
        # The gradients of the outputs are parts of one tensor.
        problem.loss(torch.cat(outputs, dim=time), state).backward()
    assert list(flow.adjoint_norm) == ["l0", "l0[1]", "l0[2]", "l0[3]"]
    assert_close(torch.cat(list(flow.adjoint.values())), expected.hidden["l0"])
    if expected.cell:
        assert_close(torch.cat(list(flow.cell_adjoint.values())), expected.cell["l0"])


@main_models
def test_gradient_accumulation_keeps_micro_batches_apart_and_clear_forgets_them(make):
    model, inputs = Translator(make), torch.randn(3, T, B, I)
    alone = []
    for x in inputs:
        with GradientFlow(model) as flow:
            model(x).sum().backward()
        alone.append(flow.adjoint_norm["encoder.l1"])
    with GradientFlow(model) as flow:
        for x in inputs:
            model(x).sum().backward()
        names = ["encoder.l1", "encoder.l1[1]", "encoder.l1[2]"]
        assert [
            n for n in flow.adjoint_norm if n.startswith("encoder.l1") and "rev" not in n
        ] == names
        for name, expected in zip(names, alone, strict=True):
            assert torch.equal(flow.adjoint_norm[name], expected)
        flow.clear()
        assert flow.adjoint_norm == {}
        model(inputs[0]).sum().backward()
        assert torch.equal(flow.adjoint_norm["encoder.l1"], alone[0])
        assert len(flow.adjoint_norm) == 5


@main_models
def test_backward_passes_through_one_call_are_separate_records(make):
    problem = Problem(make)
    module, arguments = problem.module, problem.arguments()
    with GradientFlow(module, vectors=True) as flow:
        loss = problem.loss(*module(*arguments))
        loss.backward(retain_graph=True)
        (3 * loss).backward()
    expected = problem.expected()
    first, second = [r for r in flow.records if r.layer == "l0"]
    assert (first.call, first.backward, second.call, second.backward) == (0, 0, 0, 1)
    assert_close(first.adjoint, expected.hidden["l0"])
    assert_close(second.adjoint, 3 * expected.hidden["l0"])
    assert flow.adjoint["l0"] is second.adjoint


@main_models
def test_the_backward_pass_may_come_after_the_block_and_calls_there_do_not_count(make):
    problem = Problem(make)
    with GradientFlow(problem.module) as flow:
        loss = problem.loss(*problem.module(*problem.arguments()))
    assert flow.adjoint_norm == {}
    problem.loss(*problem.module(*problem.arguments())).backward()
    assert flow.records == []
    loss.backward()
    expected = problem.expected()
    assert_flow_is(flow, expected.hidden, expected.cell)


@main_models
def test_calls_without_a_graph_and_calls_that_no_loss_reads_have_no_entry(make):
    model = Translator(make)
    with GradientFlow(model) as flow:
        with torch.no_grad():
            model(torch.randn(T, B, I))
        model.encoder(torch.randn(T, B, I))
        model(torch.randn(T, B, I)).sum().backward()
    assert list(flow.adjoint_norm)[:2] == ["encoder.l0[1]", "encoder.l0_reverse[1]"]
    assert list(flow.adjoint_norm)[-1] == "decoder.rnn.l0"


@main_models
def test_gradients_asked_for_by_name_are_recorded_too(make):
    problem = Problem(make, num_layers=1)
    with GradientFlow(problem.module) as flow:
        loss = problem.loss(*problem.module(*problem.arguments()))
        torch.autograd.grad(loss, problem.module.weight_ih_l0_reverse)
    expected = problem.expected()
    assert_close(flow.adjoint_norm["l0_reverse"], expected.hidden["l0_reverse"].norm(dim=-1))
    assert problem.module.weight_ih_l0.grad is None


# ---- what is frozen, shared, checkpointed, differentiated twice ----------------------------------


@every_model
def test_frozen_layers_below_a_trained_one_are_recorded(make):
    problem = Problem(make)
    for name, parameter in problem.module.named_parameters():
        parameter.requires_grad_("_l1" in name)
    expected = problem.expected()
    assert_flow_is(problem.record(), expected.hidden, expected.cell)
    assert problem.module.weight_hh_l0.grad is None


@main_models
def test_a_frozen_module_is_recorded_where_its_input_requires_grad(make):
    problem = Problem(make)
    problem.module.requires_grad_(False)
    x, hx = problem.arguments()
    for requires_grad in (False, True):
        x.requires_grad_(requires_grad)
        readout = torch.ones((), requires_grad=True)
        with GradientFlow(problem.module) as flow:
            (readout * problem.loss(*problem.module(x, hx))).backward()
        expected = problem.expected().hidden if requires_grad else {}
        assert list(flow.adjoint_norm) == list(expected)
        for name, vectors in expected.items():
            assert_close(flow.adjoint_norm[name], vectors.norm(dim=-1))


@main_models
def test_layers_that_share_their_weights_have_adjoints_of_their_own(make):
    problem = Problem(make, bidirectional=False)
    for kind in ("weight_hh", "bias_ih", "bias_hh"):
        setattr(problem.module, f"{kind}_l1", getattr(problem.module, f"{kind}_l0"))
    expected = problem.expected()
    assert_flow_is(problem.record(), expected.hidden, expected.cell)


@main_models
def test_a_checkpoint_is_seen_through(make):
    problem = Problem(make, dropout=0.5)
    flows = []
    for run in (problem.module, lambda *a: checkpoint(problem.module, *a, use_reentrant=False)):
        torch.manual_seed(1)
        with GradientFlow(problem.module) as flow:
            problem.loss(*run(*problem.arguments())).backward()
        flows.append(flow)
    plain, checkpointed = flows
    assert list(plain.adjoint_norm) == list(checkpointed.adjoint_norm)
    for name, norm in plain.adjoint_norm.items():
        assert torch.equal(checkpointed.adjoint_norm[name], norm)


@main_models
def test_a_reentrant_checkpoint_is_refused(make):
    module = make(I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    with GradientFlow(module):
        output, _ = checkpoint(module, x, use_reentrant=True)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            output.sum().backward()


def gradient_penalty(x, output):
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    return gradient.square().sum()


@needs_native
def test_the_adjoints_of_a_gradient_penalty_are_exact_for_the_fused_rnn():
    problem = Problem(FusedRNN, num_layers=1, initial=False)
    x = problem.arguments()[0].requires_grad_()
    with GradientFlow(problem.module, vectors=True) as flow:
        gradient_penalty(x, problem.module(x)[0]).backward()
    problem.loss_of_sample = lambda b, run: gradient_penalty(run.input, run.output)
    assert_flow_is(flow, problem.expected().hidden, {})
    assert [r.backward for r in flow.records] == [0, 1, 0, 1]


@pytest.mark.parametrize("make", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_gradient_penalty_is_not_recorded_for_torchs_modules(make):
    problem = Problem(make, num_layers=1, initial=False)
    x = problem.arguments()[0].requires_grad_()
    with GradientFlow(problem.module, vectors=True) as flow:
        penalty = gradient_penalty(x, problem.module(x)[0])
        with pytest.warns(UserWarning, match="does not record"):
            penalty.backward()
    problem.loss_of_sample = lambda b, run: run.output.square().sum()
    assert_flow_is(flow, problem.expected().hidden, problem.expected().cell)


def test_the_documentations_example_runs_as_printed():
    section = PAGE.read_text().split("## Gradient flow")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    scope = {}
    exec(compile(example, PAGE.name, "exec"), scope)
    assert scope["norm"].shape == scope["cell"].shape == scope["both"].shape == (50, 16)
    assert scope["vectors"].shape == (50, 16, 32)


def test_the_benchmark_has_a_row_for_every_module():
    printed = str(benchmark.recording_table(((4, 2, 3, 5),), rounds=1))
    assert all(name in printed for name in ("FusedRNN", "RNN", "LSTM", "GRU", "4, 2, 3, 5"))


# ---- errors --------------------------------------------------------------------------------------


def test_a_model_without_recurrent_layers_is_refused():
    with pytest.raises(ValueError, match=r"nn\.LSTM or nn\.GRU somewhere in it"):
        GradientFlow(nn.Linear(2, 3))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
        GradientFlow(3)


@main_models
def test_a_compiled_model_is_refused(make):
    with pytest.raises(ValueError, match="compiled"):
        GradientFlow(torch.compile(make(I, H)))
    model = nn.Sequential(make(I, H))
    model[0].compile()
    with pytest.raises(ValueError, match="model: 0 is compiled"):
        GradientFlow(model)


@main_models
def test_vectors_that_were_not_recorded_are_refused(make):
    flow = Problem(make).record()
    for name in ("adjoint", "cell_adjoint"):
        with pytest.raises(RuntimeError, match="vectors=True"):
            getattr(flow, name)


@main_models
def test_a_flow_cannot_be_entered_twice_at_a_time_but_again(make):
    problem = Problem(make)
    flow = GradientFlow(problem.module)
    with flow, pytest.raises(RuntimeError, match="recording already"), flow:
        pass
    with flow:
        problem.loss(*problem.module(*problem.arguments())).backward()
    assert len(flow.adjoint_norm) == 4


@pytest.mark.parametrize("make", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_weight_that_was_changed_before_the_backward_pass_is_noticed(make):
    problem = Problem(make)
    with GradientFlow(problem.module), torch.no_grad():
        with torch.enable_grad():
            loss = problem.loss(*problem.module(*problem.arguments()))
        problem.module.bias_ih_l0.add_(1)  # which autograd does not need again
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@main_models
def test_transforms_are_refused(make):
    module = make(I, H)
    parameters = dict(module.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(module, parameters, torch.randn(T, B, I))[0].sum()

    with GradientFlow(module), pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(loss)(parameters)


@main_models
def test_a_mapped_backward_pass_is_refused(make):
    module = make(I, H)
    with GradientFlow(module):
        output, _ = module(torch.randn(T, B, I))
        cotangents = torch.randn(2, T, B, H)
        with pytest.raises(RuntimeError, match="vmap"):
            torch.autograd.grad(output, module.weight_hh_l0, cotangents, is_grads_batched=True)


def test_an_unknown_recurrence_is_refused():
    class Other(FusedRNN):
        def _layer(self, *args):
            output, h_n = super()._layer(*args)
            return 2 * output, 2 * h_n

    module = Other(I, H)
    with GradientFlow(module), pytest.raises(TypeError, match="recurrence of a Other"):
        module(torch.randn(T, B, I))
