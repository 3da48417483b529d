"""What is timed on a GPU, the most important first, and the ratios that are to be reached.

Shape legend: T time steps, B batch, I input size, H hidden size; a shape is ``(T, B, I, H)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.cases import BASELINE, Case, Shape

OURS, FLASHRNN = "fused_rnn", "flashrnn"

LAUNCHES = ("eager", "graphed")
"""Called from Python each time, or captured in a CUDA graph once and replayed."""

MODES = ("forward", "train")

REGIMES = {
    "small": "fits one multiprocessor",
    "middle": "beyond cuDNN's small persistent kernel, and odd sizes",
    "fp16": "the float16 sizes for which cuDNN has a persistent kernel",
    "large": "a matrix U that one multiprocessor cannot hold by far",
    "packed": "lengths uniform in 1..T",
    "stacked": "two directions, two layers",
    "flashrnn": "FlashRNN's own benchmark",
    "tf32": "float32 rounded to TF32, both sides",
    "grid": "anything at all",
}

TARGETS: dict[str, dict[str, float]] = {
    "small": {"forward": 1.5, "train": 2.0},
    "middle": {"forward": 4.0, "train": 4.0},
    "fp16": {"forward": 1.2, "train": 1.2},
    "large": {"forward": 2.0, "train": 2.0},
    "packed": {"forward": 10.0, "train": 10.0},
    "stacked": {"forward": 3.0, "train": 3.0},
}
"""Ratios to torch.nn.RNN on cuDNN, eager. No target: only the gates below hold."""

FLASHRNN_TARGET = 2.0
"""Ratio to FlashRNN's Elman, whose input product is counted."""

FLOOR_TARGET = 2.0
"""Times the floor of `benchmarks.gpu.floor`, at most."""

NEVER_BELOW = 1.0
"""Ratio to torch.nn.RNN of every case whatsoever."""

GRID_MEAN = 3.0
"""Geometric mean of the grid's ratios."""


@dataclass(frozen=True)
class GpuCase:
    """A problem, as the benchmark on the CPU has them, and what only a GPU knows.

    The case's suite names its regime.
    """

    case: Case
    tf32: bool = False
    """Whether torch lets float32 products round to TF32, on both sides alike."""

    @property
    def regime(self) -> str:
        """One of `REGIMES`."""
        return self.case.suite

    @property
    def target(self) -> float | None:
        """The ratio to torch.nn.RNN to be reached; None: there is none beyond the gates."""
        return TARGETS.get(self.regime, {}).get(self.case.mode)

    @property
    def dtype_label(self) -> str:
        """The dtype for people, such as ``bf16`` or ``tf32``."""
        if self.tf32:
            return "tf32"
        return self.case.dtype.replace("bfloat", "bf").replace("float", "fp")

    @property
    def label(self) -> str:
        """Everything that tells this case from others, in a line."""
        shape = ", ".join(map(str, self.case.shape))
        return f"{self.regime} ({shape}) {self.dtype_label} {self.case.mode}"

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> GpuCase:
        """Return the case that :meth:`as_json` describes."""
        return cls(Case.from_json(fields["case"]), fields["tf32"])


# ---- shapes --------------------------------------------------------------------------------------

SMALL: tuple[Shape, ...] = (
    *((28, 128, 28, 128), (784, 64, 1, 128), (150, 32, 2, 128), (1000, 20, 10, 128)),
    *((2048, 8, 64, 64), (512, 1, 64, 256), (512, 64, 256, 256)),
)
PERSISTENT: tuple[Shape, ...] = ((512, 32, 512, 512), (1024, 16, 768, 768), (512, 64, 1024, 1024))
MIDDLE: tuple[Shape, ...] = (*PERSISTENT, (333, 11, 37, 197), (500, 9, 300, 500))
LARGE: tuple[Shape, ...] = ((256, 32, 2048, 2048), (256, 64, 4096, 4096))
PACKED: tuple[Shape, ...] = ((512, 64, 256, 256), (512, 32, 512, 512))
STACKED: tuple[Shape, ...] = ((256, 32, 256, 512),)
FLASH: tuple[Shape, ...] = tuple((1024, 16, H, H) for H in (64, 128, 256, 512, 1024))

