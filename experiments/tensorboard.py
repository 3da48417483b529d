"""What runs log, for TensorBoard: as they go (``tensorboard=true``), or of any records afterwards.

    python -m experiments.run tensorboard=true
    python -m experiments.tensorboard runs/records
    tensorboard --logdir runs/records

Every number of ``metrics.jsonl`` becomes a scalar: loss, gradient_norm, test_error, and those of
probes as ``PROBE/NAME``. Lists, such as a probe's profile, are left to the report.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, Self

from experiments import extras
from experiments.fields import ConfigError
from experiments.record import METRICS, Rows, read_metrics

EVENTS = "tensorboard"
"""The folder of events, in that of a run."""


class EventWriter:
    """Writes rows of a run's log as events, in place of those that an earlier process wrote.

    It is called with the rows from the first on, as `experiments.record.MetricsLog` does: what a
    process that died had written after its last checkpoint is then there once, not twice.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / EVENTS
        self._writer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def __call__(self, rows: Rows) -> None:
        """Write rows; the first call begins anew."""
        if self._writer is None:
            self._writer = self._begin()
        for row in rows:
            for name, value in scalars(row).items():
                self._writer.add_scalar(name, value, row["step"])

    def _begin(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        for file in self._folder.glob("events.out.tfevents.*"):
            file.unlink()
        # A TensorBoard that has read the old files drops what it knows from this step on.
        return SummaryWriter(str(self._folder), purge_step=0)


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row by the names they have in TensorBoard."""
    prefix = f"{row['probe']}/" if "probe" in row else ""
    return {
        prefix + name: math.nan if value is None else value
        for name, value in row.items()
        if name not in ("step", "probe") and (value is None or isinstance(value, int | float))
    }


def convert(folder: Path) -> None:
    """Write the events of a run from its log."""
    with EventWriter(folder) as write:
        write(read_metrics(folder))


def main(folders: list[str]) -> None:
    """Convert every run at or below some folders."""
    if not folders or folders[0] in ("-h", "--help"):
        raise SystemExit("usage: python -m experiments.tensorboard FOLDER...")
    try:
        extras.require("tensorboard", "experiments.tensorboard")
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    logs = sorted({log for folder in folders for log in Path(folder).rglob(METRICS)})
    if not logs:
        raise SystemExit(f"error: no run is in {', '.join(folders)}")
    damaged = []
    for log in logs:
        try:
            convert(log.parent)
        except ValueError as error:
            damaged.append(f"error: {log}: {error}")
    print(f"{len(logs) - len(damaged)} runs; to look at them: tensorboard --logdir {folders[0]}")
    if damaged:
        raise SystemExit("\n".join(damaged))


if __name__ == "__main__":
    main(sys.argv[1:])
