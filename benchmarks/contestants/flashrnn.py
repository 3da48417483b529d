"""FlashRNN's Elman network, on a GPU only; its input product is timed with it."""

from __future__ import annotations

import sys

from torch import Tensor, nn

from benchmarks.cases import Case, cases_of
from benchmarks.contestants.base import Contestant
from benchmarks.problem import Problem, torch_work
from benchmarks.timing import Work


class FlashRNN(Contestant):
    """The ``flashrnn`` package."""

    name = "flashrnn"
    title = "FlashRNN"
    needs = ("flashrnn",)
    backend = "cuda_fused"

    def missing(self, device: str) -> str | None:
        return super().missing(device) if device == "cuda" else "runs on CUDA devices only"

    def prepare(self, problem: Problem) -> Work:
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

        return Work(torch_work(problem, call, leaves))


def prebuild() -> None:
    """Compile the kernels, as FlashRNN does for each H when it is first called."""
    if missing := FlashRNN().missing("cuda"):
        sys.exit(missing)
    for H in sorted({case.H for case in cases_of(["flashrnn"])}):
        case = Case("flashrnn", 2, 16, H, H, "train", dtype="bfloat16")
        FlashRNN().prepare(Problem(case, "cuda")).run()


CONTESTANTS = (FlashRNN(),)