# Corners, odd sizes and primes; the dtypes take turns.
GRID: tuple[Shape, ...] = (
    # one and two steps, where only the launch counts
    *((1, 1, 1, 1), (1, 1, 128, 128), (1, 64, 256, 512), (1, 256, 1024, 1024), (2, 7, 3, 509)),
    # few steps
    *((5, 2, 2, 2), (8, 128, 512, 1024), (10, 33, 100, 127), (16, 256, 64, 256), (20, 1, 1, 2048)),
    # one sample
    *((100, 1, 10, 10), (333, 1, 37, 197), (512, 1, 512, 512), (1000, 1, 1, 1), (4096, 1, 16, 32)),
    *((512, 1, 1024, 2048), (256, 1, 1, 4096)),
    # many samples
    *((64, 512, 64, 64), (100, 1024, 28, 128), (128, 256, 300, 300), (50, 300, 50, 50)),
    *((32, 2048, 16, 32), (64, 256, 1024, 1024)),
    # one unit, one feature
    *((1000, 3, 2, 1), (4096, 16, 1, 1), (512, 64, 1, 512)),
    # primes
    *((13, 11, 7, 5), (251, 13, 29, 31), (499, 7, 3, 97), (61, 59, 53, 251), (31, 127, 257, 509)),
    *((2003, 2, 3, 43), (101, 17, 1021, 1031)),
    # the middle, and long
    *((200, 20, 300, 300), (400, 48, 1, 200), (300, 9, 640, 640), (1500, 4, 80, 333)),
    *((2048, 32, 1, 32), (4096, 8, 1, 64), (128, 16, 1536, 1536)),
)
GRID_DTYPES = ("float32", "bfloat16", "float32", "float16")


# ---- cases ---------------------------------------------------------------------------------------


def all_cases() -> list[GpuCase]:
    """Return every case; one that comes early matters more than one that comes late."""
    cases = [*_first_look(), *_targets(), *_grid(), *_flashrnn(), *_tf32()]
    return list(dict.fromkeys(cases))


def rehearsal_cases() -> list[GpuCase]:
    """Return a few tiny cases, one of each regime: they show that everything runs, not how fast."""
    cases: dict[str, GpuCase] = {}
    for case in all_cases():
        if case.case.mode == "train":
            sizes = {"T": min(case.case.T, 6), "B": min(case.case.B, 3), "I": min(case.case.I, 5)}
            tiny = replace(case.case, **sizes, H=min(case.case.H, 8))
            cases.setdefault(case.regime, replace(case, case=tiny))
    return list(cases.values())


def _both(regime: str, shape: Shape, dtype: str, **options: Any) -> Iterator[GpuCase]:
    contestants = (BASELINE, OURS, FLASHRNN) if regime == "flashrnn" else (BASELINE, OURS)
    for mode in reversed(MODES):  # training steps first: if there is time for one of the two
        yield GpuCase(
            Case(regime, *shape, mode, dtype=dtype, contestants=contestants, **options),
            tf32=regime == "tf32",
        )


def _first_look() -> Iterator[GpuCase]:
    """One or two cases of each regime, so that a run that is cut short has seen them all."""
    yield from _both("small", (1000, 20, 10, 128), "float32")
    yield from _both("middle", (512, 32, 512, 512), "bfloat16")
    yield from _both("small", (512, 64, 256, 256), "bfloat16")
    yield from _both("middle", (512, 32, 512, 512), "float32")
    yield from _both("fp16", (512, 32, 512, 512), "float16")
    yield from _both("large", (256, 32, 2048, 2048), "bfloat16")
    yield from _packed((512, 64, 256, 256), "float32")
    yield from _stacked("float32")


def _targets() -> Iterator[GpuCase]:
    for dtype in ("float32", "bfloat16"):
        for shape in SMALL:
            yield from _both("small", shape, dtype)
        for shape in MIDDLE:
            yield from _both("middle", shape, dtype)
    for shape in PERSISTENT:
        yield from _both("fp16", shape, "float16")
    for shape in LARGE:
        yield from _both("large", shape, "bfloat16")
    for dtype in ("float32", "bfloat16"):
        for shape in PACKED:
            yield from _packed(shape, dtype)
        yield from _stacked(dtype)
    for shape in SMALL:
        yield from _both("small", shape, "float16")


def _packed(shape: Shape, dtype: str) -> Iterator[GpuCase]:
    return _both("packed", shape, dtype, packed=True)


def _stacked(dtype: str) -> Iterator[GpuCase]:
    for shape in STACKED:
        yield from _both("stacked", shape, dtype, num_layers=2, bidirectional=True)


def _grid() -> Iterator[GpuCase]:
    for index, shape in enumerate(GRID):
        yield from _both("grid", shape, GRID_DTYPES[index % len(GRID_DTYPES)])


def _flashrnn() -> Iterator[GpuCase]:
    for shape in FLASH:
        yield from _both("flashrnn", shape, "bfloat16")


def _tf32() -> Iterator[GpuCase]:
    for shape in ((512, 64, 256, 256), *PERSISTENT):
        yield from _both("tf32", shape, "float32")
