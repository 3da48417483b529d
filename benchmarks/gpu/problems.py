"""Problems on a device, and those who solve them: cuDNN through torch, FusedRNN, FlashRNN.

What is drawn, returned and compared is as in `benchmarks.problems`: the numbers expected are those
of torch.nn.RNN in float64 on the same device.
"""

from __future__ import annotations

import importlib.util
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import BASELINE, Case
from benchmarks.gpu.cases import FLASHRNN, OURS, GpuCase
from benchmarks.problems import Problem, module_of, module_work, torch_work
from rnn_cuda import FusedRNN

Work = Callable[[], Sequence[Tensor]]


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Let float32 products round to TF32, or not, in matrix products and in cuDNN alike.

    By default torch does in cuDNN's recurrent layers and does not in matrix products, which would
    compare two different things.
    """
    # Not the newer `fp32_precision`: set next to the older switches, which torch itself still
    # reads here and there, it makes torch raise. The older ones set both.
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they will go one day
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            matmul.allow_tf32, cudnn.allow_tf32 = before


class DeviceProblem(Problem):
    """The tensors of a case on a device, and the numbers to come to."""

    def __init__(self, case: GpuCase, device: str) -> None:
        super().__init__(case.case, device)
        self.tf32 = case.tf32

    def _tolerance(self, name: str) -> float:
        # Ten bits, as float16 has them.
        return max(super()._tolerance(name), 2e-3 if self.tf32 else 0.0)


# ---- contestants ---------------------------------------------------------------------------------


class Contender:
    """One way to run a recurrent layer on a device."""

    name: str
    title: str

    def missing(self) -> str | None:
        """Return why it cannot run here, or None."""
        return None

    @abstractmethod
    def work(self, problem: DeviceProblem) -> Work:
        """Return a function that does the work once; the device may still be at it after that."""


class _Module(Contender):
    kind: Callable[..., nn.Module]

    def work(self, problem: DeviceProblem) -> Work:
        """Copy the weights into the module; without gradients it is in evaluation mode."""
        module = module_of(problem, self.kind)
        return module_work(problem, module.train(problem.case.mode == "train"))


class TorchRNN(_Module):
    """The unit: cuDNN."""

    name = BASELINE
    title = "torch.nn.RNN"
    kind = nn.RNN


class OurRNN(_Module):
    """`rnn_cuda.FusedRNN`."""

    name = OURS
    title = "FusedRNN"
    kind = FusedRNN


class FlashRNN(Contender):
    """The ``flashrnn`` package's Elman network, with its input product."""

    name = FLASHRNN
    title = "FlashRNN"
    backend = "cuda_fused"

    def missing(self) -> str | None:
        """Return why it cannot run here, or None."""
        return None if importlib.util.find_spec("flashrnn") else "not installed: flashrnn"

    def work(self, problem: DeviceProblem) -> Work:
        """Lay the sequence out as its kernels do inside, so that nothing is transposed."""
        from flashrnn import FlashRNNConfig, flashrnn  # pyright: ignore[reportMissingImports]

        case = problem.case
        config = FlashRNNConfig(
            head_dim=case.H,
            num_heads=1,
            batch_size=case.B,
            function="elman",
            backend=self.backend,
            dtype=case.dtype,
            input_shape="TBGHD",
            output_shape="STBHD",
            **{f"dtype_{part}": case.dtype for part in "wrb"},
        )
        leaves = [nn.Parameter(weight.clone()) for weight in problem.weights.values()]

        def call(x: Tensor) -> Tensor:
            W, U, b_ih, b_hh = leaves
            projected = nn.functional.linear(x, W).view(case.T, case.B, 1, 1, case.H)
            recurrent, bias = U.view(1, 1, case.H, case.H), (b_ih + b_hh).view(1, 1, case.H)
            states, _ = flashrnn(
                projected, recurrent, bias, function="elman", config=config, dtype=case.dtype
            )
            return states.reshape(case.T, case.B, case.H)

        return torch_work(problem, call, leaves)


CONTENDERS: dict[str, Contender] = {c.name: c for c in (TorchRNN(), OurRNN(), FlashRNN())}


def prebuild_flashrnn(H: int, device: str) -> None:
    """Compile FlashRNN's kernels for this size: it does so for each size when first called."""
    case = Case("flashrnn", 2, 16, H, H, "train", dtype="bfloat16")
    CONTENDERS[FLASHRNN].work(DeviceProblem(GpuCase(case), device))()
