"""What is measured: suites of cases, and the ratios that are to be reached.

Shape legend: T time steps, B batch, I input size, H hidden size; a shape is ``(T, B, I, H)``.
A ratio is the baseline's time over another's, so above 1 is faster than the baseline.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

Shape = tuple[int, int, int, int]

BASELINE, OURS = "torch_rnn", "fused_rnn"

GATES = {"elman": 1, "gru": 3, "lstm": 4, "leaky": 1}
"""Of each cell: how many products with the state a unit takes."""

INPUT_GRADIENT_FROM = 64
"""Training steps ask for the gradient of the input from this input size on: below it the input is
data, above it most likely another layer's output."""


@dataclass(frozen=True)
class Case:
    """One problem that several contestants solve in turn.

    ``mode`` is "forward" (without gradients), "train" (forward pass and gradients of all
    parameters, of the input too where I >= 64) or "hvp" (product of the Hessian in all parameters
    with a vector).
    """

    suite: str
    T: int
    B: int
    I: int
    H: int
    mode: str
    cell: str = "elman"
    dtype: str = "float32"
    nonlinearity: str = "tanh"
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    packed: bool = False
    tf32: bool = False
    """Whether float32 products may round to TF32 on a GPU, on all sides alike."""
    input_scale: float = 1.0
    weight_scale: float = 1.0
    bias_scale: float = 1.0
    contestants: tuple[str, ...] = (BASELINE, OURS)
    """The first is the baseline, the second the one whose speed is in question."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Case:
        """Return the case with these fields; results of older versions have others too."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**{**known, "contestants": tuple(known["contestants"])})

    @property
    def baseline(self) -> str:
        """Return the contestant whose time is the unit."""
        return self.contestants[0]

    @property
    def ours(self) -> str:
        """Return the contestant whose speed is in question."""
        return self.contestants[1]

    @property
    def shape(self) -> Shape:
        """Return ``(T, B, I, H)``."""
        return self.T, self.B, self.I, self.H

    @property
    def directions(self) -> int:
        """Return 1 or 2."""
        return 2 if self.bidirectional else 1

    @property
    def wants_input_gradient(self) -> bool:
        """Whether the gradient of the input is part of the work."""
        asked = self.I >= INPUT_GRADIENT_FROM or self.suite == "accuracy"
        return self.mode == "train" and asked

    @property
    def is_plain(self) -> bool:
        """Whether this is one layer and direction over a dense (T, B, I) sequence."""
        return not (self.num_layers > 1 or self.bidirectional or self.batch_first or self.packed)

    @property
    def label(self) -> str:
        """Say in a few words what is special beside shape and mode."""
        words = [
            "packed" if self.packed else "",
            "two directions" if self.bidirectional else "",
            f"{self.num_layers} layers" if self.num_layers > 1 else "",
            self.cell if self.cell != "elman" else "",
            self.nonlinearity if self.nonlinearity != "tanh" else "",
            "tf32" if self.tf32 else self.dtype if self.dtype != "float32" else "",
            "batch_first" if self.batch_first else "",
            *(
                f"{part} x {scale:g}"
                for part in ("input", "weight", "bias")
                if (scale := getattr(self, f"{part}_scale")) != 1
            ),
        ]
        return ", ".join(filter(None, words))

    @property
    def name(self) -> str:
        """Everything that tells this case from others, in a line."""
        return f"{self.suite} {self.shape} {self.mode} {self.label}".strip()

    def operations(self, tokens: int) -> int:
        """Return floating-point operations of the products of a forward pass or training step.

        ``tokens`` is the number of (sample, step) pairs, T * B where nothing is packed.
        """
        total = 0
        for layer in range(self.num_layers):
            features = self.I if layer == 0 else self.directions * self.H
            rows = 2 * tokens * self.directions * self.H * GATES[self.cell]
            with_U, with_W = rows * self.H, rows * features
            total += with_U + with_W
            if self.mode == "train":
                total += 2 * with_U + with_W  # delta, against time; dU; dW
                total += with_W if layer > 0 or self.wants_input_gradient else 0  # dx
        return total


