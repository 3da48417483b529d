"""Models that leave eager PyTorch: TorchScript, traces, ``torch.fx``, ONNX in ONNX Runtime.

What leaves computes what the eager model does; ``torch.export`` is in ``test_compile.py``.
"""

import io
import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnn_cuda import (
    AntisymmetricRNN,
    FusedGRU,
    FusedGRUCell,
    FusedLSTM,
    FusedLSTMCell,
    FusedRNN,
    FusedRNNCell,
    LeakyRNN,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning:torch.*",
    "ignore::torch.jit.TracerWarning",  # as of torch.nn.RNN: sizes are checked
)

I, H = 3, 4
NONLINEARITIES = ["tanh", "relu", "sigmoid", "identity", "softplus"]
KINDS = [FusedRNN, FusedGRU, LeakyRNN, AntisymmetricRNN]
ONE_DIRECTION = {"bias": False, "batch_first": True}
BOTH_DIRECTIONS = {"num_layers": 2, "bidirectional": True, "dropout": 0.5}
OPTIONS = pytest.mark.parametrize(
    "options", [ONE_DIRECTION, BOTH_DIRECTIONS], ids=["one_direction", "both_directions"]
)


class Dense(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, hx: Tensor | None = None):
        output, h_n = self.rnn(x, hx)
        return 2 * output, h_n


class Packed(nn.Module):
    def __init__(self, rnn, enforce_sorted: bool = False):
        super().__init__()
        self.rnn = rnn
        self.enforce_sorted = enforce_sorted
        self.batch_first: bool = rnn.batch_first

    def forward(self, x: Tensor, lengths: Tensor, hx: Tensor | None = None):
        packed = pack_padded_sequence(x, lengths, self.batch_first, self.enforce_sorted)
        output, h_n = self.rnn(packed, hx)
        return pad_packed_sequence(output, self.batch_first)[0], h_n


class DenseLSTM(Dense):
    def forward(self, x: Tensor, hx: Tensor | None = None):
        output, (h_n, c_n) = self.rnn(x, None if hx is None else (hx, 2 * hx))
        return 2 * output, h_n, c_n


class PackedLSTM(Packed):
    def forward(self, x: Tensor, lengths: Tensor, hx: Tensor | None = None):
        packed = pack_padded_sequence(x, lengths, self.batch_first, self.enforce_sorted)
        output, (h_n, c_n) = self.rnn(packed, None if hx is None else (hx, 2 * hx))
        return pad_packed_sequence(output, self.batch_first)[0], h_n, c_n


class Stepping(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor):
        return self.cell(x, self.cell(x, h)) + self.cell(x)


class SteppingLSTM(Stepping):
    def forward(self, x: Tensor, h: Tensor):
        return self.cell(x, self.cell(x, (h, 2 * h)))[1] + self.cell(x)[0]


def dense_model(rnn):
    return (DenseLSTM if isinstance(rnn, FusedLSTM) else Dense)(rnn)


def layer(kind, nonlinearity, options, dtype=torch.float64):
    if nonlinearity is not None:
        options = {"nonlinearity": nonlinearity, **options}
    return kind(I, H, **options).to(dtype).eval()


def sequence(rnn, T, B):
    shape = (B, T) if rnn.batch_first else (T, B)
    return torch.randn(*shape, I, dtype=rnn.weight_hh_l0.dtype)


def state(rnn, B):
    rows = rnn.num_layers * (2 if rnn.bidirectional else 1)
    return torch.randn(rows, B, H, dtype=rnn.weight_hh_l0.dtype)


def through_a_file(module):
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


