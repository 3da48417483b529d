"""The file of results, and what is made of it: tables in a terminal, a page, figures.

A file is one JSON object, written whole or not at all:

    schema, complete, quick    version of this form; false while a run goes on; tiny sizes
    command, device, suites    what was asked for
    machine, contestants       where, who, and ``backend``: what FusedRNN ran on
    timings, unmeasured        one entry for each case and number of threads; names of the others
    accuracy, memory           one entry for each case, each point
    stages, floor              of a run on a GPU: `benchmarks.gpu`
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.gates import gate_table
from benchmarks.tables import escaped, stage_table, summary_table, tables_of

Results = Mapping[str, Any]

SCHEMA = 2
FILE, PAGE = "results.json", "results.md"


def empty_results(**fields: Any) -> dict[str, Any]:
    """Return the results of a run that has measured nothing yet."""
    lists = ("timings", "unmeasured", "accuracy", "memory")
    return {"schema": SCHEMA, "complete": False, **fields, **{name: [] for name in lists}}


def command_line(module: str, arguments: Sequence[str] | None) -> str:
    """Return the command without its paths, which say nothing to others."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for option in ("--output", "--page", "--commit"):
        words = [word for word in words if not word.startswith(f"{option}=")]
        while option in words:
            at = words.index(option)
            del words[at : at + 2]
    return " ".join(["python -m", module, *words])


def save(results: Results, folder: Path) -> None:
    """Write the results into a folder: strict JSON, a line for each measurement."""
    fields = []
    for key, value in _strict(results).items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            lines = [json.dumps(item, allow_nan=False) for item in value]
            text = "[\n" + ",\n".join(lines) + "\n]"
        fields.append(f"{json.dumps(key)}: {text}")
    write_text(folder / FILE, "{\n" + ",\n".join(fields) + "\n}\n")


def load(path: Path) -> dict[str, Any]:
    """Read results.

    Raises:
        ValueError: the file is not one of results, or of another version.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} holds no results in the form that this version writes")
    return results


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _strict(value: Any) -> Any:
    """Return the value with six digits, and with None for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def unused(folder: Path) -> Path:
    """Return the folder, or one with a number after it if results are there already."""
    names = [folder, *(folder.with_name(f"{folder.name}-{i}") for i in range(2, 1000))]
    return next(name for name in names if not (name / FILE).exists())


# ---- for people ----------------------------------------------------------------------------------


def render(results: Results, folder: Path, page: Path | None = None) -> None:
    """Print the tables, draw the figures where matplotlib is installed, write the pages."""
    tables = [gate_table(results), *tables_of(results)]
    if "stages" in results:  # a log should end with something short
        tables = [summary_table(results), gate_table(results), stage_table(results)]
    print("\n\n".join(table.text() for table in tables if table.rows))
    print("".join(f"\nnote: {warning}" for warning in warnings_of(results)))
    drawn: list[str] = []
    if importlib.util.find_spec("matplotlib"):
        from benchmarks.figures import draw

        drawn = draw(results, folder)
    write_text(folder / PAGE, markdown(results, drawn))
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        from_page = Path(os.path.relpath(folder, page.parent)).as_posix()
        write_text(page, markdown(results, [f"{from_page}/{name}" for name in drawn]))
    print(f"written: {folder}")


def warnings_of(results: Results) -> list[str]:
    """Return what a reader must know before believing the numbers."""
    lines = []
    if not results["complete"]:
        lines.append("the run was ended before it finished: this is what there was until then")
    if results["quick"]:
        lines.append("a run of tiny sizes: it shows that everything runs, not how fast")
    if results["backend"] != "native":
        lines.append(f"FusedRNN ran on the {results['backend']}, not on its kernels")
    return lines + machine.disturbances(timing.get("load") for timing in results["timings"])


_LEGEND = """\
A ratio is the baseline's time over another's, so above 1 is faster than the baseline: the median
over rounds in which all ran in turn in one process, with the interval that holds the true median
with 95 % confidence (before 2026-11-29: the quartiles). dtype, TF32 setting and number of threads,
each bound to a core, are the same for all. Forward passes are without gradients; a training step is
the forward pass and the gradients of all parameters, of the input too where I >= 64.

Target: what a prototype reached on two cores with AVX-512; on a GPU, what is to be reached. Over
torch's best: the ratio to the baseline at the number of threads, of those measured, at which it is
fastest. Share of peak: of the multiply-adds that as many cores can do from register to register.
Cost of a token: a time step of a sample of a packed sequence over one of the dense sequence. In
graphs: both replayed from a CUDA graph. Floor: `benchmarks/gpu/floor.py`. Planned: the planner's
estimate. An LSTM has four times the recurrent weights, a GRU three times.
"""


def markdown(results: Results, figures: Sequence[str] = ()) -> str:
    """Return the whole report.

    Args:
        results: as `load` returns them.
        figures: links to bitmap figures, shown on top.
    """
    about, contestants = results["machine"], results["contestants"].values()
    facts = [f"{name} {value}" for name, value in about.items() if value is not None]
    facts += [f"{c['title']} {c['version']}" for c in contestants if c["version"]]
    script = "benchmarks.gpu" if "stages" in results else "benchmarks.run"
    lines = [
        f"<!-- Generated by `python -m {script}`; do not edit. -->",
        "",
        f"# Measured speed, accuracy and memory: {about.get('card') or about['cpu']}",
        "",
        f"{', '.join(facts)}. FusedRNN's backend: {results['backend']}.",
        "",
        f"    {results['command']}",
        "",
        _LEGEND,
    ]
    for warning in warnings_of(results):
        lines += [f"> **Note:** {escaped(warning)}", ""]
    for figure in figures:
        name = figure.rpartition("/")[2].removesuffix(".png").replace("_", " ")
        lines += [f"![{name}]({figure})", ""]
    tables = [gate_table(results), *tables_of(results)]
    return "\n".join([*lines, *(table.markdown() for table in tables if table.rows)])