# ---- targets -------------------------------------------------------------------------------------

# What prototypes reached on two cores with AVX-512, at one and at two threads: of an Elman RNN
# (another machine, whose cores do twice as many multiply-adds), of a GRU, of an LSTM; forward and
# training of each.
_CPU_TARGETS: dict[Shape, str] = {
    (28, 128, 28, 128): "2.0 / 3.7 | 2.2 / 3.9 | 1.7 / 2.9 | 1.8 / 3.4 | 1.11 / 1.5 | 1.34 / 1.7",
    (784, 64, 1, 128): "2.9 / 6.1 | 3.2 / 5.9 | 2.7 / 3.7 | 3.0 / 4.8 | 1.34 / 1.5 | 2.5 / 3.0",
    (150, 32, 2, 128): "2.8 / 6.7 | 3.4 / 6.6 | 2.4 / 4.4 | 3.1 / 6.4 | 1.14 / 1.9 | 1.36 / 1.9",
    (1000, 20, 10, 128): "4.6 / 9.3 | 4.8 / 10.1 | 2.7 / 4.5 | 4.1 / 7.0 | 1.11 / 1.3 | 2.0 / 2.6",
    (256, 32, 256, 512): "1.6 / 2.2 | 1.6 / 2.1 | 1.4 / 1.8 | 1.5 / 1.8 | 1.07 / 1.1 | 1.23 / 1.3",
    (128, 64, 512, 1024): "1.5 / 1.4 | 1.5 / 1.3 | 1.5 / 1.7 | 1.4 / 1.6 | 1.07 / 1.1 | 1.11 / 1.1",
    (512, 1, 64, 256): "4.1 / 7.3 | 8.7 / 13.1 | 3.4 / 6.3 | 7.3 / 23 | 1.24 / 1.45 | 1.19 / 1.44",
    (100, 16, 2, 100): "4.3 / 10.5 | 6.0 / 11.6 | 2.9 / 4.8 | 4.4 / 7.5 | 1.22 / 3.3 | 1.34 / 2.6",
    (2048, 8, 64, 64): "7.9 / 16.3 | 13.8 / 24.8 | 4.8 / 9.9 | 10 / 23 | 1.15 / 2.0 | 2.1 / 4.1",
}
TABLE_SHAPES = tuple(_CPU_TARGETS)

# Against torch.nn.RNN on cuDNN, forward and training, called from Python.
GPU_TARGETS: dict[str, tuple[float, float]] = {
    "small": (1.5, 2.0),
    "middle": (4.0, 4.0),
    "fp16": (1.2, 1.2),
    "large": (2.0, 2.0),
    "gpu_packed": (10.0, 10.0),
    "stacked": (3.0, 3.0),
}


def target_of(case: Case, threads: int | None) -> float | None:
    """Return the ratio to be reached, or None where there is no target."""
    if case.suite in ("table", "gated") and case.shape in _CPU_TARGETS and threads in (1, 2):
        columns = _CPU_TARGETS[case.shape].split(" | ")
        column = 2 * ("elman", "gru", "lstm").index(case.cell) + (case.mode == "train")
        return float(columns[column].split(" / ")[threads - 1])
    targets = GPU_TARGETS.get(case.suite)
    return targets[case.mode == "train"] if targets else None


# ---- shapes from every corner -------------------------------------------------------------------

