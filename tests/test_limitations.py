"""The page on limitations: every row of its table is run."""

import contextlib
import copy
import functools
import io
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.masked import masked_tensor
from torch.nn.utils import parametrizations
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from rnn_cuda import FusedGRU, FusedLSTM, FusedRNN, FusedRNNCell, backend, replace_rnn
from rnn_cuda.instruments import GradientFlow
from rnn_cuda.residual import AntisymmetricRNN, LeakyRNN

PAGE = (Path(__file__).parents[1] / "docs" / "limitations.md").read_text()
SITUATIONS = re.findall(r"^\| (.*?) \| .*? \| .*? \|$", PAGE, re.M)[1:]

STACKS = (FusedRNN, FusedGRU, LeakyRNN, AntisymmetricRNN)
INPUT, STATE = torch.randn(4, 2, 3), torch.randn(1, 2, 5)

ROWS: dict[str, Callable[[], None]] = {}


def row(situation: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(check: Callable[[], None]) -> Callable[[], None]:
        ROWS[situation] = check
        return check

    return register


def refuses(error: type[Exception], message: str, function: Callable[..., object], *args) -> None:
    with pytest.raises(error, match=message):
        function(*args)


def every_layer(**options) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    """Yield each kind of layer, and the shapes of a cell's input and state or of a sequence's."""
    for cls in STACKS:
        yield cls(3, 5, **options), INPUT, STATE
    yield FusedRNNCell(3, 5, **options), INPUT[0], STATE[0]


def with_weights(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    for name, weight in list(module.named_parameters()):
        if weight.ndim == 2:
            setattr(module, name, nn.Parameter(convert(weight.detach()), requires_grad=False))
    return module


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.filterwarnings(
    "ignore::rnn_cuda.backend.BackendWarning",
    "ignore::torch.jit.TracerWarning",
    "ignore::DeprecationWarning",
)
def test_a_row_says_what_happens(situation):
    with backend.use("auto"):
        ROWS[situation]()


def test_every_row_is_run():
    assert set(SITUATIONS) == set(ROWS)
    assert len(SITUATIONS) > 20


@row("`isinstance(rnn, nn.RNNBase)`")
def _():
    assert not isinstance(FusedRNN(3, 5), nn.RNNBase)


@row("the output is changed in place before the backward pass")
def _():
    output, _ = FusedRNN(3, 5)(INPUT)
    output.mul_(2)
    refuses(RuntimeError, "modified by an inplace operation", output.sum().backward)
    output = FusedRNN(3, 5)(INPUT)[0].clone()
    output.mul_(2).sum().backward()


@row("a subclass overrides `check_input`, `check_forward_args` or `permute_hidden`")
def _():
    class Overriding(FusedRNN):
        def _called(self, *_):
            raise AssertionError

        check_input = check_forward_args = permute_hidden = _called

    Overriding(3, 5)(INPUT, STATE)


@row("`rnn.mode` or `rnn.proj_size` is set")
def _():
    rnn = FusedRNN(3, 5)
    refuses(AttributeError, "mode", setattr, rnn, "mode", "RNN_RELU")
    refuses(AttributeError, "proj_size", setattr, rnn, "proj_size", 2)


@row("a weight is None or deleted")
def _():
    for kind in ("weight_ih", "weight_hh"):
        for module, x, _h in every_layer():
            name = kind if isinstance(module, FusedRNNCell) else f"{kind}_l0"
            setattr(module, name, None)
            refuses(TypeError, f"{kind}.*NoneType", module, x)
            delattr(module, name)
            refuses(RuntimeError, f"{name}: expected a weight", module, x)
    rnn = FusedRNN(3, 5)
    rnn.bias_ih_l0 = None
    rnn(INPUT)


@row("`dtype` is an integer type, bool, float8 or complex32")
def _():
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.float8_e5m2, torch.complex32):
        for cls in (*STACKS, FusedRNNCell):
            with pytest.raises(RuntimeError, match=f"dtype: expected one of float32.*got {dtype}"):
                cls(3, 5, dtype=dtype)


@row("`rnn.to(torch.float8_e4m3fn)`")
def _():
    for module, x, _h in every_layer():
        module.to(torch.float8_e4m3fn)
        refuses(
            ValueError, "expected a dtype among .*float8_e4m3fn", module, x.to(torch.float8_e4m3fn)
        )
        module.float()(x)


@row("complex numbers")
def _():
    backend.reset()  # the warning comes once
    x = INPUT.to(torch.complex128)
    with pytest.warns(backend.BackendWarning, match="no kernels for torch.complex128"):
        FusedRNN(3, 5, dtype=torch.complex128)(x)
    with backend.use("native"):
        refuses(backend.NativeBackendError, "complex128", FusedRNN(3, 5, dtype=torch.complex128), x)


@row('complex numbers with `nonlinearity="relu"` or `"softplus"`')
def _():
    for cls in (FusedRNN, LeakyRNN, AntisymmetricRNN, FusedRNNCell):
        for f in ("relu", "softplus"):
            with pytest.raises(ValueError, match=f"{f} is not defined for complex"):
                cls(3, 5, nonlinearity=f, dtype=torch.complex64)


@row(
    "a `GradientFlow` records, and `forward` of an `nn.RNN`, `nn.LSTM` or `nn.GRU` is called by "
    "name"
)
def _():
    for cls in (nn.RNN, nn.LSTM, nn.GRU, FusedRNN):
        module = cls(3, 5)
        with GradientFlow(module) as flow:
            module.forward(INPUT)[0].sum().backward()
        assert len(flow.records) == (cls is FusedRNN)


@row("`weight.data` is set between the forward and the backward pass")
def _():
    def gradient(module, x, change):
        y = module(x)
        change(module.weight_hh_l0)
        return torch.autograd.grad(y[0].sum(), x)[0]

    def set_data(weight):
        weight.data = 3 * weight.data

    x, rnn = INPUT.clone().requires_grad_(), FusedRNN(3, 5)
    for module, is_old in ((rnn.to_torch(), True), (rnn, False)):
        expected = gradient(module, x, lambda weight: None)
        assert torch.equal(gradient(module, x, set_data), expected) is is_old
    loss = rnn(x)[0].sum()
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(rnn.weight_hh_l0)
    refuses(RuntimeError, "inplace", loss.backward)


@row("an instrument on a complex layer")
def _():
    rnn = FusedRNN(3, 5, dtype=torch.complex128)
    with pytest.raises((RuntimeError, ValueError)), GradientFlow(rnn):
        rnn(INPUT.to(torch.complex128))[0].abs().sum().backward()


@row("a sparse or mkldnn input, state or weight")
def _():
    for convert in (Tensor.to_sparse, Tensor.to_mkldnn):
        for module, x, h in every_layer():
            refuses(TypeError, r"input: expected a dense.*to_dense", module, convert(x))
            refuses(TypeError, r"hx: expected a dense.*to_dense", module, x, convert(h))
            with_weights(module, convert)
            refuses(TypeError, r"weight_ih: expected a dense.*to_dense", module, x, h)
        packed = pack_sequence([torch.randn(2, 3)])
        refuses(
            TypeError,
            "input.data: expected a dense",
            FusedRNN(3, 5),
            packed._replace(data=convert(packed.data)),
        )
        sparse = with_weights(FusedRNN(3, 5), convert)
        refuses(TypeError, "rnn.weight_ih_l0: expected a dense", sparse.to_torch)
        rnn = with_weights(nn.RNN(3, 5), convert)
        refuses(TypeError, "rnn.weight_ih_l0: expected a dense", FusedRNN.from_torch, rnn)
        refuses(TypeError, "rnn.weight_ih_l0: expected a dense", replace_rnn, rnn)
    # Where torch.nn.RNN does take them:
    dense = FusedRNN(3, 5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        expected = dense(INPUT, STATE)
        torch.testing.assert_close(dense.to_torch()(INPUT, STATE.to_sparse()), expected)
        sparse = with_weights(dense.to_torch(), Tensor.to_sparse_csr)
        torch.testing.assert_close(sparse(INPUT, STATE), expected)


@row("a quantized input, state or weight")
def _():
    def quantize(tensor: Tensor) -> Tensor:
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)

    for module, x, h in every_layer():
        refuses(TypeError, r"input: expected a dense.*dequantize", module, quantize(x))
        refuses(TypeError, r"hx: expected a dense.*dequantize", module, x, quantize(h))
        name = "weight_hh" if isinstance(module, FusedRNNCell) else "weight_hh_l0"
        setattr(module, name, nn.Parameter(quantize(torch.randn(5, 5)), requires_grad=False))
        refuses(TypeError, r"weight_hh: expected a dense.*dequantize", module, x, h)


@row("a nested tensor, strided or jagged")
def _():
    sequences = [torch.randn(4, 3), torch.randn(2, 3)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype")
        for layout in (torch.strided, torch.jagged):
            nested = torch.nested.nested_tensor(sequences, layout=layout)
            for cls in STACKS:
                for batch_first in (False, True):
                    rnn = cls(3, 5, batch_first=batch_first)
                    refuses(TypeError, "input: expected .* nested.*pack_sequence", rnn, nested)
                refuses(TypeError, "hx: expected .* nested", cls(3, 5), INPUT, nested)
            vectors = torch.nested.nested_tensor([torch.randn(3), torch.randn(3)], layout=layout)
            refuses(TypeError, "input: expected .* nested", FusedRNNCell(3, 5), vectors)
            FusedRNN(3, 5)(pack_sequence(nested.unbind(), enforce_sorted=False))


@row("a MaskedTensor")
def _():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of MaskedTensors is in prototype")
        for module, x, _h in every_layer():
            masked = masked_tensor(x, x > 0)
            refuses(TypeError, r"input: expected .* MaskedTensor.*to_tensor", module, masked)
            module(masked.to_tensor(0))


@contextlib.contextmanager
def one_process() -> Iterator[Callable[..., Tensor]]:
    """Yield what makes DTensors, distributed over this process alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def distribute(value: Tensor | nn.Module) -> Tensor | nn.Module:
            if isinstance(value, nn.Module):
                return distribute_module(copy.deepcopy(value), mesh)
            return distribute_tensor(value, mesh, [Shard(value.ndim - 2)])

        yield distribute
    finally:
        dist.destroy_process_group()


@row("a DTensor among plain tensors")
def _():
    with one_process() as distribute:
        for module, x, h in every_layer():
            refuses(TypeError, "hx: expected a plain .*DTensor.*to_local", module, x, distribute(h))
            refuses(
                TypeError, "(hx|weight_ih): expected a DTensor .*plain", module, distribute(x), h
            )
            refuses(TypeError, "weight_ih: expected a DTensor .*plain", module, distribute(x))
            refuses(TypeError, "weight_ih: expected a plain .*DTensor", distribute(module), x, h)


@row("input, states and weights that are all DTensors")
def _():
    with one_process() as distribute:
        for module, x, h in every_layer(dtype=torch.float64):
            x, h = x.double(), h.double()
            expected = module(x, h)[0]
            expected.square().sum().backward()
            distributed = distribute(module)
            with backend.use("reference"):  # no warning to raise
                output = distributed(distribute(x), distribute(h))[0]
            output.square().sum().backward()
            torch.testing.assert_close(output.full_tensor(), expected)
            for name, weight in module.named_parameters():
                grad = distributed.get_parameter(name).grad
                torch.testing.assert_close(grad.full_tensor(), weight.grad)
        with backend.use("native"):
            refuses(
                backend.NativeBackendError,
                "no kernels for DTensors",
                distribute(FusedRNN(3, 5)),
                distribute(INPUT),
            )


class _KnowsAten(Tensor):
    """A wrapped tensor, which unwraps itself for PyTorch's own operators alone."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, _types, args=(), kwargs=None):
        if function.namespace != "aten":
            raise NotImplementedError(f"no rule for {function}")
        plain = pytree.tree_map_only(cls, lambda wrapped: wrapped.inner, (args, kwargs or {}))
        result = function(*plain[0], **plain[1])
        return cls(result) if function is torch.ops.aten.detach.default else result


@row("a tensor subclass whose `__torch_dispatch__` knows PyTorch's operators alone (torchao's)")
def _():
    rnn = FusedRNN(3, 5)
    expected = rnn(INPUT)
    for weight in ("weight_ih_l0", "weight_hh_l0"):
        parameter = nn.Parameter(_KnowsAten(getattr(rnn, weight).detach()), requires_grad=False)
        setattr(rnn, weight, parameter)
    refuses(NotImplementedError, "no rule for rnn_cuda", rnn, INPUT)
    as_torch = nn.RNN(3, 5)
    for name, parameter in rnn.named_parameters():
        setattr(as_torch, name, parameter)
    torch.testing.assert_close(as_torch(INPUT), expected)


@row('`call_for_per_sample_grads`, Opacus\' `grad_sample_mode="ew"`')
def _():
    rnn = FusedRNN(3, 5, batch_first=True)
    call_for_per_sample_grads(rnn)(torch.randn(2, 4, 3))[0].sum().backward()
    assert rnn.weight_hh_l0.grad_sample.shape == (2, 5, 5)


@row("the same with `LeakyRNN` or `AntisymmetricRNN`")
def _():
    for cls in (LeakyRNN, AntisymmetricRNN):
        call = call_for_per_sample_grads(cls(3, 5, batch_first=True))
        refuses(TypeError, f"ExpandedWeights.*{cls.__name__}.*vmap", call, torch.randn(2, 4, 3))


@row("`quantize_dynamic`")
def _():
    model = nn.ModuleList([module for module, *_ in every_layer()])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated")
        quantized = quantize_dynamic(model, {*map(type, model)}, dtype=torch.qint8)
        assert list(map(type, quantized)) == list(map(type, model))
        cell = nn.RNNCell(3, 5)
        cell.load_state_dict(model[-1].state_dict())
        (cell,) = quantize_dynamic(nn.Sequential(cell), {nn.RNNCell}, dtype=torch.qint8)
        assert type(cell) is not nn.RNNCell
        (rnn,) = quantize_dynamic(nn.Sequential(nn.RNN(3, 5)), {nn.RNN}, dtype=torch.qint8)
        assert type(rnn) is nn.RNN


@row("`replace_rnn` meets a subclass of `nn.RNN`")
def _():
    class Subclass(nn.RNN):
        pass

    with pytest.warns(UserWarning, match="left alone"):
        assert type(replace_rnn(nn.Sequential(Subclass(3, 5)))[0]) is Subclass
    assert type(FusedRNN.from_torch(Subclass(3, 5))) is FusedRNN


@row("`from_torch` or `replace_rnn` meets a parametrized, pruned or weight-normalised weight")
def _():
    rnn = parametrizations.orthogonal(nn.RNN(3, 5), "weight_hh_l0")
    for convert in (FusedRNN.from_torch, replace_rnn):
        refuses(ValueError, "weight_hh_l0", convert, rnn)


@row("a `FusedGRU` or `FusedLSTM`, or a cell of theirs, on CUDA or emulated")
def _():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "takes_gated_cells", lambda *_: False)
        backend.reset()
        for kind in (FusedGRU, FusedLSTM):
            layer = kind(3, 5)
            with pytest.warns(backend.BackendWarning, match="no kernels for .* layers on cpu yet"):
                results = layer(INPUT)
            torch.testing.assert_close(results, layer.to_torch()(INPUT))


@row("a `LeakyRNN` or `AntisymmetricRNN` on CUDA or emulated")
def _():
    for kind in (LeakyRNN, AntisymmetricRNN):
        layer = kind(3, 5)
        expected = layer(INPUT)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "takes_gated_cells", lambda *_: False)
            backend.reset()
            with pytest.warns(backend.BackendWarning, match="no kernels for Leaky layers on cpu"):
                torch.testing.assert_close(layer(INPUT), expected)