def assert_same(module, model, arguments, rtol=1e-12):
    """Values and the gradients of all weights."""
    outcomes = []
    for each in (module, model):
        results = each(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        loss = sum(result.square().sum() for result in results)
        outcomes.append((*results, *torch.autograd.grad(loss, list(each.parameters()))))
    torch.testing.assert_close(*outcomes, rtol=rtol, atol=rtol)


# ---- TorchScript ---------------------------------------------------------------------------------


def problems(rnn):
    """Each way to call a layer: a model, example arguments, and others of other sizes."""
    model, packed = dense_model(rnn), (PackedLSTM if isinstance(rnn, FusedLSTM) else Packed)(rnn)
    few, many = torch.tensor([2, 5, 3]), torch.tensor([6, 1])
    return [
        (model, (sequence(rnn, 5, 3),), (sequence(rnn, 7, 2),)),
        (model, (sequence(rnn, 5, 3), state(rnn, 3)), (sequence(rnn, 1, 1), state(rnn, 1))),
        (model, (torch.randn(5, I).double(),), (torch.randn(2, I).double(),)),
        (packed, (sequence(rnn, 5, 3), few), (sequence(rnn, 6, 2), many)),
        (
            packed,
            (sequence(rnn, 5, 3), few, state(rnn, 3)),
            (sequence(rnn, 6, 2), many, state(rnn, 2)),
        ),
    ]


# tanh and relu are PyTorch's own operators, all else is a loop: each in one direction and in both.
@pytest.mark.parametrize(
    ("kind", "nonlinearity", "options"),
    [
        (FusedRNN, "tanh", ONE_DIRECTION),
        (FusedRNN, "relu", BOTH_DIRECTIONS),
        (FusedRNN, "sigmoid", BOTH_DIRECTIONS),
        (FusedRNN, "identity", ONE_DIRECTION),
        (LeakyRNN, "tanh", BOTH_DIRECTIONS),
        (AntisymmetricRNN, "relu", ONE_DIRECTION),
        (FusedGRU, None, BOTH_DIRECTIONS),
        (FusedLSTM, None, BOTH_DIRECTIONS),
        (FusedLSTM, None, ONE_DIRECTION),
    ],
)
def test_scripted_and_traced_models_saved_and_loaded_compute_the_same(kind, nonlinearity, options):
    rnn = layer(kind, nonlinearity, options)
    with torch.jit.optimized_execution(False):  # which takes most of the time
        for model, example, other in problems(rnn):
            scripted = through_a_file(torch.jit.script(model))
            traced = through_a_file(torch.jit.trace(model, example, check_trace=False))
            for arguments in (example, other):
                assert_same(scripted, model, arguments)
                assert_same(traced, model, arguments)


def test_a_scripted_model_shares_its_weights_with_the_model_which_is_left_as_it_is():
    rnn = FusedRNN(I, H, nonlinearity="sigmoid")
    model = Dense(rnn).eval()
    scripted = torch.jit.script(model)
    assert model.rnn is rnn
    assert type(rnn) is FusedRNN
    assert list(scripted.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(-1)
    assert_same(scripted, model, (torch.randn(5, 3, I),), rtol=1e-5)

    rnn.weight_hh_l0 = nn.Parameter(torch.zeros(H, H))  # another one, scripted again
    assert_same(torch.jit.script(model), model, (torch.randn(5, 3, I),), rtol=1e-5)


def test_a_layer_itself_can_be_traced_before_and_after_it_was_scripted():
    rnn, x = FusedRNN(I, H, dtype=torch.float64), torch.randn(5, 3, I).double()
    assert_same(torch.jit.trace(rnn, x), rnn, (x,))
    torch.jit.script(Dense(rnn))
    assert_same(torch.jit.trace(rnn, x), rnn, (x,))


def test_a_bias_that_was_set_to_none_counts_as_zeros():
    rnn, x = FusedRNN(I, H, dtype=torch.float64), torch.randn(5, 3, I).double()
    rnn.bias_hh_l0 = None
    model = Dense(rnn)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_saved_models_run_in_a_process_without_this_package(tmp_path):
    problems = {
        Dense(layer(FusedRNN, "sigmoid", BOTH_DIRECTIONS)).eval(): (torch.randn(5, 3, I).double(),),
        Stepping(FusedRNNCell(I, H)): (torch.randn(3, I), torch.randn(3, H)),
    }
    for number, (model, arguments) in enumerate(problems.items()):
        torch.jit.script(model).save(tmp_path / f"{number}_scripted.pt")
        torch.jit.trace(model, arguments).save(tmp_path / f"{number}_traced.pt")
        results = model(*arguments)
        loss = (results[0] if isinstance(results, tuple) else results).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        torch.save((arguments, results, gradients), tmp_path / f"{number}.pt")
    subprocess.run([sys.executable, "-c", LOAD, tmp_path], check=True)


LOAD = """
import pathlib, sys
import torch

folder = pathlib.Path(sys.argv[1])
for path in folder.glob("*_*.pt"):
    arguments, expected, gradients = torch.load(folder / (path.name[0] + ".pt"))
    model = torch.jit.load(path)
    for _ in range(3):  # compiled anew once it has been seen
        model.zero_grad()
        results = model(*arguments)
        (results[0] if isinstance(results, tuple) else results).sum().backward()
        torch.testing.assert_close(results, expected)
        torch.testing.assert_close(tuple(w.grad for w in model.parameters()), gradients)
assert "rnn_cuda" not in sys.modules
"""


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_a_scripted_layer_refuses_a_state_of_another_batch(nonlinearity):
    scripted = torch.jit.script(Dense(FusedRNN(I, H, nonlinearity=nonlinearity)))
    with pytest.raises(torch.jit.Error, match=r"Expected hidden size \[1, 3, 4\] of hx"):
        scripted(torch.randn(5, 3, I), torch.randn(1, 1, H))


class Tenfold(FusedRNN):
    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return 10 * output, h_n


def test_scripting_does_not_pass_by_a_forward_that_was_overridden():
    with pytest.raises(Exception, match="super"):  # what TorchScript says of nn.RNN's subclasses
        torch.jit.script(Dense(Tenfold(I, H)))


@pytest.mark.parametrize(
    ("kind", "nonlinearity", "bias"),
    [
        *zip([FusedRNNCell] * 5, NONLINEARITIES, [True, False, False, True, True], strict=True),
        (FusedGRUCell, None, True),
        (FusedLSTMCell, None, False),
    ],
)
def test_scripted_and_traced_cells_saved_and_loaded_compute_the_same(kind, nonlinearity, bias):
    cell = layer(kind, nonlinearity, {"bias": bias})
    is_lstm = kind is FusedLSTMCell
    model = (SteppingLSTM if is_lstm else Stepping)(cell)
    for shape in ((2,), ()):
        x, h = torch.randn(*shape, I).double(), torch.randn(*shape, H).double()
        assert_same(through_a_file(torch.jit.script(model)), model, (x, h))
        assert_same(through_a_file(torch.jit.trace(model, (x, h))), model, (x, h))
        assert_same(torch.jit.script(cell), cell, (x, (h, 2 * h) if is_lstm else h))
    with pytest.raises(
        torch.jit.Error, match="batch size 2 doesn't match hidden0 batch size 1 of hx"
    ):
        torch.jit.script(model)(torch.randn(2, I).double(), torch.randn(1, H).double())


# ---- torch.fx ------------------------------------------------------------------------------------


def fx_targets(graph_module):
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("kind", [nn.RNN, *KINDS])
def test_a_model_that_torch_fx_has_traced_calls_the_layer(kind):
    model = Dense(kind(I, H, dtype=torch.float64))
    traced = torch.fx.symbolic_trace(model)
    assert fx_targets(traced) == ["rnn"]
    x, hx = torch.randn(5, 3, I).double(), torch.randn(1, 3, H).double()
    assert_same(traced, model, (x, hx))
    assert_same(traced, model, (x, None))
    packed = nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 1]])
    output, _ = torch.fx.symbolic_trace(nn.Sequential(model.rnn))(packed)
    assert torch.equal(output.data, model.rnn(packed)[0].data)


