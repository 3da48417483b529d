"""The tensors of a case, and the numbers that every contestant must compute.

What a contestant returns is brought into one form, a list of tensors:

    forward  [output]
    train    [output, gradient of each parameter in state_dict order, gradient of the input if any]
    hvp      [the product's part for each parameter, in state_dict order]

``output`` is (T, B, D * H), (B, T, D * H) with batch_first, or the (N, D * H) data of a packed
sequence, D the number of directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks.cases import GATES, Case

TORCH_LAYERS = {"elman": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}

TOLERANCE = {"float64": 1e-11, "float32": 1e-4, "bfloat16": 1.6e-2, "float16": 2e-3, "tf32": 2e-3}
"""Relative, norm-wise: two units in the last place for the half types; room for a thousand
roundings in the others. Generous, because only a contestant that computes something else is
to be found; how exact they are is what the accuracy suite measures."""

RELU_TOLERANCE = 3e-3
"""For gradients through relu in place of a smaller one: its slope jumps at zero, so that each of a
million states that comes out on the other side of it by rounding is seen in the sum."""


class Problem:
    """Weights, input and cotangent of a case, the same for each contestant and in every process."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case = case
        self.device = device
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        generator = torch.Generator(device).manual_seed(0)
        bound = case.H**-0.5

        def uniform(*shape: int) -> Tensor:
            values = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
            return (bound * (2 * values - 1)).to(self.dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(self.dtype)

        self.weights: dict[str, Tensor] = {}
        for layer in range(case.num_layers):
            features = case.I if layer == 0 else case.directions * case.H
            for suffix in ["", "_reverse"][: case.directions]:
                rows = GATES[case.cell] * case.H
                sizes = {"weight_ih": (rows, features), "weight_hh": (rows, case.H)}
                for name, size in {**sizes, "bias_ih": (rows,), "bias_hh": (rows,)}.items():
                    scale = case.bias_scale if name.startswith("bias") else case.weight_scale
                    self.weights[f"{name}_l{layer}{suffix}"] = scale * uniform(*size)

        lead = (case.B, case.T) if case.batch_first else (case.T, case.B)
        self.tokens = case.T * case.B  # (sample, time step) pairs
        self.x: Any = case.input_scale * normal(*lead, case.I)  # a PackedSequence if packed
        if case.packed:
            drawn = torch.randint(1, case.T + 1, (case.B,), generator=generator, device=device)
            lengths = drawn.cpu()  # where packing wants them
            lengths[0] = case.T
            self.tokens = int(lengths.sum())
            self.x = pack_padded_sequence(self.x, lengths, enforce_sorted=False)
        rows = [self.tokens] if case.packed else lead
        self.dy = normal(*rows, case.directions * case.H)
        # What the Hessian is multiplied by.
        self.direction = [normal(*w.shape) for w in self.weights.values() if case.mode == "hvp"]

    @cached_property
    def expected(self) -> list[Tensor]:
        """The numbers of torch's layer in float64; of leaky units, those of a loop in Python."""
        from rnn_cuda import LeakyRNN, backend

        if kind := TORCH_LAYERS.get(self.case.cell):
            return self._results_of(kind, torch.float64)
        with backend.use("reference"):
            return self._results_of(LeakyRNN, torch.float64)

    @cached_property
    def torch_errors(self) -> list[float]:
        """Errors of torch's layer in the case's dtype; zeros where it has none."""
        if kind := TORCH_LAYERS.get(self.case.cell):
            return self.errors_of(self._results_of(kind, self.dtype))
        return [0.0] * len(self.expected)

    def _results_of(self, kind: type[nn.Module], dtype: torch.dtype) -> list[Tensor]:
        return module_work(self, layer_of(self, kind).to(dtype), dtype)()

    def errors_of(self, results: Sequence[Tensor]) -> list[float]:
        """Return the norm-wise relative error of each result."""
        return [relative_error(a, b) for a, b in zip(results, self.expected, strict=True)]

    def disagreement(self, results: Sequence[Tensor]) -> str | None:
        """Return how these results differ from those expected, or None.

        They may be as wrong as torch's layer is in this dtype, twice over: a half precision rounds
        sums over all time steps, and a sum of few values may nearly cancel.
        """
        if len(results) != len(self.expected):
            return f"{len(results)} results, expected {len(self.expected)}"
        rows = zip(self.names(), results, self.expected, self.torch_errors, strict=True)
        for name, actual, expected, torchs in rows:
            if actual.shape != expected.shape:
                return f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
            error, allowed = relative_error(actual, expected), self._tolerance(name) + 2 * torchs
            if not error <= allowed:  # also if it is not a number
                return f"{name} differs by {error:.1e} of its norm, allowed {allowed:.1e}"
        return None

    def _tolerance(self, name: str) -> float:
        tolerance = TOLERANCE["tf32" if self.case.tf32 else self.case.dtype]
        jumps = self.case.nonlinearity == "relu" and name != "output"
        return max(tolerance, RELU_TOLERANCE) if jumps else tolerance

    def names(self) -> list[str]:
        """Return a name for each entry of a result list."""
        names = ["output"] if self.case.mode != "hvp" else []
        names += self.weights if self.case.mode != "forward" else []
        return [*names, *(["input"] if self.case.wants_input_gradient else [])]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ``|actual - expected| / |expected|`` in the Euclidean norm, computed in float64.

    An expected zero allows nothing but zeros: else the error is infinite.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    difference, norm = torch.linalg.vector_norm(actual - expected), expected.norm()
    if norm == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / norm)


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Let float32 products round to TF32, or not, in matrix products and in cuDNN alike.

    By default torch does in cuDNN's recurrent layers and does not in matrix products, which would
    compare two different things.
    """
    # Not the newer `fp32_precision`: set next to the older switches, which torch itself still
    # reads here and there, it makes torch raise. The older ones set both.
    products, layers = torch.backends.cuda.matmul, torch.backends.cudnn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they will go one day
        before = products.allow_tf32, layers.allow_tf32
        products.allow_tf32 = layers.allow_tf32 = allowed
        try:
            yield
        finally:
            products.allow_tf32, layers.allow_tf32 = before


# ---- torch modules -------------------------------------------------------------------------------


def layer_of(problem: Problem, kind: type[nn.Module], its_weights: bool = True) -> nn.Module:
    """Return an ``nn.RNN`` or a module like it, with the problem's weights or its own."""
    case = problem.case
    names = ("num_layers", "bidirectional", "batch_first")
    options: dict[str, Any] = {name: getattr(case, name) for name in names}
    if case.nonlinearity != "tanh":
        options["nonlinearity"] = case.nonlinearity
    torch.manual_seed(0)
    layer = kind(case.I, case.H, **options, dtype=problem.dtype, device=problem.device)
    if its_weights:
        layer.load_state_dict(problem.weights)
    return layer.train(case.mode != "forward")