@row("`proj_size` of a `FusedLSTM`")
def _():
    refuses(ValueError, "proj_size: expected 0, got 2", lambda: FusedLSTM(3, 5, proj_size=2))
    lstm = nn.LSTM(3, 5, proj_size=2)
    refuses(ValueError, "proj_size: expected 0, got 2", FusedLSTM.from_torch, lstm)
    with pytest.warns(UserWarning, match="left alone: a FusedLSTM has no projections"):
        assert replace_rnn(lstm) is lstm


@row(
    "`torch.jit.script`, `torch.jit.trace` or ONNX export of a `LeakyRNN` with a leak for each unit"
)
def _():
    model = Holder(LeakyRNN(3, 5, leak=torch.full((5,), 0.1))).eval()
    torch.export.export(model, (INPUT,))
    for leave in (torch.jit.script, lambda m: torch.jit.trace(m, INPUT), export_to_onnx):
        arguments = (model, INPUT) if leave is export_to_onnx else (model,)
        refuses(NotImplementedError, "a leak for each unit", leave, *arguments)


@row(
    "`to_torch`, TorchScript or ONNX export of a `FusedGRU` or `FusedLSTM` with other functions "
    "than tanh and sigmoid"
)
def _():
    for kind in (FusedGRU, FusedLSTM):
        layer = kind(3, 5, nonlinearity="relu")
        refuses(ValueError, "must be 'tanh'", layer.to_torch)
        message, model = "other functions than tanh and sigmoid", nn.Sequential(layer)
        refuses(NotImplementedError, message, torch.jit.script, model)
        export = functools.partial(torch.onnx.export, dynamo=False)
        refuses(NotImplementedError, message, export, model, (INPUT,), io.BytesIO())