@pytest.mark.parametrize("kind", [nn.RNNCell, FusedRNNCell, FusedGRUCell])
def test_a_model_that_torch_fx_has_traced_calls_the_cell(kind):
    model = Stepping(kind(I, H, dtype=torch.float64))
    traced = torch.fx.symbolic_trace(model)
    assert fx_targets(traced) == ["cell"] * 3
    assert_same(traced, model, (torch.randn(3, I).double(), torch.randn(3, H).double()))


@pytest.mark.parametrize("model", [Dense(Tenfold(I, H).double()), Dense(FusedRNN(I, H).double())])
def test_torch_fx_applies_hooks_and_overridden_methods_once(model):
    model.rnn.register_forward_pre_hook(lambda module, arguments: (3 * arguments[0],))
    model.rnn.register_forward_hook(lambda module, arguments, results: (results[0] + 1, results[1]))
    traced = torch.fx.symbolic_trace(model, concrete_args={"hx": None})
    assert_same(traced, model, (torch.randn(5, 3, I).double(), None))


# ---- ONNX ----------------------------------------------------------------------------------------

# ONNX Runtime has products of its own; float16 is what it rounds inputs and outputs to.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3}


def export(model, arguments, axes, *, dynamo):
    """The exported model; ``axes`` are names of dynamic axes of each argument."""
    if dynamo:
        program = torch.onnx.export(
            model, arguments, dynamo=True, verbose=False, dynamic_shapes=tuple(axes)
        )
        return program.model_proto
    names = [f"input_{i}" for i in range(len(arguments))]
    file = io.BytesIO()
    torch.onnx.export(
        model,
        arguments,
        file,
        dynamo=False,
        input_names=names,
        dynamic_axes=dict(zip(names, axes, strict=True)),
    )
    return onnx.load_from_string(file.getvalue())


