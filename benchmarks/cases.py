"""What is measured: the problems of each suite, and the targets set for the main table.

Shape legend: T time steps, B batch, I input size, H hidden size; a shape is ``(T, B, I, H)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

Shape = tuple[int, int, int, int]

BASELINE = "torch_rnn"
"""The unit: a ratio is this contestant's time over another's."""

INPUT_GRADIENT_FROM = 64
"""Training steps ask for the gradient of the input from this input size on: below it the input is
data, above it most likely another layer's output."""

MODES = {
    "forward": "forward pass without gradients",
    "train": "forward pass and gradients of all parameters (of the input too where I >= 64)",
    "hvp": "product of the Hessian in all parameters with a vector",
}


@dataclass(frozen=True)
class Case:
    """One problem that several contestants solve in turn."""

    suite: str
    T: int
    B: int
    I: int
    H: int
    mode: str
    dtype: str = "float32"
    nonlinearity: str = "tanh"
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    packed: bool = False
    contestants: tuple[str, ...] = (BASELINE, "fused_rnn")
    baseline: str = BASELINE
    with_floor: bool = False

    @property
    def shape(self) -> Shape:
        """Return ``(T, B, I, H)``."""
        return self.T, self.B, self.I, self.H

    @property
    def wants_input_gradient(self) -> bool:
        """Whether the gradient of the input is part of the work."""
        return self.mode == "train" and self.I >= INPUT_GRADIENT_FROM

    @property
    def is_plain(self) -> bool:
        """Whether this is one layer and direction over a dense (T, B, I) sequence."""
        return not (self.num_layers > 1 or self.bidirectional or self.batch_first or self.packed)

    @property
    def operations(self) -> int:
        """Floating-point operations of the forward pass of the first layer: 2TBH(I + H)."""
        return 2 * self.T * self.B * self.H * (self.I + self.H)

    @property
    def label(self) -> str:
        """Say in a few words what is special beside the shape."""
        words = [
            "packed" if self.packed else "",
            "two directions" if self.bidirectional else "",
            f"{self.num_layers} layers" if self.num_layers > 1 else "",
            self.nonlinearity if self.nonlinearity != "tanh" else "",
            self.dtype if self.dtype != "float32" else "",
            "batch_first" if self.batch_first else "",
        ]
        return ", ".join(filter(None, words)) or "plain"

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Case:
        """Return the case that :meth:`as_json` describes."""
        return cls(**{**fields, "contestants": tuple(fields["contestants"])})


# ---- shapes --------------------------------------------------------------------------------------

# Ratios to reach, at one and at two threads, on two cores with AVX-512: what a prototype reached.
TARGETS: dict[Shape, dict[str, tuple[float, float]]] = {
    (28, 128, 28, 128): {"forward": (2.0, 3.7), "train": (2.2, 3.9)},
    (784, 64, 1, 128): {"forward": (2.9, 6.1), "train": (3.2, 5.9)},
    (150, 32, 2, 128): {"forward": (2.8, 6.7), "train": (3.4, 6.6)},
    (1000, 20, 10, 128): {"forward": (4.6, 9.3), "train": (4.8, 10.1)},
    (256, 32, 256, 512): {"forward": (1.6, 2.2), "train": (1.6, 2.1)},
    (128, 64, 512, 1024): {"forward": (1.5, 1.4), "train": (1.5, 1.3)},
    (512, 1, 64, 256): {"forward": (4.1, 7.3), "train": (8.7, 13.1)},
    (100, 16, 2, 100): {"forward": (4.3, 10.5), "train": (6.0, 11.6)},
    (2048, 8, 64, 64): {"forward": (7.9, 16.3), "train": (13.8, 24.8)},
}
TABLE_SHAPES = tuple(TARGETS)