def module_work(
    problem: Problem, module: nn.Module, dtype: torch.dtype | None = None
) -> Callable[[], list[Tensor]]:
    """Return :func:`torch_work` of a module that returns ``(output, state)``."""

    def call(x: Any) -> Tensor:
        output = module(x)[0]
        return output.data if isinstance(output, PackedSequence) else output

    return torch_work(problem, call, list(module.parameters()), dtype)


def torch_work(
    problem: Problem,
    call: Callable[[Any], Tensor],
    parameters: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> Callable[[], list[Tensor]]:
    """Return the work of a case for anything that autograd can differentiate.

    Args:
        problem: gives the mode, the input and the cotangent.
        call: from the input to the output tensor.
        parameters: what gradients are asked of; leaves that require them.
        dtype: of input and cotangents, if not the problem's.

    Returns:
        A function that does all of the work once and returns the list described above.
    """
    case = problem.case
    dtype = dtype or problem.dtype
    x, dy = problem.x, problem.dy.to(dtype)
    data = x.data.detach().to(dtype)
    if case.wants_input_gradient:
        data = data.requires_grad_()  # a detached alias: nothing is copied
    x = x._replace(data=data) if isinstance(x, PackedSequence) else data
    wanted = [*parameters, data] if case.wants_input_gradient else list(parameters)
    direction = [v.to(dtype) for v in problem.direction]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [call(x)]

    def train() -> list[Tensor]:
        output = call(x)
        return [output, *torch.autograd.grad(output, wanted, dy)]

    def hvp() -> list[Tensor]:
        first = torch.autograd.grad(call(x), parameters, dy, create_graph=True)
        return list(torch.autograd.grad(first, parameters, direction))

    return {"forward": forward, "train": train, "hvp": hvp}[case.mode]
