"""What the tests of the layer share."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnn_cuda import FusedGRU, FusedLSTM, FusedRNN, backend

NATIVE = backend.use_native("cpu", torch.float32)
needs_native = pytest.mark.skipif(
    not NATIVE,
    reason="asserts properties of the native operators, and the reference is the active backend",
)
halves = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the same random numbers in every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


# The emulator's kernels are those of CUDA, which has none for gated layers yet.
LAYERS = (FusedRNN,) if backend.requested() == "emulated" else (FusedRNN, FusedGRU, FusedLSTM)
every_kind = pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)


def torch_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """Return PyTorch's class for one of ours."""
    return getattr(nn, kind.__name__.removeprefix("Fused"))


def flat_results(result: Tensor | tuple) -> list[Tensor]:
    """Return the tensors that a layer or cell returns: h_n, or (h_n, c_n), after the output."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat_results(part)]


def pair(*args, kind: type[nn.Module] = FusedRNN, **options) -> tuple[nn.Module, nn.Module]:
    """Return a module of ours and PyTorch's, constructed alike after the same seed."""
    torch.manual_seed(0)
    ours = kind(*args, **options)
    torch.manual_seed(0)
    return ours, torch_kind(kind)(*args, **options)


def assert_same_gradients(ours: nn.Module, oracle: nn.Module) -> None:
    """Compare ``.grad`` of every parameter; None has to be None."""
    expected = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    actual = {name: parameter.grad for name, parameter in ours.named_parameters()}
    torch.testing.assert_close(actual, expected)


class Forgetful(torch.autograd.Function):
    """Passes a tensor on, and no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None