# Corners, odd sizes and primes within T 1..4096, B 1..256, I 1..1024, H 1..2048; each of at most
# 1e11 operations and 2 GiB (a test holds it to that).
GRID_SHAPES: tuple[Shape, ...] = (
    # one, two and three steps
    *((1, 1, 1, 1), (1, 1, 1, 2048), (1, 1, 1024, 1), (1, 1, 128, 128), (1, 1, 1024, 2048)),
    *((1, 256, 1, 1), (1, 256, 1024, 1), (1, 256, 1, 2048), (1, 256, 1024, 2048), (1, 32, 64, 256)),
    *((2, 1, 1024, 1024), (2, 7, 3, 509), (2, 64, 256, 512), (3, 5, 7, 11), (3, 256, 17, 31)),
    # few steps
    *((5, 2, 2, 2), (7, 1, 64, 64), (8, 128, 512, 1024), (10, 33, 100, 127)),
    # one sample
    *((64, 1, 1, 2048), (100, 1, 10, 10), (127, 1, 31, 61), (256, 1, 256, 1024), (333, 1, 37, 197)),
    *((512, 1, 1, 512), (512, 1, 1024, 2048), (1000, 1, 1, 1), (1024, 1, 64, 64)),
    *((2048, 1, 8, 128), (4096, 1, 1, 1), (4096, 1, 16, 32), (4096, 1, 1024, 1), (4096, 1, 1, 256)),
    # one unit
    *((64, 64, 1, 1), (1000, 3, 2, 1), (128, 128, 1024, 1), (4096, 16, 1, 1), (4096, 256, 1, 1)),
    # the widest states
    *((16, 4, 64, 2048), (64, 32, 1, 2048), (32, 256, 128, 2048), (17, 3, 1021, 2047)),
    # the widest inputs
    *((64, 64, 1024, 64), (128, 16, 1024, 512), (512, 2, 1023, 100), (4096, 4, 1024, 16)),
    # primes
    *((13, 11, 7, 5), (101, 3, 5, 17), (251, 13, 29, 31), (499, 7, 3, 97), (997, 5, 11, 67)),
    *((61, 59, 53, 251), (31, 127, 257, 509), (2003, 2, 3, 43), (4093, 3, 5, 23)),
    # the middle
    *((50, 100, 50, 50), (128, 128, 128, 128), (200, 20, 300, 300), (256, 64, 64, 256)),
    *((300, 9, 500, 500), (400, 48, 1, 200), (512, 8, 32, 768), (1000, 64, 2, 64)),
    *((2048, 32, 1, 32), (4096, 256, 1, 8), (4096, 8, 1, 64), (1500, 4, 80, 333)),
)

VARIANT_SHAPES: tuple[Shape, ...] = ((150, 32, 2, 128), (256, 32, 64, 128), (256, 32, 256, 512))

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    # The dense sequence beside it, to see whether a packed one costs what its tokens cost.
    {"packed": True, "contestants": (BASELINE, "fused_rnn", "fused_rnn_dense")},
    {"bidirectional": True},
    {"num_layers": 2},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True},
    {"nonlinearity": "relu"},
    # torch.nn.RNN has no such nonlinearity: the unit is this module's own tanh.
    *(
        {"nonlinearity": f, "contestants": ("fused_rnn_tanh", "fused_rnn")}
        | {"baseline": "fused_rnn_tanh"}
        for f in ("sigmoid", "identity")
    ),
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"dtype": "float64"},
)

OVERHEAD_SHAPES: tuple[Shape, ...] = (
    *((1, 1, 1, 1), (1, 1, 10, 20), (1, 1, 64, 64), (1, 1, 128, 128)),
    *((2, 1, 8, 8), (4, 4, 8, 16), (10, 1, 4, 8)),
)

CELL_SHAPES: tuple[Shape, ...] = (
    *((20, 1, 1, 1), (20, 1, 10, 64), (20, 16, 32, 128), (20, 64, 64, 256), (20, 128, 28, 128)),
    *((20, 5, 3, 509), (20, 1, 256, 1024), (20, 1, 64, 2048)),
)

SCALING_HIDDEN = (16, 32, 64, 128, 256, 512, 1024, 2048)
SCALING_BATCHES = (1, 32)
SCALING_I = 64


