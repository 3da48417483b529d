"""A floor under the time of a case, from what this card does.

    exchange   an empty persistent kernel that passes on as many words in every step (floor.cu),
               with the plan that the case ran with; launch included
    recurrent  the products that wait for the step before, at the rate of a large torch.mm, times
               the share of the card's multiprocessors that the plan uses
    products   the other products, at that rate on the whole card
    bytes      the sequences, read or written once, at the rate of a large copy

The floor is ``exchange + recurrent + max(products, bytes)``. Left out are the nonlinearity, loading
U, and that small products do not run at the rate of large ones; the sum leaves out that the
exchange of one batch tile can hide behind the products of another. So it is no law of nature, but
what is worth comparing with. Recurrences that stay in device memory ("streamed") have none.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu.cases import OURS, GpuCase
from benchmarks.gpu.context import Context, StageError
from benchmarks.gpu.native import FLOOR, build_program
from benchmarks.gpu.problems import tf32_allowed
from benchmarks.gpu.timing import seconds_by_events
from benchmarks.reading import number

# Numbers of the enumerations in csrc/recurrence.h and csrc/cuda/plan.h.
_DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
_RESIDENCIES = {"one_sm": 0, "cluster": 1, "grid": 2, "streamed": 3}
_ARITHMETICS = {"fma": 0, "tensor_core": 1, "tf32": 2}

_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}

_LARGE = {"bfloat16": 8192, "float16": 8192}  # rows and columns of a large product; others:
_LARGE_OTHERS = 4096
_COPIED = 1 << 30  # bytes


def floor(context: Context) -> None:
    """Write the floor of every case that was timed and has a plan."""
    context.need_gpu("the floor")
    timings = [t for t in _timings(context) if isinstance(t.get("plans"), dict)]
    if not timings:
        raise StageError("no case was timed with a plan: run the stage bench first")
    program = build_program(FLOOR, context.work)
    lines = sorted({line for timing in timings for line in pass_lines(timing).values()})
    answers = run_program([str(program)], lines, context.seconds / 2)
    rates = measured_rates()
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    floors, notes = {}, []
    for timing in timings:
        exchange, why = exchange_seconds(timing, answers)
        label = GpuCase.from_json(timing["case"]).label
        if exchange is None:
            notes.append(f"{label}: {why}")
        else:
            floors[label] = floor_of(timing, exchange, rates, multiprocessors)
    context.write("floor.json", {"rates": rates, "cases": floors, "without": notes})
    wrong = sorted({str(a) for a in answers.values() if isinstance(a, str) and "wrongly" in a})
    if wrong:
        raise StageError(f"the exchange itself is wrong: {wrong[0]}")
    print("\n".join(notes))
    tera = {name: number(rate / 1e12) for name, rate in rates.items()}
    print(f"{len(floors)} floors; per second: {tera} (10^12 operations, copy: bytes)")


def _timings(context: Context) -> list[dict[str, Any]]:
    path = context.work / "timings.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# ---- the empty kernel ----------------------------------------------------------------------------


def pass_lines(timing: dict[str, Any]) -> dict[str, str]:
    """Return the program's line of input for each pass of a case: forward, backward."""
    case = GpuCase.from_json(timing["case"]).case
    lines = {}
    for name, plan in timing["plans"].items():
        problem = [case.T, case.B, case.I if name == "forward" else 0, case.H]
        numbers = [
            *problem,
            2 if case.bidirectional else 1,
            _DTYPES[case.dtype],
            _RESIDENCIES[plan["residency"]],
            _ARITHMETICS[plan["arithmetic"]],
            int(plan["fuse_input"]),
            *(plan[field] for field in ("blocks", "columns", "engine_columns")),
            *(plan[field] for field in ("row_warps", "depth_split")),
        ]
        lines[name] = " ".join(map(str, numbers))
    return lines


