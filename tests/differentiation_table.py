"""Try each way to differentiate or transform an RNN on ``torch.nn.RNN`` and on `FusedRNN`.

    python -m tests.differentiation_table           # writes docs/differentiation-table.md
    python -m tests.differentiation_table --print   # prints it instead

An attempt counts as working if it runs and its numbers are those of the recurrence written as a
Python loop (`rnn_cuda.reference`), in eager mode. The columns of ``nn.RNN`` are its CPU and, where
there is a CUDA device, its cuDNN implementation.
"""

from __future__ import annotations

import argparse
import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rnn_cuda import FusedRNN, backend

TABLE = Path(__file__).parents[1] / "docs" / "differentiation-table.md"
T, B, I, H = 4, 3, 6, 5


class _LoopRNN(nn.Module):
    """The oracle: an RNN's parameters, run by the reference, one time step at a time."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = copy.deepcopy(rnn) if isinstance(rnn, FusedRNN) else FusedRNN.from_torch(rnn)

    def forward(self, *args: Any) -> Any:
        with backend.use("reference"):
            return self.rnn(*args)


# ---- attempts: each takes an RNN and its device, and returns tensors -----------------------------


def _sequence(device: str, time_steps: int = T, batch: int = B) -> Tensor:
    generator = torch.Generator().manual_seed(time_steps)
    return torch.randn(time_steps, batch, I, generator=generator).to(device)


def _packed_sequence(device: str) -> PackedSequence:
    return pack_sequence([_sequence(device, n, 1)[:, 0] for n in (4, 3, 1)])


def _loss(rnn: nn.Module, input: Tensor | PackedSequence) -> Tensor:
    output, h_n = rnn(input)
    output = output.data if isinstance(output, PackedSequence) else output
    return output.pow(2).mean() + h_n.pow(3).sum()


def _loss_of(rnn: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    output, h_n = functional_call(rnn, parameters, (x,))
    return output.pow(2).mean() + h_n.pow(3).sum()


def _parameters_of(rnn: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in rnn.named_parameters()}


def _first_order(rnn: nn.Module, device: str) -> Any:
    return torch.autograd.grad(_loss(rnn, _sequence(device)), list(rnn.parameters()))


def _in_eval_mode(rnn: nn.Module, device: str) -> Any:
    return _first_order(rnn.eval(), device)


def _double_backward(rnn: nn.Module, device: str, input: Any = None) -> Any:
    value = _loss(rnn, _sequence(device) if input is None else input)
    first = torch.autograd.grad(value, list(rnn.parameters()), create_graph=True)
    return torch.autograd.grad(sum(g.pow(2).sum() for g in first), list(rnn.parameters()))


def _double_backward_packed(rnn: nn.Module, device: str) -> Any:
    return _double_backward(rnn, device, _packed_sequence(device))


def _gradient_penalty(rnn: nn.Module, device: str) -> Any:
    x = _sequence(device).requires_grad_()
    (gradient,) = torch.autograd.grad(_loss(rnn, x), x, create_graph=True)
    return torch.autograd.grad(gradient.norm(), list(rnn.parameters()))


def _forward_mode(rnn: nn.Module, device: str) -> Any:
    x = _sequence(device)
    return jvp(lambda x: _loss(rnn, x), (x,), (torch.ones_like(x),))[1]


def _functional_gradient(rnn: nn.Module, device: str) -> Any:
    return list(grad(_loss_of, 1)(rnn, _parameters_of(rnn), _sequence(device)).values())


def _functional_hessian(rnn: nn.Module, device: str) -> Any:
    return hessian(lambda x: _loss(rnn, x))(_sequence(device))


def _vmap_over_inputs(rnn: nn.Module, device: str) -> Any:
    inputs = torch.stack([_sequence(device), -_sequence(device)])
    return vmap(lambda x: _loss(rnn, x))(inputs)


def _per_sample_gradients(rnn: nn.Module, device: str) -> Any:
    def gradient(x: Tensor) -> Any:
        return grad(_loss_of, 1)(rnn, _parameters_of(rnn), x.unsqueeze(1))

    return list(vmap(gradient, in_dims=1)(_sequence(device)).values())


def _ensemble(rnn: nn.Module, device: str) -> Any:
    members = [rnn, copy.deepcopy(rnn)]
    with torch.no_grad():
        next(members[1].parameters()).mul_(2)
    (parameters, _), x = stack_module_state(members), _sequence(device)
    return vmap(lambda p: _loss_of(rnn, p, x))(parameters)


def _eager(rnn: nn.Module, device: str) -> Any:
    """What the compiled training steps below must equal."""
    steps = [(4, 3), (9, 7), (13, 2)]
    values = [_loss(rnn, _sequence(device, *step)) for step in steps]
    return [torch.autograd.grad(v, list(rnn.parameters())) for v in values]


def _compiled(rnn: nn.Module, device: str) -> Any:
    step = torch.compile(lambda x: _loss(rnn, x), fullgraph=True, backend="aot_eager")
    return torch.autograd.grad(step(_sequence(device)), list(rnn.parameters()))


def _compiled_once(rnn: nn.Module, device: str) -> Any:
    step = torch.compile(lambda x: _loss(rnn, x), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        values = [step(_sequence(device, *sizes)) for sizes in [(4, 3), (9, 7), (13, 2)]]
    return [torch.autograd.grad(v, list(rnn.parameters())) for v in values]


def _packed(rnn: nn.Module, device: str) -> Any:
    return torch.autograd.grad(_loss(rnn, _packed_sequence(device)), list(rnn.parameters()))


def _compiled_packed(rnn: nn.Module, device: str) -> Any:
    step = torch.compile(lambda x: _loss(rnn, x), fullgraph=True, backend="aot_eager")
    return torch.autograd.grad(step(_packed_sequence(device)), list(rnn.parameters()))


def _forward_pass(rnn: nn.Module, device: str) -> Any:
    return rnn(_sequence(device, 9, 7))


def _exported(rnn: nn.Module, device: str) -> Any:
    shapes = ({0: Dim("time", min=2), 1: Dim("batch", min=2)},)
    program = export(rnn, (_sequence(device),), dynamic_shapes=shapes)
    return program.module()(_sequence(device, 9, 7))


def _checkpointed(rnn: nn.Module, device: str) -> Any:
    value = checkpoint(_loss, rnn, _sequence(device), use_reentrant=False)
    return torch.autograd.grad(value, list(rnn.parameters()))


def _on_meta(rnn: nn.Module, device: str) -> Any:
    output, h_n = copy.deepcopy(rnn).to("meta")(_sequence("meta"))
    return [torch.tensor(output.shape), torch.tensor(h_n.shape)]


def _shapes(rnn: nn.Module, device: str) -> Any:
    return [torch.tensor(t.shape) for t in rnn(_sequence(device))]


def _flops(rnn: nn.Module, device: str) -> Any:
    with FlopCounterMode(display=False) as counter:
        rnn(_sequence(device))
    return torch.tensor(counter.get_total_flops())


def _flops_by_formula(rnn: nn.Module, device: str) -> Any:
    return torch.tensor(2 * T * B * H * (I + H))


Attempt = Callable[[nn.Module, str], Any]

# What is tried, how, and what the loop does to give the same numbers (the same, if None).
ATTEMPTS: list[tuple[str, Attempt, Attempt | None]] = [
    ("first derivative", _first_order, None),
    ("first derivative in eval mode", _in_eval_mode, None),
    ("second derivative (`create_graph=True`)", _double_backward, None),
    ("second derivative of a packed sequence", _double_backward_packed, None),
    ("gradient penalty on the input", _gradient_penalty, None),
    ("forward mode (`torch.func.jvp`)", _forward_mode, None),
    ("`torch.func.grad` with `functional_call`", _functional_gradient, None),
    ("`torch.func.hessian`", _functional_hessian, None),
    ("`torch.vmap` over inputs", _vmap_over_inputs, None),
    ("per-sample gradients (`vmap` of `grad`)", _per_sample_gradients, None),
    ("ensemble (`vmap` over `stack_module_state`)", _ensemble, None),
    ("`torch.compile(fullgraph=True)`, training step", _compiled, _first_order),
    ("the same, one graph for every length and batch", _compiled_once, _eager),
    ("the same, packed sequence", _compiled_packed, _packed),
    ("`torch.export` with dynamic time and batch", _exported, _forward_pass),
    ("activation checkpointing", _checkpointed, _first_order),
    ("meta device", _on_meta, _shapes),
    ("`FlopCounterMode` counts 2TBH(I + H)", _flops, _flops_by_formula),
]


# ---- the table -----------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _outcome(attempt: Attempt, oracle: Attempt | None, rnn: nn.Module, device: str) -> str:
    """Return "yes", or "no: " and why."""
    torch._dynamo.reset()
    expected = (oracle or attempt)(_LoopRNN(rnn), device)
    try:
        actual = attempt(rnn, device)
    except Exception as error:  # whatever goes wrong is the answer
        words = re.sub(r"\s+", " ", str(error)).replace("|", "\\|")
        first_sentence = re.split(r"(?<=[.:]) ", words)[0]
        return f"no: {type(error).__name__}: {first_sentence[:100]}"
    try:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, check_stride=False)
    except AssertionError:
        return "no: wrong numbers"
    return "yes"


def _columns() -> dict[str, tuple[Callable[[], nn.Module], str] | None]:
    """Each implementation by name: how to make it, and where it runs; None without the device."""
    torch.manual_seed(0)
    rnn = nn.RNN(I, H)
    result: dict[str, Any] = {
        "`nn.RNN`, CPU": (lambda: copy.deepcopy(rnn), "cpu"),
        "`nn.RNN`, cuDNN": None,
        "`FusedRNN`, CPU": (lambda: FusedRNN.from_torch(rnn), "cpu"),
    }
    if torch.cuda.is_available():
        result["`nn.RNN`, cuDNN"] = (lambda: copy.deepcopy(rnn).cuda(), "cuda")
        result["`FusedRNN`, CUDA"] = (lambda: FusedRNN.from_torch(rnn).cuda(), "cuda")
    return result


def outcomes() -> dict[str, dict[str, str]]:
    """Try everything: row, then column, to outcome."""
    with _quiet():
        return {
            name: {
                column: "not tried here"
                if how is None
                else _outcome(attempt, oracle, how[0](), how[1])
                for column, how in _columns().items()
            }
            for name, attempt, oracle in ATTEMPTS
        }


def render(table: dict[str, dict[str, str]]) -> str:
    """Return the table as Markdown; the reasons for a "no" follow it as notes."""
    names = list(next(iter(table.values())))
    notes: list[str] = []

    def cell(text: str) -> str:
        if not text.startswith("no: "):
            return text
        reason = text.removeprefix("no: ")
        if reason not in notes:
            notes.append(reason)
        return f"no [{notes.index(reason) + 1}]"

    lines = [
        "<!-- Generated by `python -m tests.differentiation_table`; do not edit. -->",
        "",
        f"torch {torch.__version__.split('+')[0]}; "
        f"`FusedRNN` on the {'native' if backend.use_native('cpu', torch.float32) else 'reference'}"
        ' backend. A column that says "not tried here" needs a CUDA device.',
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    lines += [
        f"| {name} | " + " | ".join(cell(row[column]) for column in names) + " |"
        for name, row in table.items()
    ]
    lines += ["", *(f"{i}. `{note}`" for i, note in enumerate(notes, start=1)), ""]
    return "\n".join(lines)


def main() -> None:
    """Write or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print instead of writing the file")
    arguments = parser.parse_args()
    text = render(outcomes())
    if arguments.print:
        print(text)
    else:
        TABLE.write_text(text)


if __name__ == "__main__":
    main()
