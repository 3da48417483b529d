"""How much gradient each model lets through before it is trained, beside earlier measurements.

    python -m experiments.initialisation

measures, for nine combinations of model and initialisation, how the total adjoint falls with the
lag: log10 of norm(a_{T-k}) / norm(a_T), where a_t is dL/dh_t, and for an LSTM that of (h, c)
together. The folder that it names holds the table, the same as JSON, every profile as CSV and the
figures of ``docs/vanishing-gradients.md``.

The earlier measurements were made with H = 128, input U[0, 1]^28 and 5 seeds. What they left open
is assumed here: T = 100; the loss is a random linear function of h_T, so dL/dh_T is a Gaussian
vector, the same for each sample (scaled to norm 1, which no ratio sees); the norm of a batch is the
mean of its samples' norms; chrono's T_max is T; float64.

Shape legend: T time steps, B batch, I inputs, H hidden size, S seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from experiments import console, files, initialisation_figures, run_folder
from experiments.numerics import use_threads
from experiments.provenance import provenance
from experiments.record import write_json
from rnn_cuda import FusedGRU, FusedLSTM, FusedRNN, init
from rnn_cuda.cells import cell_of
from rnn_cuda.instruments import GradientFlow
from rnn_cuda.trajectory import trajectory_of

LAGS = (10, 25, 50, 99)
SPREAD = 2
"""What counts as the spread of the seeds: this many standard deviations around their mean."""
INPUT_SIZE = 28
DEFAULT_FOLDER = Path("runs/initialisation")


@dataclass(frozen=True)
class Settings:
    """What can be changed on the command line."""

    hidden_size: int = 128
    steps: int = 100
    batch_size: int = 32
    seeds: int = 20

    @property
    def are_those_of_the_reference(self) -> bool:
        """Whether earlier measurements hold for these (the batch size averages, no more)."""
        return (self.hidden_size, self.steps) == (128, 100)


Build = Callable[[Settings], nn.Module]


@dataclass(frozen=True)
class Row:
    """A model at initialisation.

    Attributes:
        family: RNN, LSTM or GRU.
        build: draws it from torch's global generator.
        reference: measured before, log10 at ``LAGS``, one decimal.
    """

    family: str
    build: Build
    reference: tuple[float, ...]


def _elman(initialise: Callable[[nn.Module], Any] | None = None, **options: Any) -> Build:
    def build(settings: Settings) -> nn.Module:
        core = FusedRNN(INPUT_SIZE, settings.hidden_size, **options)
        if initialise is not None:
            initialise(core)
        return core

    return build


def _gated(kind: type[nn.Module], gate_bias: float | str | None = None) -> Build:
    def build(settings: Settings) -> nn.Module:
        core = kind(INPUT_SIZE, settings.hidden_size)
        if gate_bias == "chrono":
            init.chrono_(core, settings.steps)
        elif gate_bias is not None:
            init.forget_bias_(core, gate_bias)
        return core

    return build


ROWS: dict[str, Row] = {
    "RNN default": Row("RNN", _elman(), (-2.6, -6.5, -12.9, -25.4)),
    "RNN orthogonal": Row("RNN", _elman(init.orthogonal_), (-0.5, -1.3, -2.6, -4.9)),
    "RNN N(0, 1.5²/H)": Row(
        "RNN", _elman(lambda core: init.scaled_gaussian_(core, 1.5)), (0.2, 0.5, 1.0, 2.5)
    ),
    "IRNN": Row("RNN", _elman(init.irnn_, nonlinearity="relu"), (-0.1, -0.1, -0.1, -0.2)),
    "LSTM default": Row("LSTM", _gated(FusedLSTM), (-2.5, -5.4, -10.0, -18.9)),
    "LSTM forget bias 1": Row("LSTM", _gated(FusedLSTM, 1.0), (-1.3, -2.3, -3.8, -6.7)),
    "LSTM chrono": Row("LSTM", _gated(FusedLSTM, "chrono"), (-0.5, -0.6, -0.7, -1.0)),
    "GRU default": Row("GRU", _gated(FusedGRU), (-2.2, -5.1, -9.8, -19.1)),
    "GRU chrono": Row("GRU", _gated(FusedGRU, "chrono"), (-0.1, -0.2, -0.4, -0.7)),
}


# ---- measuring -----------------------------------------------------------------------------------


def measure_row(row: Row, seed: int, settings: Settings) -> dict[str, list[float]]:
    """Return the profiles of one model from one seed, each a number per time step, ``(T,)``.

    All are means over the samples of a batch, where the norm of dL/dh_T is 1.

    Returns:
        ``state``: norm of the adjoint of all that is carried on: h, for an LSTM (h, c). For an LSTM
        also ``hidden``: of h alone. For a gated model also ``additive``: what arrives by the
        additive path alone (:func:`additive_path`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        core = row.build(settings).double()
        x_TBI = torch.rand(settings.steps, settings.batch_size, INPUT_SIZE, dtype=torch.float64)
        direction_H = torch.randn(settings.hidden_size, dtype=torch.float64)
    direction_H /= direction_H.norm()
    with GradientFlow(core) as flow:
        output_TBH, _ = core(x_TBI)
        # The sum of the samples' own losses, <direction, h_T>.
        (output_TBH[-1] @ direction_H).sum().backward()
    norms_TB = {"state": flow.joint_adjoint_norm["l0"]}
    cell = cell_of(core)
    if cell.has_cell_state:
        norms_TB["hidden"] = flow.adjoint_norm["l0"]
    if cell.gate_names:
        norms_TB["additive"] = additive_path(core, x_TBI, direction_H)
    return {name: norm_TB.mean(dim=1).tolist() for name, norm_TB in norms_TB.items()}


@torch.no_grad()
def additive_path(core: FusedLSTM | FusedGRU, x_TBI: Tensor, direction_H: Tensor) -> Tensor:
    """Return the norm of the adjoint that would arrive if the state were only kept and added to.

    That is e_{t-1} = k_t * e_t, where k_t is the gate that keeps the state (f in an LSTM, z in a
    GRU), from e_T = dL/dc_T = o_T * (1 - tanh^2 c_T) * dL/dh_T or e_T = dL/dh_T.

    Args:
        core: one layer, one direction, time-major.
        x_TBI: input.
        direction_H: dL/dh_T of each sample.

    Returns:
        ``(T, B)``.
    """
    step = trajectory_of(core, x_TBI, None, layer=0, reverse=False).linearisation
    adjoint = direction_H if step.exposure is None else step.exposure[-1] * direction_H
    norms = [adjoint.expand(x_TBI.shape[1], -1).norm(dim=-1)]
    for gate in step.keep[1:].flip(0):
        adjoint = gate * adjoint
        norms.append(adjoint.norm(dim=-1))
    return torch.stack(norms[::-1])


def log10_at(profile: Sequence[float], lags: Sequence[int]) -> list[float]:
    """Return log10 of the norm at each lag, to four decimals; -inf for an exact zero."""
    norms = [profile[len(profile) - 1 - lag] for lag in lags]
    return [round(math.log10(norm), 4) if norm > 0 else -math.inf for norm in norms]


def study(settings: Settings, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure every row from every seed.

    Returns:
        What ``results.json`` holds, and every profile (``profiles``: by row and name, ``(S, T)``).
    """
    lags = [lag for lag in LAGS if lag < settings.steps]
    rows, profiles = {}, {}
    for label, row in ROWS.items():
        runs = [measure_row(row, seed, settings) for seed in range(settings.seeds)]
        profiles[label] = {name: [run[name] for run in runs] for name in runs[0]}
        rows[label] = {
            "reference": row.reference if settings.are_those_of_the_reference else None,
            "log10_ratio": [
                log10_at([norm / profile[-1] for norm in profile], lags)
                for profile in profiles[label]["state"]
            ],
            "log10_norm": {
                name: [log10_at(profile, lags) for profile in of_seeds]
                for name, of_seeds in profiles[label].items()
            },
        }
        columns = zip(*rows[label]["log10_ratio"], strict=True)
        tell(f"{label:20} " + "  ".join(f"{mean(column):7.2f}" for column in columns))
    return {
        "settings": {**asdict(settings), "input_size": INPUT_SIZE, "lags": lags},
        "provenance": provenance("cpu"),
        "rows": rows,
        "profiles": profiles,
    }


# ---- reporting -----------------------------------------------------------------------------------


def distance(reference: float, values: Sequence[float]) -> float:
    """Return how far a reference, given to one decimal, is from the mean of the seeds.

    In standard deviations of a seed; 0 where rounding explains it.
    """
    beyond_rounding = max(0.0, abs(reference - mean(values)) - 0.05)
    if beyond_rounding == 0:
        return 0.0
    spread = stdev(values) if len(values) > 1 else 0.0
    return beyond_rounding / spread if spread > 0 else math.inf


def table(found: Mapping[str, Any]) -> str:
    """Return mean and standard deviation over seeds, and the reference, as Markdown.

    A reference that is not reproduced is bold.
    """
    lines = _header(found, "")
    for label, row in found["rows"].items():
        cells = []
        for index, values in enumerate(zip(*row["log10_ratio"], strict=True)):
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cell = f"{mean(values):+.2f}{spread}"
            if row["reference"] is not None:
                reference = row["reference"][index]
                mark = "" if distance(reference, values) <= SPREAD else "**"
                cell += f" ({mark}{reference:+.1f}{mark})"
            cells.append(cell)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def path_table(found: Mapping[str, Any]) -> str:
    """Return what each path of the gated models carries, means over seeds, as Markdown."""
    lines = _header(found, "", "")
    words = {"state": "all", "additive": "additive path alone", "hidden": "h alone"}
    for label, row in found["rows"].items():
        if "additive" not in row["log10_norm"]:
            continue
        for name in words:
            if name in row["log10_norm"]:
                columns = zip(*row["log10_norm"][name], strict=True)
                cells = " | ".join(f"{mean(values):+.2f}" for values in columns)
                lines.append(f"| {label if name == 'state' else ''} | {words[name]} | {cells} |")
    return "\n".join(lines)


def _header(found: Mapping[str, Any], *first: str) -> list[str]:
    names = [*first, *(f"k = {lag}" for lag in found["settings"]["lags"])]
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def conclusion(found: Mapping[str, Any]) -> str:
    """Say how many references lie within the spread of the seeds, and which do not."""
    lags = found["settings"]["lags"]
    distances = {
        f"{label} at k = {lag}": distance(reference, values)
        for label, row in found["rows"].items()
        if row["reference"] is not None
        for lag, reference, values in zip(
            lags, row["reference"], zip(*row["log10_ratio"], strict=True), strict=True
        )
    }
    if not distances:
        return "No reference holds for these settings."
    outside = [label for label, value in distances.items() if value > SPREAD]
    return (
        f"{len(distances) - len(outside)} of {len(distances)} references lie within {SPREAD} "
        f"standard deviations of the seeds"
        + (f", not {', '.join(outside)}; " if outside else "; ")
        + f"the farthest is {max(distances.values()):.1f} away."
    )


def write(found: dict[str, Any], folder: Path) -> None:
    """Write table, results, profiles and figures."""
    folder.mkdir(parents=True, exist_ok=True)
    profiles = found.pop("profiles")
    write_json(folder / "results.json", found)
    text = f"{table(found)}\n\n{conclusion(found)}\n\n{path_table(found)}\n"
    files.write_text(folder / "table.md", text)
    files.write_csv(
        folder / "profiles.csv",
        ("row", "quantity", "seed", "lag", "norm"),
        (
            (label, name, seed, lag, norm)
            for label, by_name in profiles.items()
            for name, of_seeds in by_name.items()
            for seed, profile in enumerate(of_seeds)
            for lag, norm in enumerate(reversed(profile))
        ),
    )
    families = {label: row.family for label, row in ROWS.items()}
    initialisation_figures.draw(found, profiles, families, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure with what the command line says, and write everything."""
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = f"where everything goes; by default {DEFAULT_FOLDER}, or the next number that is free"
    parser.add_argument("--folder", type=Path, help=words)
    for name, value in asdict(default).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    options = vars(parser.parse_args(arguments))
    folder = options.pop("folder")
    if min(options.values()) < 1 or options["steps"] < 2:
        parser.error("sizes and seeds must be at least 1, and steps at least 2")
    try:
        if folder is None:
            folder = run_folder.claim_next(DEFAULT_FOLDER)
        else:
            run_folder.claim(folder)
    except run_folder.FolderTakenError as error:
        parser.error(str(error))
    target = console.new_console()
    with use_threads(1):
        found = study(Settings(**options), lambda line: console.say(target, line))
    write(found, folder)
    run_folder.release(folder)
    console.say(target, "")
    console.say(target, conclusion(found))
    console.say(target, f"Table, profiles and figures: {folder}")


if __name__ == "__main__":
    main()