def run_program(
    command: Sequence[str], lines: Sequence[str], seconds: float
) -> dict[str, float | str]:
    """Return the program's answer to each line: seconds, or why there are none."""
    try:
        done = subprocess.run(
            command,
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        output, how = done.stdout, f"the program ended with {done.returncode}"
    except subprocess.TimeoutExpired as error:
        kept = error.stdout or b""
        output = kept.decode() if isinstance(kept, bytes) else kept
        how = "the program did not end in time"
    answers: dict[str, float | str] = dict.fromkeys(lines, how)
    for line, answer in zip(lines, output.splitlines(), strict=False):
        is_error = answer.startswith("error: ")
        answers[line] = answer.removeprefix("error: ") if is_error else float(answer)
    return answers


def exchange_seconds(
    timing: dict[str, Any], answers: dict[str, float | str]
) -> tuple[float | None, str]:
    """Return the time of the empty kernels of all passes and layers, or None and why."""
    total = 0.0
    for name, line in pass_lines(timing).items():
        answer = answers[line]
        if isinstance(answer, str):
            return None, f"{name}: {answer}"
        total += answer
    return total * timing["case"]["case"]["num_layers"], ""


# ---- rates ---------------------------------------------------------------------------------------


def measured_rates(seconds_of: Callable[..., float] = seconds_by_events) -> dict[str, float]:
    """Return operations per second of a large product by dtype, and ``copy``: bytes per second.

    On random data: a card is faster on zeros.
    """
    rates = {}
    for name in ("float32", "tf32", "bfloat16", "float16", "float64"):
        size = _LARGE.get(name, _LARGE_OTHERS)
        dtype = getattr(torch, "float32" if name == "tf32" else name)
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        with tf32_allowed(name == "tf32"):
            rates[name] = 2 * size**3 / _median(product, seconds_of)
    source = torch.randn(_COPIED // 4, device="cuda")
    target = torch.empty_like(source)
    rates["copy"] = 2 * _COPIED / _median(lambda: target.copy_(source), seconds_of)
    return rates


def _median(run: Callable[[], Any], seconds_of: Callable[..., float]) -> float:
    run()
    return statistics.median(seconds_of(run, 3) for _ in range(5))


# ---- the floor -----------------------------------------------------------------------------------


def operations_of(case: GpuCase, tokens: int) -> tuple[float, float]:
    """Return the operations of products that wait for the step before, and of all others."""
    c = case.case
    directions = 2 if c.bidirectional else 1
    recurrent = others = 0.0
    for layer in range(c.num_layers):
        features = c.I if layer == 0 else directions * c.H
        of_state = 2.0 * tokens * c.H * c.H * directions
        of_input = 2.0 * tokens * c.H * features * directions
        recurrent += of_state
        others += of_input
        if c.mode == "train":
            recurrent += of_state  # delta, backwards
            others += of_state + of_input  # dU, dW
            if layer > 0 or c.wants_input_gradient:
                others += of_input  # dx
    return recurrent, others


def bytes_of(case: GpuCase, tokens: int) -> float:
    """Return the bytes of the sequences that have to be read or written."""
    c = case.case
    directions = 2 if c.bidirectional else 1
    features = 0
    for layer in range(c.num_layers):
        inputs, outputs = c.I if layer == 0 else directions * c.H, directions * c.H
        features += inputs + outputs  # x, y
        if c.mode == "train":
            features += 2 * outputs + inputs  # y, dy, x once more
            if layer > 0 or c.wants_input_gradient:
                features += inputs  # dx
    return float(tokens) * features * _BYTES[c.dtype]


def floor_of(
    timing: dict[str, Any], exchange: float, rates: dict[str, float], multiprocessors: int
) -> dict[str, float]:
    """Return the floor in seconds with its parts."""
    case = GpuCase.from_json(timing["case"])
    rate = rates["tf32" if case.tf32 else case.case.dtype]
    recurrent, others = operations_of(case, timing["tokens"])
    plan = timing["plans"]["forward"]
    blocks = plan["blocks"] * plan["batch_tiles"] * (2 if case.case.bidirectional else 1)
    share = min(1.0, blocks / multiprocessors)
    parts = {
        "exchange": exchange,
        "recurrent": recurrent / (rate * share),
        "products": others / rate,
        "bytes": bytes_of(case, timing["tokens"]) / rates["copy"],
    }
    seconds = parts["exchange"] + parts["recurrent"] + max(parts["products"], parts["bytes"])
    return {"seconds": seconds, **parts}


def over_floor(timing: dict[str, Any], floors: dict[str, Any] | None) -> float | None:
    """Return our time, in a graph where there is one, over the floor; None where there is none.

    In a graph, because what Python takes is no business of the kernel's.
    """
    found = ((floors or {}).get("cases") or {}).get(GpuCase.from_json(timing["case"]).label)
    if found is None:
        return None
    for launch in ("graphed", "eager"):
        ours = timing.get(launch, {}).get(OURS, {})
        if "seconds" in ours:
            return ours["seconds"]["median"] / found["seconds"]
    return None
