"""Everyone who can be timed, by name."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.peers.base import Peer, Prepared
from benchmarks.peers.flashrnn_peer import FlashRNNPeer
from benchmarks.peers.jax_peer import JaxPeer
from benchmarks.peers.keras_peer import KerasPeer
from benchmarks.peers.onnxruntime_peer import OnnxRuntimePeer
from benchmarks.peers.ours import (
    ElmanOperator,
    ElmanRNNFunction,
    FusedRNNDense,
    FusedRNNPeer,
    FusedRNNTanh,
)
from benchmarks.peers.torch_loops import CompiledLoop, FusedRNNCellLoop, RNNCellLoop
from benchmarks.peers.torch_modules import TorchGRU, TorchLSTM, TorchRNN

PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        *(TorchRNN, FusedRNNPeer, FusedRNNDense, FusedRNNTanh, ElmanRNNFunction, ElmanOperator),
        *(TorchLSTM, TorchGRU, RNNCellLoop, CompiledLoop, FusedRNNCellLoop),
        *(JaxPeer, OnnxRuntimePeer, KerasPeer, FlashRNNPeer),
    )
}

__all__ = ["PEERS", "Peer", "Prepared", "make_peers"]


def make_peers(names: Iterable[str], threads: int) -> dict[str, Peer]:
    """Return the named peers, each held to this number of threads."""
    return {name: PEERS[name](threads) for name in names}