# T, B, I, H: corners, odd sizes and primes within T 1..4096, B 1..256, I 1..1024, H 1..2048; each
# of at most 1e11 operations and 2 GiB (a test holds it to that).
_CORNERS = """
    1 1 1 1; 1 1 1 2048; 1 1 1024 1; 1 1 128 128; 1 1 1024 2048; 1 256 1 1; 1 256 1024 1;
    1 256 1 2048; 1 256 1024 2048; 1 32 64 256; 2 1 1024 1024; 2 7 3 509; 2 64 256 512; 3 5 7 11;
    3 256 17 31; 5 2 2 2; 7 1 64 64; 8 128 512 1024; 10 33 100 127; 64 1 1 2048; 100 1 10 10;
    127 1 31 61; 256 1 256 1024; 333 1 37 197; 512 1 1 512; 512 1 1024 2048; 1000 1 1 1;
    1024 1 64 64; 2048 1 8 128; 4096 1 1 1; 4096 1 16 32; 4096 1 1024 1; 4096 1 1 256; 64 64 1 1;
    1000 3 2 1; 128 128 1024 1; 4096 16 1 1; 4096 256 1 1; 16 4 64 2048; 64 32 1 2048;
    32 256 128 2048; 17 3 1021 2047; 64 64 1024 64; 128 16 1024 512; 512 2 1023 100;
    4096 4 1024 16; 13 11 7 5; 101 3 5 17; 251 13 29 31; 499 7 3 97; 997 5 11 67; 61 59 53 251;
    31 127 257 509; 2003 2 3 43; 4093 3 5 23; 50 100 50 50; 128 128 128 128; 200 20 300 300;
    256 64 64 256; 300 9 500 500; 400 48 1 200; 512 8 32 768; 1000 64 2 64; 2048 32 1 32;
    4096 256 1 8; 4096 8 1 64; 1500 4 80 333
"""
GRID_SHAPES: list[Any] = [tuple(map(int, shape.split())) for shape in _CORNERS.split(";")]


def _random_shapes(count: int) -> list[Shape]:
    """Return shapes whose sizes are drawn evenly in their logarithm, the same in every run.

    T is at most 4096, B 256, I and H 1024, and an LSTM's training step of torch, which keeps about
    twenty sequences of states, takes at most 4 GB.
    """
    generator, shapes = random.Random(0), []
    while len(shapes) < count:
        T, B, I, H = (round(2 ** generator.uniform(0, most)) for most in (12, 8, 10, 10))
        if 4 * (T * B * (2 * I + 20 * H) + 12 * H * (I + H)) <= 4e9:
            shapes.append((T, B, I, H))
    return shapes


RANDOM_SHAPES = _random_shapes(100)

# ---- suites --------------------------------------------------------------------------------------

TITLES = {
    "table": "The nine shapes that targets are set for",
    "grid": "Shapes from every corner, none of them to be slower than torch.nn.RNN",
    "variants": "Packed, directions, layers, nonlinearities, dtypes, batch_first",
    "scaling": "Time per step against H",
    "overhead": "Single steps and tiny shapes: what a call costs",
    "cell": "Loops over cells, step by step",
    "gated": "GRU and LSTM against torch's, on the shapes that targets are set for",
    "gated_variants": "GRU and LSTM: packed, directions, layers, dtypes",
    "gated_cell": "GRU and LSTM: loops over cells, single steps and tiny shapes",
    "gated_grid": "GRU and LSTM: random shapes, none of them to be slower than torch's",
    "leaky": "Leaky units, beside plain ones of the same sizes",
    "hvp": "A Hessian-vector product through 1000 steps",
    "memory": "Peak memory of a training step against T",
    "accuracy": "Errors of values and gradients against float64",
    "small": "Fits one multiprocessor",
    "middle": "Beyond cuDNN's small persistent kernel, and odd sizes",
    "fp16": "The float16 sizes for which cuDNN has a persistent kernel",
    "large": "A matrix U that one multiprocessor cannot hold by far",
    "gpu_packed": "Packed, lengths uniform in 1..T",
    "stacked": "Two directions, two layers",
    "gpu_grid": "Anything at all",
    "flashrnn": "FlashRNN's own benchmark, its input product counted",
    "tf32": "Float32 rounded to TF32, both sides",
}


