"""A floor under the time of a case on a GPU, from what this card does.

    python -m benchmarks.gpu.floor FOLDER          # FOLDER/results.json -> FOLDER/floor.json

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
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.problem import tf32_allowed
from benchmarks.tables import number, timings_of
from benchmarks.timing import seconds_by_events

# Numbers of the enumerations in csrc/recurrence.h and csrc/cuda/plan.h.
_DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
_RESIDENCIES = {"one_sm": 0, "cluster": 1, "grid": 2, "streamed": 3}
_ARITHMETICS = {"fma": 0, "tensor_core": 1, "tf32": 2}

_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
_LARGE = {"bfloat16": 8192, "float16": 8192}  # rows and columns of a large product; others: 4096
_COPIED = 1 << 30  # bytes


def pass_lines(case: Case, plans: Mapping[str, Any]) -> dict[str, str]:
    """Return floor.cu's line of input for each pass of a case: forward, backward."""
    lines = {}
    for name, plan in plans.items():
        numbers = [
            *(case.T, case.B, case.I if name == "forward" else 0, case.H, case.directions),
            *(_DTYPES[case.dtype], _RESIDENCIES[plan["residency"]]),
            *(_ARITHMETICS[plan["arithmetic"]], int(plan["fuse_input"])),
            *(plan[field] for field in ("blocks", "columns", "engine_columns")),
            *(plan[field] for field in ("row_warps", "depth_split")),
        ]
        lines[name] = " ".join(map(str, numbers))
    return lines


def run_program(
    command: Sequence[str], lines: Sequence[str], seconds: float
) -> dict[str, float | str]:
    """Return the program's answer to each line: seconds, or why there are none."""
    text = "".join(f"{line}\n" for line in lines)
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
    try:
        done = subprocess.run(command, input=text, timeout=seconds, **options)
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


def measured_rates(seconds_of: Callable[..., float] = seconds_by_events) -> dict[str, float]:
    """Return operations per second of a large product by dtype, and ``copy``: bytes per second.

    On random data: a card is faster on zeros.
    """

    def median(run: Callable[[], Any]) -> float:
        run()
        return statistics.median(seconds_of(run, 3) for _ in range(5))

    rates = {}
    for name in ("float32", "tf32", "bfloat16", "float16", "float64"):
        size = _LARGE.get(name, 4096)
        dtype = getattr(torch, "float32" if name == "tf32" else name)
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        with tf32_allowed(name == "tf32"):
            rates[name] = 2 * size**3 / median(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
    source = torch.randn(_COPIED // 4, device="cuda")
    target = torch.empty_like(source)
    rates["copy"] = 2 * _COPIED / median(lambda: target.copy_(source))
    return rates


def bytes_of(case: Case, tokens: int) -> float:
    """Return the bytes of the sequences that have to be read or written."""
    features = 0
    for layer in range(case.num_layers):
        outputs = case.directions * case.H
        inputs = case.I if layer == 0 else outputs
        features += inputs + outputs  # x, y
        if case.mode == "train":
            features += 2 * outputs + inputs  # y, dy, x once more
            if layer > 0 or case.wants_input_gradient:
                features += inputs  # dx
    return float(tokens) * features * _BYTES[case.dtype]


def floor_of(
    case: Case,
    timing: Mapping[str, Any],
    exchange: float,
    rates: Mapping[str, float],
    multiprocessors: int,
) -> dict[str, float]:
    """Return the floor in seconds with its parts; ``exchange`` is that of one layer."""
    rate = rates["tf32" if case.tf32 else case.dtype]
    recurrent, others = case.operations(timing["tokens"])
    plan = timing["plans"]["forward"]
    blocks = plan["blocks"] * plan["batch_tiles"] * case.directions
    parts = {
        "exchange": exchange * case.num_layers,
        "recurrent": recurrent / (rate * min(1.0, blocks / multiprocessors)),
        "products": others / rate,
        "bytes": bytes_of(case, timing["tokens"]) / rates["copy"],
    }
    seconds = parts["exchange"] + parts["recurrent"] + max(parts["products"], parts["bytes"])
    return {"seconds": seconds, **parts}


def main(folder: Path) -> int:
    """Write the floor of every case that was timed and has a plan; return the exit status."""
    file, timings = folder / "bench" / "results.json", []
    if file.is_file():
        results = json.loads(file.read_text())
        timings = [(c, t) for c, t in timings_of(results) if isinstance(t.get("plans"), dict)]
    if not timings or not (folder / "floor").is_file():
        print("no case was timed with a plan" if not timings else "floor.cu is not compiled")
        return 1
    lines = sorted({line for c, t in timings for line in pass_lines(c, t["plans"]).values()})
    answers = run_program([str(folder / "floor")], lines, 15.0)
    rates = measured_rates()
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    floors = {}
    for case, timing in timings:
        times = [answers[line] for line in pass_lines(case, timing["plans"]).values()]
        seconds = [time for time in times if isinstance(time, float)]
        if len(seconds) == len(times):
            floors[case.name] = floor_of(case, timing, sum(seconds), rates, multiprocessors)
        else:
            print(f"{case.name}: {next(time for time in times if isinstance(time, str))}")
    (folder / "floor.json").write_text(json.dumps({"rates": rates, "cases": floors}))
    wrong = [answer for answer in answers.values() if "wrongly" in str(answer)]
    tera = ", ".join(f"{name} {number(rate / 1e12)}" for name, rate in rates.items())
    print(f"{len(floors)} floors; 10^12 operations a second (copy: bytes): {tera}")
    if wrong:
        print(f"the exchange itself is wrong: {wrong[0]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