def scaling_length(hidden_size: int) -> int:
    """Return T for the time per step: shorter for wide states, whose steps take milliseconds."""
    return 256 if hidden_size < 1024 else 64


HVP_SHAPE: Shape = (1000, 20, 10, 128)

# ---- suites --------------------------------------------------------------------------------------

# Everyone who computes an Elman RNN from start to end, and the gated cells that users compare with.
EVERYONE = (
    *(BASELINE, "fused_rnn", "torch_lstm", "torch_gru", "rnn_cell_loop", "compiled_loop"),
    *("jax", "onnxruntime", "keras", "flashrnn"),
)

# Without the compiled loop, which takes more than a minute to compile for each point.
SCALING_CONTESTANTS = tuple(name for name in EVERYONE if name != "compiled_loop")

SUITES = {
    "table": "the nine shapes that targets are set for",
    "grid": "shapes from every corner: is any slower than torch.nn.RNN?",
    "variants": "packed, directions, layers, nonlinearities, dtypes, batch_first",
    "scaling": "time per step against H",
    "overhead": "single steps and tiny shapes",
    "cell": "loops over cells",
    "hvp": "a Hessian-vector product through 1000 steps, time and memory",
    "accuracy": "errors of values and gradients against float64",
    "memory": "peak memory of a training step against T",
}

TIMED_SUITES = ("table", "grid", "variants", "scaling", "overhead", "cell", "hvp")

_BOTH = ("forward", "train")


def timed_cases(suite: str, *, quick: bool = False) -> list[Case]:
    """Return the cases of one of `TIMED_SUITES`; with ``quick`` a few tiny ones in their place."""
    cases = list(_CASES[suite]())
    if not quick:
        return cases
    small = [replace(case, T=min(case.T, 6), B=min(case.B, 3), H=min(case.H, 8)) for case in cases]
    # One of each kind; two sizes where there is but one kind, for a table has rows to compare.
    sizes = 1 if suite == "variants" else 2
    kinds: dict[Any, list[Case]] = {}
    for case in small:
        several = kinds.setdefault((case.mode, case.label), [])
        if case not in several and len(several) < sizes:
            several.append(case)
    return [case for several in kinds.values() for case in several]


def _table() -> Iterable[Case]:
    for shape in TABLE_SHAPES:
        for mode in _BOTH:
            yield Case("table", *shape, mode, contestants=EVERYONE, with_floor=True)


def _grid() -> Iterable[Case]:
    return (Case("grid", *shape, mode) for shape in GRID_SHAPES for mode in _BOTH)


def _variants() -> Iterable[Case]:
    for options in VARIANTS:
        for shape in VARIANT_SHAPES:
            for mode in _BOTH:
                yield Case("variants", *shape, mode, **options)


def _scaling() -> Iterable[Case]:
    for B in SCALING_BATCHES:
        for H in SCALING_HIDDEN:
            for mode in _BOTH:
                shape = (scaling_length(H), B, SCALING_I, H)
                yield Case(
                    "scaling", *shape, mode, contestants=SCALING_CONTESTANTS, with_floor=True
                )


def _overhead() -> Iterable[Case]:
    contestants = (BASELINE, "fused_rnn", "elman_rnn", "operator")
    for shape in OVERHEAD_SHAPES:
        for mode in _BOTH:
            yield Case("overhead", *shape, mode, contestants=contestants)


def _cell() -> Iterable[Case]:
    contestants = ("rnn_cell_loop", "fused_rnn_cell_loop")
    for shape in CELL_SHAPES:
        for mode in _BOTH:
            yield Case("cell", *shape, mode, contestants=contestants, baseline=contestants[0])


def _hvp() -> Iterable[Case]:
    yield Case("hvp", *HVP_SHAPE, "hvp", contestants=(BASELINE, "fused_rnn", "rnn_cell_loop"))


_CASES = {
    "table": _table,
    "grid": _grid,
    "variants": _variants,
    "scaling": _scaling,
    "overhead": _overhead,
    "cell": _cell,
    "hvp": _hvp,
}