def _each(
    shapes: Iterable[Shape],
    *variants: dict[str, Any],
    modes: Iterable[str] = ("forward", "train"),
) -> list[Case]:
    """Return a case for every shape in every variant and mode."""
    return [
        Case("", *shape, mode, **variant)
        for variant in variants or [{}]
        for shape in shapes
        for mode in modes
    ]


# Everyone who computes an Elman RNN from start to end, and the gated cells that users compare with.
EVERYONE = (
    *(BASELINE, OURS, "torch_lstm", "torch_gru", "rnn_cell_loop", "compiled_loop"),
    *("jax", "onnxruntime"),
)
# The compiled loop takes more than a minute to compile for each point.
NOT_COMPILED = tuple(name for name in EVERYONE if name != "compiled_loop")

VARIANT_SHAPES: tuple[Shape, ...] = ((150, 32, 2, 128), (256, 32, 64, 128), (256, 32, 256, 512))
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    # The dense sequence beside it, to see whether a packed one costs what its tokens cost.
    {"packed": True, "contestants": (BASELINE, OURS, "fused_rnn_dense")},
    {"bidirectional": True},
    {"num_layers": 2},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True},
    {"nonlinearity": "relu"},
    *({"dtype": dtype} for dtype in ("bfloat16", "float16", "float64")),
)
GATED_VARIANTS: tuple[dict[str, Any], ...] = (
    *({"packed": True}, {"packed": True, "dtype": "float64"}, {"dtype": "float64"}),
    *({"num_layers": 2, "bidirectional": True}, {"batch_first": True}, {"dtype": "bfloat16"}),
)
# Shorter for wide states, whose steps take milliseconds.
SCALING_SHAPES: list[Shape] = [
    (256 if H < 1024 else 64, B, 64, H) for B in (1, 32) for H in (2**i for i in range(4, 12))
]
OVERHEAD_SHAPES: tuple[Shape, ...] = (
    *((1, 1, 1, 1), (1, 1, 10, 20), (1, 1, 64, 64), (1, 1, 128, 128)),
    *((2, 1, 8, 8), (4, 4, 8, 16), (10, 1, 4, 8)),
)
CELL_SHAPES: tuple[Shape, ...] = (
    *((20, 1, 1, 1), (20, 1, 10, 64), (20, 16, 32, 128), (20, 64, 64, 256), (20, 128, 28, 128)),
    *((20, 5, 3, 509), (20, 1, 256, 1024), (20, 1, 64, 2048)),
)
MEMORY_SHAPES: list[Shape] = [(T, 64, 10, 128) for T in (256, 512, 1024, 2048, 4096)]
ADVERSARIAL: tuple[dict[str, Any], ...] = (
    {"weight_scale": 20.0},
    # Without biases the states themselves are denormal.
    {"input_scale": 1e-40, "bias_scale": 0.0},
    {"input_scale": 1e-40},
    {"input_scale": 1e30},
    {"input_scale": 1e30, "nonlinearity": "relu"},
    {"input_scale": 0.0, "bias_scale": 0.0},
    {"weight_scale": 0.0, "bias_scale": 0.0},
)

GATED, GATED_CALLS, GATED_LOOPS = (
    [{"cell": c, "contestants": tuple(name.format(c) for name in names)} for c in ("gru", "lstm")]
    for names in (
        ("torch_{}", "fused_{}"),
        ("torch_{}", "fused_{}", "{}_operator"),
        ("{}_cell_loop", "fused_{}_cell_loop"),
    )
)

