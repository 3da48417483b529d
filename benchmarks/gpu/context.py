"""What every stage is given, and the two ways in which it can end early."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import write_text


class SkippedError(Exception):
    """The stage cannot run here; the message says why."""


class StageError(Exception):
    """The stage failed; the message is the line for the table."""


@dataclass(frozen=True)
class Context:
    """Where a stage works, how long, and on what."""

    work: Path
    seconds: float
    device: str = "cuda"
    """"cpu" is a rehearsal: everything that needs no GPU, on tiny problems."""

    commit: str | None = None
    """If the checkout has no history to ask."""

    @property
    def rehearsal(self) -> bool:
        """Whether there is no GPU in play."""
        return self.device == "cpu"

    def need_gpu(self, what: str) -> None:
        """Skip the stage in a rehearsal."""
        if self.rehearsal:
            raise SkippedError(f"{what} needs a GPU")

    def write(self, name: str, value: Any) -> None:
        """Leave JSON in the work folder."""
        write_text(self.work / name, json.dumps(value))

    def read(self, name: str) -> Any:
        """Return what an earlier stage left, or None."""
        path = self.work / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
