"""A recurrent core with a linear readout, and the initialisations a study compares.

Cores come from ``rnn_cuda`` and ``torch.nn`` alone, one layer, one direction, time-major. Under the
same seed ``fused_rnn`` and ``rnn`` start from the same weights.

Shape legend: T time steps, B batch, I inputs, H hidden size, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

import rnn_cuda
from experiments.tasks import Task

CORES: dict[str, type[nn.Module]] = {
    "fused_rnn": rnn_cuda.FusedRNN,
    "rnn": nn.RNN,
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}
ELMAN_CORES = ("fused_rnn", "rnn")


class SequenceModel(nn.Module):
    """A recurrent core and a linear readout of its hidden state.

    Args:
        core: a one-layer, one-direction, time-major recurrent module.
        output_size: O.
        reads: ``"last"`` predicts from the last hidden state, ``"every"`` and ``"masked"`` at each
            time step (a mask is in the targets).
    """

    def __init__(
        self, core: nn.Module, output_size: int, reads: Literal["last", "every", "masked"]
    ) -> None:
        super().__init__()
        self.core = core
        self.readout = nn.Linear(core.hidden_size, output_size)
        self.reads = reads

    def forward(self, x_TBI: Tensor) -> Tensor:
        """Map input ``[T, B, I]`` to a prediction ``[B, O]`` (last) or ``[T, B, O]`` (else)."""
        output_TBH, state = self.core(x_TBI)
        if self.reads != "last":
            return self.readout(output_TBH)
        h_n = state[0] if isinstance(state, tuple) else state  # an LSTM's state is (h, c)
        return self.readout(h_n[-1])

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters, readout included."""
        return sum(p.numel() for p in self.parameters())


def build_model(
    config: Mapping[str, Any],
    task: Task,
    horizon: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> SequenceModel:
    """Build the model that ``config`` (the ``model`` group) describes, initialised from ``seed``.

    Args:
        config: validated keys of ``hydra_conf/model``.
        task: gives the input and output sizes and where the prediction is read.
        horizon: the dependency length that chrono initialisation is scaled to.
        seed: fixes every weight; torch's global generator is left as it was.
        device: where the model lives; weights are drawn on the CPU, so they do not depend on it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        core = _new_core(config, task, matched_hidden_size(config, task))
        model = SequenceModel(core, task.output_size, task.reads)
        # After every default draw: models that differ in one scheme share the other weights.
        with torch.no_grad():
            if config["core"] in ELMAN_CORES:
                _initialise_elman(core, config)
            elif config["gate_bias"] is not None:
                _initialise_gate_bias(core, config["gate_bias"], horizon)
    return model.to(device)


def _new_core(
    config: Mapping[str, Any], task: Task, hidden_size: int, device: str = "cpu"
) -> nn.Module:
    options: dict[str, Any] = {"device": device}
    if config["core"] in ELMAN_CORES:
        options["nonlinearity"] = config["nonlinearity"]
    return CORES[config["core"]](task.input_size, hidden_size, **options)


def matched_hidden_size(config: Mapping[str, Any], task: Task) -> int:
    """Return the hidden size to build.

    That is ``hidden_size``, or with ``match_parameters`` the one whose parameter count (readout
    included) comes closest to that of ``torch.nn.RNN`` at ``hidden_size``.
    """
    hidden_size = config["hidden_size"]
    if not config["match_parameters"]:
        return hidden_size

    def count(core: nn.Module) -> int:
        readout = (core.hidden_size + 1) * task.output_size
        return sum(p.numel() for p in core.parameters()) + readout

    target = count(nn.RNN(task.input_size, hidden_size, device="meta"))
    # No core has fewer parameters than an RNN of its size, so the answer is not above that.
    return min(
        range(1, hidden_size + 1),
        key=lambda size: abs(count(_new_core(config, task, size, device="meta")) - target),
    )


def _initialise_elman(core: nn.Module, config: Mapping[str, Any]) -> None:
    """Apply ``recurrent_init``, ``input_std`` and ``zero_bias`` to an Elman core, in place.

    Identity U with zero bias and small Gaussian input weights is the IRNN of Le, Jaitly & Hinton
    (2015).
    """
    if config["recurrent_init"] == "orthogonal":
        rnn_cuda.init.orthogonal_(core)
    elif config["recurrent_init"] == "identity":
        rnn_cuda.init.identity_(core)
    if config["input_std"] is not None:
        nn.init.normal_(core.weight_ih_l0, std=config["input_std"])
    if config["zero_bias"]:
        nn.init.zeros_(core.bias_ih_l0)
        nn.init.zeros_(core.bias_hh_l0)


def _initialise_gate_bias(core: nn.Module, gate_bias: float | str, horizon: int) -> None:
    """Set the bias of the gate that keeps the state, in place: a number, or ``"chrono"``."""
    if gate_bias == "chrono":
        # Below 3 steps there is nothing to spread.
        rnn_cuda.init.chrono_(core, max(3, horizon))
    else:
        rnn_cuda.init.forget_bias_(core, gate_bias)
