"""How far values and gradients are from float64, FusedRNN and torch.nn.RNN side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import TABLE_SHAPES, Shape
from benchmarks.problems import relative_error
from rnn_cuda import FusedRNN

GATE = 2e-6
"""FusedRNN's error may not exceed it wherever torch.nn.RNN's own does not."""

CONTESTANTS: dict[str, Callable[..., nn.Module]] = {"torch_rnn": nn.RNN, "fused_rnn": FusedRNN}

QUANTITIES = ("output", "input", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""The values, and then what the gradient is taken of."""


@dataclass(frozen=True)
class AccuracyCase:
    """Float32 data whose exact answer float64 arithmetic gives."""

    name: str
    T: int
    B: int
    I: int
    H: int
    weight_scale: float = 1.0
    input_scale: float = 1.0
    state_scale: float = 1.0
    bias: bool = True
    nonlinearity: str = "tanh"

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


_ADVERSARIAL: tuple[dict[str, Any], ...] = (
    {"name": "saturated: weights x 20", "weight_scale": 20.0},
    # Without biases and initial state the states themselves are denormal.
    {"name": "denormal inputs, 1e-40", "input_scale": 1e-40, "state_scale": 0.0, "bias": False},
    {"name": "denormal inputs beside a bias", "input_scale": 1e-40},
    {"name": "large inputs, 1e30", "input_scale": 1e30},
    {"name": "large inputs, 1e30, relu", "input_scale": 1e30, "nonlinearity": "relu"},
    {"name": "exact zeros", "input_scale": 0.0, "state_scale": 0.0, "bias": False},
    {"name": "weights zero", "weight_scale": 0.0},
)


def accuracy_cases(*, quick: bool = False) -> list[AccuracyCase]:
    """Return random data on the table's shapes and a longer one, then adversarial inputs."""
    shapes: tuple[Shape, ...] = (*TABLE_SHAPES, (4096, 16, 8, 64))
    adversarial: Shape = (100, 16, 8, 64)
    if quick:
        shapes, adversarial = ((6, 3, 2, 8), (5, 2, 64, 16)), (4, 2, 3, 8)
    return [
        *(AccuracyCase("random", *shape) for shape in shapes),
        *(
            AccuracyCase(
                T=adversarial[0], B=adversarial[1], I=adversarial[2], H=adversarial[3], **o
            )
            for o in _ADVERSARIAL
        ),
    ]


def errors(case: AccuracyCase) -> dict[str, Any]:
    """Return the norm-wise relative errors of each contestant, by quantity.

    Returns:
        JSON-ready: ``case``; ``errors``, by contestant and quantity, None where it is not finite
        (the exact value is zero or overflows float32, and the result is not the same); ``passed``.
    """
    torch.manual_seed(0)
    options = {"bias": case.bias, "nonlinearity": case.nonlinearity}
    exact = nn.RNN(case.I, case.H, **options)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.mul_(case.weight_scale)
    x = case.input_scale * torch.randn(case.T, case.B, case.I)
    h0 = case.state_scale * torch.tanh(torch.randn(1, case.B, case.H))
    dy = torch.randn(case.T, case.B, case.H)
    names = [q for q in QUANTITIES if case.bias or not q.startswith("bias")]

    weights = exact.state_dict()
    modules = {name: kind(case.I, case.H, **options) for name, kind in CONTESTANTS.items()}
    for module in modules.values():
        module.load_state_dict(weights)
    expected = _values_and_gradients(exact.double(), x.double(), h0.double(), dy.double())
    found: dict[str, dict[str, float]] = {}
    for name, module in modules.items():
        actual = _values_and_gradients(module, x, h0, dy)
        pairs = zip(names, actual, expected, strict=True)
        found[name] = {quantity: relative_error(a, e) for quantity, a, e in pairs}
    return {"case": case.as_json(), "errors": found, "passed": passes(found)}


def passes(found: dict[str, dict[str, float]]) -> bool:
    """Return whether ours is within the gate wherever torch.nn.RNN's own error is."""
    pairs = [(found["fused_rnn"][q], own) for q, own in found["torch_rnn"].items()]
    return all(ours <= GATE for ours, own in pairs if own <= GATE)


def _values_and_gradients(rnn: nn.Module, x: Tensor, h0: Tensor, dy: Tensor) -> list[Tensor]:
    x, h0 = x.detach().requires_grad_(), h0.detach().requires_grad_()
    output = rnn(x, h0)[0]
    return [output, *torch.autograd.grad(output, [x, h0, *rnn.parameters()], dy)]
