"""A floor under the time of a case on a GPU, from what this card does.

    python -m benchmarks.gpu.floor FOLDER      # FOLDER/bench/results.json -> FOLDER/floor.json

    exchange   an empty persistent kernel that passes on as many words in every step (floor.cu),
               with the plan that the case ran with; launch included
    recurrent  the products that wait for the step before, at the rate of a large torch.mm, times
               the share of the card's multiprocessors that the plan uses
    products   the other products, at that rate on the whole card

The floor is the sum. Left out are the nonlinearity, loading U, reading and writing the sequences,
and that small products do not run at the rate of large ones; the sum leaves out that the exchange
of one batch tile can hide behind the products of another. So it is no law of nature, but what is
worth comparing with. Recurrences that stay in device memory ("streamed") have none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.measure import PLAN_FIELDS
from benchmarks.problem import tf32_allowed
from benchmarks.tables import load, number, timings_of
from benchmarks.timing import seconds_by_events


def lines_of(case: Case, plans: Mapping[str, Any]) -> list[str]:
    """Return floor.cu's line of input for each pass of a case: forward, backward."""
    lines = []
    for name, plan in plans.items():
        sizes = case.T, case.B, case.I if name == "forward" else 0, case.H, case.directions
        values = {field: plan[field] for field in PLAN_FIELDS}
        values["fuse_input"] = int(values["fuse_input"])
        decided = ",".join(f"{field}={value}" for field, value in values.items())
        lines.append(" ".join(map(str, [*sizes, case.dtype, int(case.tf32), decided])))
    return lines


def run_program(
    command: Sequence[str], lines: Sequence[str], seconds: float
) -> dict[str, float | str]:
    """Return the program's answer to each line: seconds, or why there are none."""
    text = "".join(f"{line}\n" for line in lines).encode()
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "timeout": seconds, "check": False}
    try:
        done = subprocess.run(command, input=text, **options)
        output, how = done.stdout, f"the program ended with {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, how = error.stdout or b"", "the program did not end in time"
    answers: dict[str, float | str] = dict.fromkeys(lines, how)
    for line, answer in zip(lines, output.decode().splitlines(), strict=False):
        is_error = answer.startswith("error: ")
        answers[line] = answer.removeprefix("error: ") if is_error else float(answer)
    return answers


def measured_rates() -> dict[str, float]:
    """Return operations per second of a large product by dtype.

    On random data: a card is faster on zeros.
    """
    rates = {}
    for name in ("float32", "tf32", "bfloat16", "float16"):
        dtype = getattr(torch, "float32" if name == "tf32" else name)
        a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        with tf32_allowed(name == "tf32"):
            seconds = min(seconds_by_events(lambda a=a, b=b: torch.mm(a, b), 3) for _ in range(5))
        rates[name] = 2 * 8192**3 / seconds
    return rates


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
    }
    return {"seconds": sum(parts.values()), **parts}


def main(folder: Path) -> int:
    """Write the floor of every case that was timed and has a plan; return the exit status."""
    timings = [
        (case, timing, lines_of(case, timing["plans"]))
        for case, timing in timings_of(load(folder / "bench"))
        if isinstance(timing.get("plans"), dict)
    ]
    lines = sorted({line for *_, lines in timings for line in lines})
    answers = run_program([str(folder / "floor")], lines, 15.0)
    rates = measured_rates()
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    floors = {}
    for case, timing, lines in timings:
        reasons = [answers[line] for line in lines if isinstance(answers[line], str)]
        if reasons:
            print(f"{case.name}: {reasons[0]}")
        else:
            exchange = sum(float(answers[line]) for line in lines)
            floors[case.name] = floor_of(case, timing, exchange, rates, multiprocessors)
    (folder / "floor.json").write_text(json.dumps({"rates": rates, "cases": floors}))
    wrong = [answer for answer in answers.values() if "wrongly" in str(answer)]
    print("".join(f"the exchange itself is wrong: {answer}\n" for answer in wrong[:1]), end="")
    tera = ", ".join(f"{name} {number(rate / 1e12)}" for name, rate in rates.items())
    print(f"{len(floors)} floors; 10^12 operations a second: {tera}")
    return 1 if wrong or not floors else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