_CPU = {
    "table": _each(TABLE_SHAPES, {"contestants": EVERYONE}),
    "grid": _each(GRID_SHAPES),
    "variants": _each(VARIANT_SHAPES, *VARIANTS),
    "scaling": _each(SCALING_SHAPES, {"contestants": NOT_COMPILED}),
    "overhead": _each(OVERHEAD_SHAPES, {"contestants": (BASELINE, OURS, "elman_rnn", "operator")}),
    "cell": _each(CELL_SHAPES, {"contestants": ("rnn_cell_loop", "fused_rnn_cell_loop")}),
    "gated": _each(TABLE_SHAPES, *GATED),
    "gated_variants": _each(
        VARIANT_SHAPES,
        *(gated | variant for variant in GATED_VARIANTS for gated in GATED),
    ),
    "gated_cell": _each(CELL_SHAPES, *GATED_LOOPS) + _each(OVERHEAD_SHAPES, *GATED_CALLS),
    "gated_grid": _each(RANDOM_SHAPES, *GATED),
    "leaky": _each(TABLE_SHAPES, {"cell": "leaky", "contestants": (OURS, "leaky_rnn")}),
    "hvp": _each(
        [(1000, 20, 10, 128)], {"contestants": (BASELINE, OURS, "rnn_cell_loop")}, modes=["hvp"]
    ),
    "memory": _each(
        MEMORY_SHAPES, {"contestants": (BASELINE, OURS, "torch_lstm")}, modes=["train"]
    ),
    "accuracy": [
        *_each([*TABLE_SHAPES, (4096, 16, 8, 64)], modes=["train"]),
        *_each([(100, 16, 8, 64)], *ADVERSARIAL, modes=["train"]),
    ],
}

F32, BF16, F16 = ({"dtype": dtype} for dtype in ("float32", "bfloat16", "float16"))
STACKED, PACKED = {"num_layers": 2, "bidirectional": True}, {"packed": True}
ONE_SM: tuple[Shape, ...] = (
    *((1000, 20, 10, 128), (512, 64, 256, 256), (28, 128, 28, 128), (784, 64, 1, 128)),
    *((150, 32, 2, 128), (2048, 8, 64, 64), (512, 1, 64, 256)),
)
PERSISTENT: tuple[Shape, ...] = ((512, 32, 512, 512), (1024, 16, 768, 768), (512, 64, 1024, 1024))

_GPU = {
    "small": _each(ONE_SM, F32, BF16, F16),
    "middle": _each([*PERSISTENT, (333, 11, 37, 197), (500, 9, 300, 500)], F32, BF16),
    "fp16": _each(PERSISTENT, F16),
    "large": _each([(256, 32, 2048, 2048), (256, 64, 4096, 4096)], BF16),
    "gpu_packed": _each([(512, 64, 256, 256), (512, 32, 512, 512)], PACKED, {**PACKED, **BF16}),
    "stacked": _each([(256, 32, 256, 512)], STACKED, {**STACKED, **BF16}),
    # The dtypes take turns.
    "gpu_grid": [
        case
        for i, shape in enumerate(RANDOM_SHAPES[:40])
        for case in _each([shape], (F32, BF16, F32, F16)[i % 4])
    ],
    "flashrnn": _each(
        [(1024, 16, H, H) for H in (64, 128, 256, 512, 1024)],
        {**BF16, "contestants": (BASELINE, OURS, "flashrnn")},
    ),
    "tf32": _each([(512, 64, 256, 256), *PERSISTENT], {"tf32": True}),
}
SUITES = {"cpu": list(_CPU), "cuda": list(_GPU)}
"""By default, in the order of the tables."""


def cases_of(suites: Iterable[str], *, quick: bool = False) -> list[Case]:
    """Return the cases of some suites, with ``quick`` a tiny one of each kind in their place.

    Those of a GPU come in turn, the first of each suite before the second of any: a GPU may be lent
    for minutes, and there may not be time for all.
    """
    cases = [replace(case, suite=name) for name in suites for case in (_CPU | _GPU)[name]]
    if quick:
        tiny = [replace(c, T=min(c.T, 6), B=min(c.B, 3), H=min(c.H, 8)) for c in cases]
        kinds = {(case.suite, case.mode, case.label): case for case in tiny}
        return list(kinds.values())
    turn = {
        replace(case, suite=name): index
        for name in suites
        for index, case in enumerate(_GPU.get(name, []))
    }
    return sorted(cases, key=lambda case: turn.get(case, 0))
