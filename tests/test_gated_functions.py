"""FusedGRU and FusedLSTM with other functions than tanh and sigmoid, beside loops over time."""

import itertools

import pytest
import torch
from torch import nn

from rnn_cuda import FusedGRU, FusedGRUCell, FusedLSTM, FusedLSTMCell
from rnn_cuda.cells.elman import GATED_NONLINEARITIES
from tests.layers import flat_results, halves, normal

FUNCTIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": lambda z: torch.clamp(z / 6 + 0.5, 0, 1),
    "identity": lambda z: z,
}
KINDS = {FusedGRU: FusedGRUCell, FusedLSTM: FusedLSTMCell}
both_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
T, B, I, H = 5, 3, 4, 6


def make(kind, nonlinearity, gate_nonlinearity, dtype=torch.float64, **options):
    torch.manual_seed(0)
    functions = {"nonlinearity": nonlinearity, "gate_nonlinearity": gate_nonlinearity}
    return kind(I, H, **functions, dtype=dtype, **options)


def unrolled(layer, x, hx):
    """All h_t, and the final states."""
    f, g = FUNCTIONS[layer.nonlinearity], FUNCTIONS[layer.gate_nonlinearity]
    w, u, b, d = layer.all_weights[0]
    h, *c = (state[0] for state in hx)
    outputs = []
    for x_t in x:
        of_x, of_h = x_t @ w.T + b, h @ u.T + d
        if isinstance(layer, FusedLSTM):
            i, forget, new, o = (of_x + of_h).chunk(4, -1)
            c = [g(forget) * c[0] + g(i) * f(new)]
            h = g(o) * f(c[0])
        else:
            (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.chunk(3, -1), of_h.chunk(3, -1)
            z = g(x_z + h_z)
            h = (1 - z) * f(x_n + g(x_r + h_r) * h_n) + z * h
        outputs.append(h)
    return [torch.stack(outputs), *(state.unsqueeze(0) for state in (h, *c))]


def problem(kind):
    # Small, since what has no bounds grows from step to step.
    x, *hx = ((normal(*shape) / 4).requires_grad_() for shape in ((T, B, I), (1, B, H), (1, B, H)))
    return x, hx[: 2 if kind is FusedLSTM else 1]


def run(layer, x, hx):
    return flat_results(layer(x, tuple(hx) if len(hx) == 2 else hx[0]))


def gradients(results, inputs):
    return torch.autograd.grad(sum(r.sin().sum() for r in results), inputs, create_graph=True)


@both_kinds
@pytest.mark.parametrize("functions", itertools.product(GATED_NONLINEARITIES, repeat=2), ids=str)
def test_values_and_gradients_are_those_of_a_loop(functions, kind):
    layer, (x, hx) = make(kind, *functions), problem(kind)
    inputs = [x, *hx, *layer.parameters()]
    actual, expected = run(layer, x, hx), unrolled(layer, x, hx)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(actual, inputs), gradients(expected, inputs), rtol=1e-11, atol=1e-11
    )


@both_kinds
@pytest.mark.parametrize(
    "functions",
    [("sigmoid", "tanh"), ("hard_sigmoid", "identity"), ("identity", "hard_sigmoid")],
    ids=str,
)
def test_second_derivatives_and_tangents_are_those_of_a_loop(functions, kind):
    layer, (x, hx) = make(kind, *functions), problem(kind)
    inputs = [x, *hx, *layer.parameters()]
    seconds, tangents = [], []
    for f in (run, unrolled):
        firsts = gradients(f(layer, x, hx), inputs)
        seconds.append(torch.autograd.grad(sum(g.cos().sum() for g in firsts), inputs))
        direction = (torch.ones_like(x), *map(torch.ones_like, hx))
        tangents.append(
            torch.func.jvp(lambda x, *hx, f=f: f(layer, x, hx)[0], (x, *hx), direction)[1]
        )
    torch.testing.assert_close(*seconds, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(*tangents, rtol=1e-11, atol=1e-11)


@both_kinds
@halves
def test_half_precisions_compute_in_single_precision(dtype, kind):
    layer, (x, hx) = make(kind, "relu", "hard_sigmoid", dtype), problem(kind)
    actual = run(layer, x.to(dtype), [state.to(dtype) for state in hx])
    wide = layer.double()
    exact = unrolled(wide, x.to(dtype).double(), [state.to(dtype).double() for state in hx])
    eps = torch.finfo(dtype).eps
    for a, e in zip(actual, exact, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), e, rtol=4 * eps, atol=4 * eps)


@both_kinds
def test_a_cell_steps_as_the_layer_does(kind):
    layer, (x, hx) = make(kind, "identity", "hard_sigmoid"), problem(kind)
    cell = make(KINDS[kind], "identity", "hard_sigmoid")
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.state_dict().items()})
    state = tuple(part[0] for part in hx) if len(hx) == 2 else hx[0][0]
    for x_t, expected in zip(x, run(layer, x, hx)[0], strict=True):
        state = cell(x_t, state)
        torch.testing.assert_close(flat_results(state)[0], expected)
    assert "nonlinearity=identity, gate_nonlinearity=hard_sigmoid" in repr(cell)
    assert "nonlinearity=identity, gate_nonlinearity=hard_sigmoid" in repr(layer)


@both_kinds
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_what_knows_no_such_functions_is_refused(kind):
    layer = make(kind, "tanh", "hard_sigmoid")
    with pytest.raises(ValueError, match=r"gate_nonlinearity 'sigmoid' for torch\.nn\.\w+, got"):
        layer.to_torch()
    model = nn.Sequential(layer)
    with pytest.raises(NotImplementedError, match="other functions than tanh and sigmoid"):
        torch.jit.script(model)
    with pytest.raises(NotImplementedError, match="other functions than tanh and sigmoid"):
        torch.jit.trace(layer, (torch.zeros(T, B, I, dtype=torch.float64),))
    with pytest.raises(NotImplementedError, match="other functions than tanh and sigmoid"):
        torch.jit.script(make(KINDS[kind], "relu", "sigmoid"))
    with pytest.raises(ValueError, match=r"Unknown gate_nonlinearity 'softplus': .*'hard_"):
        make(kind, "tanh", "softplus")
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
        make(KINDS[kind], "gelu", "sigmoid")