@row("ONNX export of a `FusedGRU` or `FusedLSTM` in float64")
def _():
    for kind in (FusedGRU, FusedLSTM):
        export = functools.partial(torch.onnx.export, dynamo=False)
        model = nn.Sequential(kind(3, 5, dtype=torch.float64))
        arguments = (INPUT.double(),), io.BytesIO()
        refuses(NotImplementedError, "float64 cannot", export, model, *arguments)


@row("`from_torch` of another kind of layer")
def _():
    for other in (nn.LSTM(3, 5), nn.GRU(3, 5)):
        refuses(TypeError, "rnn must be a torch.nn.RNN", FusedRNN.from_torch, other)


class Holder(nn.Module):
    def __init__(self, rnn: nn.Module):
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor):
        return self.rnn(x)


class Packing(Holder):
    def forward(self, x: Tensor):
        packed = pack_padded_sequence(x, torch.tensor([4, 2]))
        return pad_packed_sequence(self.rnn(packed)[0])[0]


def export_to_onnx(model: object, *arguments: Tensor, dynamo: bool = False) -> None:
    torch.onnx.export(model, arguments, io.BytesIO(), dynamo=dynamo)


@row("`torch.jit.script` of a layer that no model holds")
def _():
    for rnn in (nn.RNN(3, 5), FusedRNN(3, 5)):
        refuses(AttributeError, "forward", torch.jit.script(rnn), INPUT)
    torch.jit.script(Holder(FusedRNN(3, 5)))(INPUT)