def dense_problem(rnn, T, B, with_state):
    return (sequence(rnn, T, B), state(rnn, B))[: 1 + with_state]


def dense_axes(rnn, with_state):
    axes = {0: "B", 1: "T"} if rnn.batch_first else {0: "T", 1: "B"}
    return [axes, {1: "B"}][: 1 + with_state]


def assert_runtime_computes(exported, model, problem_list):
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    names = [input.name for input in session.get_inputs()]
    for arguments in problem_list:
        feed = {name: a.numpy() for name, a in zip(names, arguments, strict=True)}
        results = [torch.from_numpy(result) for result in session.run(None, feed)]
        expected = model(*arguments)
        expected = list(expected) if isinstance(expected, tuple) else [expected]
        tolerance = TOLERANCE[expected[0].dtype]
        torch.testing.assert_close(results, expected, rtol=tolerance, atol=tolerance)


def operators(exported):
    return [node.op_type for node in exported.graph.node]


def assert_exports(rnn, with_state, *, dynamo):
    model = dense_model(rnn).eval()
    axes = dense_axes(rnn, with_state)
    exported = export(model, dense_problem(rnn, 5, 3, with_state), axes, dynamo=dynamo)
    sizes = [(5, 3), (7, 2), (1, 1)]
    assert_runtime_computes(
        exported, model, [dense_problem(rnn, T, B, with_state) for T, B in sizes]
    )
    return operators(exported)


@OPTIONS
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_a_layer_exports_as_onnx_operators_from_a_trace(nonlinearity, options):
    dtypes, both = (torch.float32, torch.float16), options is BOTH_DIRECTIONS
    high, low = divmod(NONLINEARITIES.index(nonlinearity), 2)
    rnn = layer(FusedRNN, nonlinearity, options, dtypes[low ^ both])
    found = assert_exports(rnn, bool(high ^ both), dynamo=False)
    assert found.count("RNN") == rnn.num_layers


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [FusedGRU, FusedLSTM])
def test_a_gated_layer_exports_as_onnx_operators(kind, dynamo):
    name = kind.__name__.removeprefix("Fused")
    rnn = layer(kind, None, BOTH_DIRECTIONS, torch.float32)
    assert assert_exports(rnn, True, dynamo=dynamo).count(name) == rnn.num_layers
    rnn = layer(kind, None, ONE_DIRECTION, torch.float16)
    assert assert_exports(rnn, False, dynamo=dynamo).count(name) == 1


