"""What a contestant is: something that can be given a problem and then be timed on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod

from benchmarks.cases import Case
from benchmarks.problem import Problem
from benchmarks.timing import Work


class Contestant(ABC):
    """One way to run a recurrent layer."""

    name: str
    """In the command line and in result files."""

    title: str
    """In tables and figures."""

    cell: str = "elman"
    """What it computes. A case of another cell may have it too, as a model of the same sizes."""

    needs: tuple[str, ...] = ()
    """Packages that must be installed, the one whose version is shown first."""

    def computes(self, case: Case) -> bool:
        """Whether its numbers must be those of the case; if so, that is checked before timing."""
        return self.cell == case.cell

    def missing(self, device: str) -> str | None:
        """Return why it cannot run here, or None."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    def refuses(self, case: Case) -> str | None:
        """Return why it does not take this case, or None."""
        return None

    def version(self) -> str | None:
        """Return the version of the package behind it, if that is not torch."""
        try:
            return importlib.metadata.version(self.needs[0]) if self.needs else None
        except importlib.metadata.PackageNotFoundError:
            return "of unknown version"  # installed under another name, as onnxruntime-gpu is

    @abstractmethod
    def prepare(self, problem: Problem) -> Work:
        """Make ready to run the problem; compiling may wait for the first run."""


class PlainContestant(Contestant):
    """Takes one layer and direction over a dense float32 sequence on the CPU, and no more."""

    def missing(self, device: str) -> str | None:
        return super().missing(device) if device == "cpu" else "timed on the CPU only"

    def refuses(self, case: Case) -> str | None:
        if not (case.is_plain and case.dtype == "float32" and self.computes(case)):
            return "timed on one layer and direction over a dense float32 sequence only"
        return None
