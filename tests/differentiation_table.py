"""Try each way to differentiate or transform a layer, on ``torch.nn.RNN`` and on our layers.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rnn_cuda import FusedGRU, FusedLSTM, FusedRNN, LeakyRNN, backend
from rnn_cuda.cells import cell_of
from tests.layers import flat_results

TABLE = Path(__file__).parents[1] / "docs" / "differentiation-table.md"
T, B, I, H = 4, 3, 6, 5


class _LoopRNN(nn.Module):
    """The oracle: an RNN's parameters, run by the reference, one time step at a time."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = FusedRNN.from_torch(rnn) if isinstance(rnn, nn.RNN) else copy.deepcopy(rnn)

    def forward(self, *args: Any) -> Any:
        with backend.use("reference"):
            return self.rnn(*args)


# ---- attempts: each takes an RNN and returns tensors, on the default device ----------------------

Attempt = Callable[[nn.Module], Any]

# What is tried, how, and what the loop does to give the same numbers.
ATTEMPTS: dict[str, tuple[Attempt, Attempt]] = {}


def _attempt(title: str, expected: Attempt | None = None) -> Callable[[Attempt], Attempt]:
    def register(function: Attempt) -> Attempt:
        ATTEMPTS[title] = (function, expected or function)
        return function

    return register


def _sequence(time_steps: int = T, batch: int = B) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(time_steps)
    x = torch.randn(time_steps, batch, I, generator=generator, device="cpu")
    return x.to(torch.get_default_device())


def _packed_sequence() -> PackedSequence:
    return pack_sequence([_sequence(n, 1)[:, 0] for n in (4, 3, 1)])


def _loss(rnn: nn.Module, input: Tensor | PackedSequence) -> Tensor:
    output, *final_states = flat_results(rnn(input))
    return output.pow(2).mean() + sum(state.pow(3).sum() for state in final_states)


