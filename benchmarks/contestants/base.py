"""What a contestant is: something that can be given a problem and then be timed on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from typing import ClassVar

from benchmarks.cases import Case
from benchmarks.problem import Problem
from benchmarks.timing import Work


class Contestant(ABC):
    """One way to run a recurrent layer."""

    name: ClassVar[str]
    """In the command line and in result files."""

    title: ClassVar[str]
    """In tables and figures."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Packages that must be installed, the one whose version is shown first."""

    same_numbers: ClassVar[bool] = True
    """Whether it computes what torch.nn.RNN computes; if so, that is checked before timing."""

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
        if not case.is_plain or case.dtype != "float32":
            return "timed on one layer and direction over a dense float32 sequence only"
        if case.nonlinearity not in ("tanh", "relu"):
            return "timed with tanh and relu only"
        return None