@row("`torch.fx.symbolic_trace` of a layer or a cell that no model holds")
def _():
    for module, x, _ in every_layer():
        message = "torch.fx traces modules that hold .*, but not"
        refuses(TypeError, message, torch.fx.symbolic_trace, module)
        torch.fx.symbolic_trace(Holder(module))(x)


@row("`torch.jit.script` where a weight is parametrized, pruned or weight-normalised")
def _():
    rnn = parametrizations.orthogonal(FusedRNN(3, 5), "weight_hh_l0")
    message = "parametrized.*: weight_hh_l0; remove that first"
    refuses(ValueError, message, torch.jit.script, Holder(rnn))
    torch.jit.trace(Holder(rnn), INPUT)(INPUT)
    nn.utils.parametrize.remove_parametrizations(rnn, "weight_hh_l0")
    torch.jit.script(Holder(rnn))(INPUT)


@row("ONNX export of packed sequences with `dynamo=True`")
def _():
    for kind, message in ((nn.RNN, "torch.export"), (FusedRNN, "export with dynamo=False")):
        with pytest.raises(Exception, match=message):
            export_to_onnx(Packing(kind(3, 5)).eval(), INPUT, dynamo=True)
    export_to_onnx(Packing(FusedRNN(3, 5)).eval(), INPUT)


@row(
    "ONNX export of packed sequences in float64 or bfloat16, or of `LeakyRNN` or `AntisymmetricRNN`"
)
def _():
    for kind, dtype in (
        (FusedRNN, torch.float64),
        (FusedRNN, torch.bfloat16),
        (LeakyRNN, torch.float32),
        (AntisymmetricRNN, torch.float32),
    ):
        model = Packing(kind(3, 5, dtype=dtype)).eval()
        message = f"{kind.__name__} in {dtype} cannot be exported"
        refuses(NotImplementedError, message, export_to_onnx, model, INPUT.to(dtype))


@row("ONNX export of a program that `torch.export` made, or of complex numbers")
def _():
    program = torch.export.export(Holder(FusedRNN(3, 5)), (INPUT,))
    with pytest.raises(Exception, match="layer_forward"):
        export_to_onnx(program, dynamo=True)
    model = Holder(FusedRNN(3, 5, dtype=torch.complex64)).eval()
    refuses(NotImplementedError, "complex64", export_to_onnx, model, INPUT.to(torch.complex64))
