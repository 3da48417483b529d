"""FlashRNN: kernels for GPUs only, so here it is named and never timed."""

from __future__ import annotations

from benchmarks.peers.base import Peer, Prepared
from benchmarks.problems import Problem


class FlashRNNPeer(Peer):
    """The ``flashrnn`` package."""

    name = "flashrnn"
    title = "FlashRNN"
    needs = ("flashrnn",)

    def missing(self) -> str | None:
        """Return why it cannot run here: there is always a reason."""
        return "runs on CUDA devices only, and this benchmark is of the CPU"

    def prepare(self, problem: Problem) -> Prepared:
        """Raise."""
        raise NotImplementedError(self.missing())