@OPTIONS
@pytest.mark.parametrize("kind", [FusedRNN, LeakyRNN, AntisymmetricRNN])
def test_what_onnx_runtime_has_no_operator_for_exports_as_loops_from_a_trace(kind, options):
    # ONNX's runtime has softplus in float32 alone.
    for nonlinearity, with_state in zip(NONLINEARITIES[:-1], itertools.cycle([False, True])):
        rnn = layer(kind, nonlinearity, options)
        found = assert_exports(rnn, with_state, dynamo=False)
        assert found.count("Loop") == len(rnn.all_weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nonlinearity", "dtype", "options", "with_state"),
    [
        ("tanh", torch.float32, BOTH_DIRECTIONS, True),
        ("relu", torch.float32, ONE_DIRECTION, False),
        ("sigmoid", torch.float32, BOTH_DIRECTIONS, False),
        ("identity", torch.float16, ONE_DIRECTION, True),
    ],
)
def test_a_layer_exports_as_onnx_operators_with_dynamo(nonlinearity, dtype, options, with_state):
    rnn = layer(FusedRNN, nonlinearity, options, dtype)
    assert assert_exports(rnn, with_state, dynamo=True).count("RNN") == rnn.num_layers


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "directions"), [(FusedRNN, 2), (LeakyRNN, 1)])
def test_what_onnx_runtime_has_no_operator_for_exports_as_loops_with_dynamo(kind, directions):
    rnn = layer(kind, "sigmoid", {"bidirectional": directions == 2})
    assert assert_exports(rnn, True, dynamo=True).count("Scan") == directions


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_unbatched_sequence_exports(dynamo):
    model = Dense(layer(FusedRNN, "tanh", BOTH_DIRECTIONS, torch.float32)).eval()
    arguments = torch.randn(5, I), torch.randn(4, H)
    exported = export(model, arguments, [{0: "T"}, {}], dynamo=dynamo)
    assert_runtime_computes(exported, model, [arguments, (torch.randn(2, I), arguments[1])])


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_cell_exports(dynamo):
    model = Stepping(FusedRNNCell(I, H, nonlinearity="sigmoid", dtype=torch.float64)).eval()
    arguments = torch.randn(2, I).double(), torch.randn(2, H).double()
    exported = export(model, arguments, [{0: "B"}, {0: "B"}], dynamo=dynamo)
    other = torch.randn(5, I).double(), torch.randn(5, H).double()
    assert_runtime_computes(exported, model, [arguments, other])


@OPTIONS
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_packed_sequences_export_from_a_trace(nonlinearity, options):
    # Each value of everything with each of everything else.
    high, low = divmod(NONLINEARITIES.index(nonlinearity), 2)
    both = int(options is BOTH_DIRECTIONS)
    with_state, enforce_sorted = bool(low ^ both), bool(high ^ both)
    dtype = torch.float16 if high ^ low ^ both else torch.float32
    assert_packed_exports(layer(FusedRNN, nonlinearity, options, dtype), with_state, enforce_sorted)


@pytest.mark.parametrize("kind", [FusedGRU, FusedLSTM])
def test_packed_sequences_of_gated_layers_export_from_a_trace(kind):
    assert_packed_exports(layer(kind, None, BOTH_DIRECTIONS, torch.float32), True, False)


def assert_packed_exports(rnn, with_state, enforce_sorted):
    model = (PackedLSTM if isinstance(rnn, FusedLSTM) else Packed)(rnn, enforce_sorted).eval()

    def problem(*lengths):
        dense = dense_problem(rnn, max(lengths), len(lengths), with_state)
        return dense[0], torch.tensor(lengths), *dense[1:]

    axes = dense_axes(rnn, with_state)
    axes.insert(1, {0: "B"})
    exported = export(model, problem(5, 3, 2), axes, dynamo=False)
    others = [problem(7, 7, 1, 1), problem(3)] + ([] if enforce_sorted else [problem(2, 5, 4)])
    assert_runtime_computes(exported, model, others)


# ---- the page ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_of_the_page_runs_as_printed(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "example.py").write_text(code)  # TorchScript reads the source
    scope = runpy.run_path(str(tmp_path / "example.py"), run_name="example")
    for module in (scope["scripted"], scope["traced"], scope["graph_module"]):
        torch.testing.assert_close(module(scope["x"]), scope["model"](scope["x"]))
    assert operators(onnx.load_from_string(scope["file"].getvalue())).count("RNN") == 1
    assert operators(scope["program"].model_proto).count("RNN") == 1
