"""What a peer is: something that can be given a problem and then be timed on it."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.problems import Problem


@dataclass(frozen=True)
class Prepared:
    """A problem in a peer's own words: weights copied, input laid out as it likes, compiled."""

    run: Callable[[], Any]
    """Does the work once and returns when it is done. This is what is timed."""

    as_tensors: Callable[[Any], list[Tensor]] = list
    """From what ``run`` returned to the list described in `benchmarks.problems`; not timed."""


class Peer(ABC):
    """One way to run a recurrent layer."""

    name: ClassVar[str]
    """In the command line and in result files."""

    title: ClassVar[str]
    """In tables and figures."""

    runtime: ClassVar[str] = "torch"
    """Whose threads it runs on; see `benchmarks.timing.Contestant`."""

    same_numbers: ClassVar[bool] = True
    """Whether it computes what torch.nn.RNN computes; if so, that is checked before timing."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Modules that must be importable."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def missing(self) -> str | None:
        """Return why it cannot run here, or None."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    def refuses(self, case: Case) -> str | None:
        """Return why it does not take this case, or None."""
        return None

    def version(self) -> str | None:
        """Return the version of the package behind it, if that is not torch."""
        return None

    @abstractmethod
    def prepare(self, problem: Problem) -> Prepared:
        """Make ready to run the problem; compiling may wait for the first run."""


def plain_float32_only(case: Case) -> str | None:
    """Refuse what only the torch modules are prepared for."""
    if not case.is_plain or case.dtype != "float32":
        return "timed on one layer and direction over a dense float32 sequence only"
    if case.nonlinearity not in ("tanh", "relu"):
        return "timed with tanh and relu only"
    return None
