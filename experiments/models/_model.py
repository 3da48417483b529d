"""A recurrent core under a linear readout, and what every kind of core has to say about itself.

Shape legend: T time steps, B batch, I inputs, H hidden size, D directions, O outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from experiments.fields import Config, flag, integer
from rnn_cuda import AntisymmetricRNN, FusedGRU, FusedLSTM, FusedRNN, LeakyRNN
from rnn_cuda.cells import cell_of

PLAIN = (FusedRNN, nn.RNN)
"""Elman layers, ``h_t = f(W x_t + U h_{t-1} + b)``."""
RESIDUAL = (LeakyRNN, AntisymmetricRNN)
"""Elman layers whose state has a path of its own from step to step."""
GATED = (FusedLSTM, nn.LSTM, FusedGRU, nn.GRU)
RECURRENT = (*PLAIN, *RESIDUAL, *GATED)
"""All that the library knows the recurrence of; a core can be something else."""
TORCHS = {"fused_rnn": "rnn", "fused_lstm": "lstm", "fused_gru": "gru"}
"""Of each core on the fused kernel, that of torch which is the same model from the same seed."""


@dataclass(frozen=True)
class CoreConfig(Config):
    """Options that all cores have.

    Attributes:
        hidden_size: H.
        match_parameters: build the H whose number of parameters, readout included, comes closest to
            that of a ``torch.nn.RNN`` of ``hidden_size``, with as many layers and directions.
        num_layers: layers on top of one another.
        bidirectional: whether a second direction runs from the last step to the first.
    """

    hidden_size: int = integer(64, at_least=1)
    match_parameters: bool = flag(False)
    num_layers: int = integer(1, at_least=1)
    bidirectional: bool = flag(False)


class Core(ABC):
    """A kind of recurrent layer; a subclass is one file and one choice of ``model.core``.

    Attributes:
        name: the file's name.
        Config: its options, a frozen dataclass; ``hydra_conf/model/*.yaml`` show them.
    """

    name: str
    Config: ClassVar[type[CoreConfig]] = CoreConfig

    def __init__(self, config: Any) -> None:
        self.config = config
        self._matched_sizes: dict[tuple[int, int], int] = {}

    @abstractmethod
    def layer(self, input_size: int, hidden_size: int, **options: Any) -> nn.Module:
        """Build the layer, time-major; ``options`` are layers, directions and device."""

    def build(self, input_size: int, hidden_size: int, device: str = "cpu") -> nn.Module:
        """Build the layer as configured, with another hidden size."""
        return self.layer(
            input_size,
            hidden_size,
            num_layers=self.config.num_layers,
            bidirectional=self.config.bidirectional,
            device=device,
        )

    def hidden_size(self, input_size: int, output_size: int) -> int:
        """Return the hidden size to build: as configured, or that of equal parameter count."""
        config, sizes = self.config, (input_size, output_size)
        if not config.match_parameters:
            return config.hidden_size
        # Kept, since a run is checked, built and measured with it.
        if sizes not in self._matched_sizes:
            self._matched_sizes[sizes] = self._matched_size(*sizes)
        return self._matched_sizes[sizes]

    def _matched_size(self, input_size: int, output_size: int) -> int:
        config = self.config

        def count(core: nn.Module) -> int:
            width = core.hidden_size * (2 if config.bidirectional else 1)
            return sum(p.numel() for p in core.parameters()) + (width + 1) * output_size

        plain = nn.RNN(
            input_size,
            config.hidden_size,
            config.num_layers,
            bidirectional=config.bidirectional,
            device="meta",
        )
        target = count(plain)
        # No core has fewer parameters than an RNN of its size, so the answer is not above that.
        return min(
            range(1, config.hidden_size + 1),
            key=lambda size: abs(count(self.build(input_size, size, device="meta")) - target),
        )


class SequenceModel(nn.Module):
    """A recurrent core and a linear readout of its hidden state.

    Args:
        core: a time-major recurrent module, as torch's are.
        output_size: O.
        reads: ``"last"`` predicts from the final hidden state of each direction, ``"every"`` and
            ``"masked"`` at each time step (a mask is in the targets).

    Attributes:
        segment: truncated backpropagation: in training mode, the state's graph is cut every so many
            steps; ``None`` for never.
        keeps_states: whether the forward passes of training leave ``states``.
        states: the core's output and final state of the last of these. Nothing but the readout is
            between them and the prediction, so the gradient with respect to them is the direct part
            of the adjoint. Whoever takes them puts ``None`` here, which frees the graph.
    """

    def __init__(
        self, core: nn.Module, output_size: int, reads: Literal["last", "every", "masked"]
    ) -> None:
        super().__init__()
        self.core = core
        self.directions = 2 if core.bidirectional else 1
        self.readout = nn.Linear(core.hidden_size * self.directions, output_size)
        self.reads = reads
        self.segment: int | None = None
        self.keeps_states = False
        self.states: tuple[Tensor, Tensor] | None = None

    def forward(self, x_TBI: Tensor) -> Tensor:
        """Map input ``[T, B, I]`` to a prediction ``[B, O]`` (last) or ``[T, B, O]`` (else)."""
        is_cut = self.segment is not None and self.training
        output, state = self._truncated(x_TBI) if is_cut else self.core(x_TBI)
        if self.keeps_states and self.training:
            # Views: neither is computed from the other, whatever the core does.
            output, state = self.states = output.view_as(output), state.view_as(state)
        if self.reads != "last":
            return self.readout(output)
        h_n = state[0] if isinstance(state, tuple) else state  # an LSTM's state is (h, c)
        return self.readout(h_n[-1] if self.directions == 1 else torch.cat((h_n[-2], h_n[-1]), -1))

    @torch.no_grad()
    def stream(self, x_TBI: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Predict at every step of a piece of a sequence, going on from where another one ended.

        The states are those of the whole sequence; where the layer promises it, to the last bit.

        Args:
            x_TBI: the piece, ``[T, B, I]``.
            state: what the call for the piece before returned; ``None`` at the beginning.

        Returns:
            The predictions ``[T, B, O]``, whatever the task reads, and the state.

        Raises:
            ValueError: the core is bidirectional: its states depend on what is still to come.
        """
        if self.directions == 2:
            raise ValueError("model.bidirectional must be false to stream; got true")
        output, state = self.core(x_TBI, state)
        return self.readout(output), state

    def _truncated(self, x_TBI: Tensor) -> tuple[Tensor, Any]:
        outputs, state = [], None
        for piece in x_TBI.split(self.segment or len(x_TBI)):
            output, state = self.core(piece, state)
            outputs.append(output)
            # The last piece's state is read; only what it came from is cut off.
            if len(outputs) * (self.segment or 1) < len(x_TBI):
                state = (
                    tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
                )
        return torch.cat(outputs), state

    @property
    def core_name(self) -> str:
        """What kind of layer the core is, parametrized or not."""
        return type_before_parametrizations(self.core).__name__

    @property
    def state_size(self) -> int:
        """Numbers that a step of a layer hands on: H, for an LSTM's ``(h, c)`` twice as many."""
        cell = cell_of(self.core)
        return self.core.hidden_size * (1 if cell is None else cell.states)

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters, readout included."""
        return sum(p.numel() for p in self.parameters())