def _loss_of(rnn: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    output, *final_states = flat_results(functional_call(rnn, parameters, (x,)))
    return output.pow(2).mean() + sum(state.pow(3).sum() for state in final_states)


def _gradients(rnn: nn.Module, value: Tensor, **options: Any) -> Any:
    return torch.autograd.grad(value, list(rnn.parameters()), **options)


def _gradients_by_transform(rnn: nn.Module, x: Tensor) -> Any:
    parameters = {name: p.detach() for name, p in rnn.named_parameters()}
    return list(grad(_loss_of, 1)(rnn, parameters, x).values())


@_attempt("first derivative")
def _first_order(rnn: nn.Module) -> Any:
    return _gradients(rnn, _loss(rnn, _sequence()))


@_attempt("first derivative in eval mode")
def _in_eval_mode(rnn: nn.Module) -> Any:
    return _first_order(rnn.eval())


@_attempt("second derivative (`create_graph=True`)")
def _double_backward(rnn: nn.Module, input: Any = None) -> Any:
    value = _loss(rnn, _sequence() if input is None else input)
    return _gradients(rnn, sum(g.pow(2).sum() for g in _gradients(rnn, value, create_graph=True)))


@_attempt("second derivative of a packed sequence")
def _double_backward_packed(rnn: nn.Module) -> Any:
    return _double_backward(rnn, _packed_sequence())


@_attempt("gradient penalty on the input")
def _gradient_penalty(rnn: nn.Module) -> Any:
    x = _sequence().requires_grad_()
    (gradient,) = torch.autograd.grad(_loss(rnn, x), x, create_graph=True)
    return _gradients(rnn, gradient.norm())


@_attempt("forward mode (`torch.func.jvp`)")
def _forward_mode(rnn: nn.Module) -> Any:
    x = _sequence()
    return jvp(lambda x: _loss(rnn, x), (x,), (torch.ones_like(x),))[1]


@_attempt("`torch.func.grad` with `functional_call`")
def _functional_gradient(rnn: nn.Module) -> Any:
    return _gradients_by_transform(rnn, _sequence())


@_attempt("`torch.func.hessian`")
def _functional_hessian(rnn: nn.Module) -> Any:
    return hessian(lambda x: _loss(rnn, x))(_sequence())


@_attempt("`torch.vmap` over inputs")
def _vmap_over_inputs(rnn: nn.Module) -> Any:
    return vmap(lambda x: _loss(rnn, x))(torch.stack([_sequence(), -_sequence()]))


@_attempt("per-sample gradients (`vmap` of `grad`)")
def _per_sample_gradients(rnn: nn.Module) -> Any:
    return vmap(lambda x: _gradients_by_transform(rnn, x.unsqueeze(1)), in_dims=1)(_sequence())


@_attempt("ensemble (`vmap` over `stack_module_state`)")
def _ensemble(rnn: nn.Module) -> Any:
    members = [rnn, copy.deepcopy(rnn)]
    with torch.no_grad():
        next(members[1].parameters()).mul_(2)
    (parameters, _), x = stack_module_state(members), _sequence()
    return vmap(lambda p: _loss_of(rnn, p, x))(parameters)


def _compiled(rnn: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(lambda x: _loss(rnn, x), fullgraph=True, backend="aot_eager", **options)


@_attempt("`torch.compile(fullgraph=True)`, training step", _first_order)
def _compiled_step(rnn: nn.Module) -> Any:
    return _gradients(rnn, _compiled(rnn)(_sequence()))


def _three_steps(rnn: nn.Module, step: Any = None) -> Any:
    step = step or (lambda x: _loss(rnn, x))
    values = [step(_sequence(*sizes)) for sizes in [(4, 3), (9, 7), (13, 2)]]
    return [_gradients(rnn, value) for value in values]


@_attempt("the same, one graph for every length and batch", _three_steps)
def _compiled_once(rnn: nn.Module) -> Any:
    with torch._dynamo.config.patch(error_on_recompile=True):
        return _three_steps(rnn, _compiled(rnn, dynamic=True))


@_attempt("the same, packed sequence", lambda rnn: _gradients(rnn, _loss(rnn, _packed_sequence())))
def _compiled_packed(rnn: nn.Module) -> Any:
    return _gradients(rnn, _compiled(rnn)(_packed_sequence()))


@_attempt("`torch.export` with dynamic time and batch", lambda rnn: rnn(_sequence(9, 7)))
def _exported(rnn: nn.Module) -> Any:
    shapes = ({0: Dim("time", min=2), 1: Dim("batch", min=2)},)
    return export(rnn, (_sequence(),), dynamic_shapes=shapes).module()(_sequence(9, 7))


@_attempt("activation checkpointing", _first_order)
def _checkpointed(rnn: nn.Module) -> Any:
    return _gradients(rnn, checkpoint(_loss, rnn, _sequence(), use_reentrant=False))


def _shapes(rnn: nn.Module) -> Any:
    return [torch.tensor(t.shape, device="cpu") for t in flat_results(rnn(_sequence()))]


@_attempt("meta device", _shapes)
def _on_meta(rnn: nn.Module) -> Any:
    with torch.device("meta"):
        return _shapes(copy.deepcopy(rnn).to("meta"))


def _multiply_adds(rnn: nn.Module) -> int:
    return 2 * T * B * cell_of(rnn.rnn).blocks * H * (I + H)


@_attempt("`FlopCounterMode` counts 2TBH(I + H) for each gate", _multiply_adds)
def _flops(rnn: nn.Module) -> Any:
    with FlopCounterMode(display=False) as counter:
        rnn(_sequence())
    return counter.get_total_flops()


# ---- the table -----------------------------------------------------------------------------------


def _outcome(attempt: Attempt, oracle: Attempt, rnn: nn.Module) -> str:
    """Return "yes", or "no: " and why."""
    torch._dynamo.reset()
    expected = oracle(_LoopRNN(rnn))
    try:
        actual = attempt(rnn)
    except Exception as error:  # whatever goes wrong is the answer
        words = re.sub(r"\s+", " ", str(error)).replace("|", "\\|")
        first_sentence = re.split(r"(?<=[.:]) ", words)[0]
        return f"no: {type(error).__name__}: {first_sentence[:100]}"
    try:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, check_stride=False)
    except AssertionError:
        return "no: wrong numbers"
    return "yes"


def _columns() -> dict[str, tuple[type[nn.Module], str]]:
    """Each implementation by name: its class, and where it runs."""
    columns = {
        "`nn.RNN`, CPU": (nn.RNN, "cpu"),
        "`nn.RNN`, cuDNN": (nn.RNN, "cuda"),
        **{
            f"`{kind.__name__}`, CPU": (kind, "cpu")
            for kind in (FusedRNN, FusedGRU, FusedLSTM, LeakyRNN)
        },
    }
    return columns | ({"`FusedRNN`, CUDA": (FusedRNN, "cuda")} if torch.cuda.is_available() else {})


def outcomes() -> dict[str, dict[str, str]]:
    """Try everything: row, then column, to outcome."""

    def outcome(title: str, kind: type[nn.Module], device: str) -> str:
        if device == "cuda" and not torch.cuda.is_available():
            return "not tried here"
        with torch.device(device):
            torch.manual_seed(0)
            rnn = kind(I, H)
            return _outcome(*ATTEMPTS[title], rnn)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            title: {name: outcome(title, *column) for name, column in _columns().items()}
            for title in ATTEMPTS
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
        f"our layers on the {'native' if backend.use_native('cpu', torch.float32) else 'reference'}"
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
