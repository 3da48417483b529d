"""Cut the gradient's way into the past."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.fields import Config, ConfigError, integer
from experiments.models import SequenceModel
from experiments.remedies._remedy import Problem, Remedy


@dataclass(frozen=True)
class TruncatedBPTTConfig(Config):
    """Options of ``remedy=[truncated_bptt]``.

    Attributes:
        segment: steps between two cuts; no gradient passes one.
    """

    segment: int = integer(20, at_least=1)


class TruncatedBPTT(Remedy):
    """Truncated backpropagation through time (Williams & Peng 1990); a control.

    The state is carried across a cut, its gradient is not. So no weight ever gets a gradient from a
    dependency longer than a segment. Evaluation and probes know no cuts.
    """

    name = "truncated_bptt"
    Config = TruncatedBPTTConfig

    def check(self, model: SequenceModel) -> None:
        """Refuse two directions: the second one's past is the first one's future."""
        super().check(model)
        if model.directions == 2:
            raise ConfigError(
                "remedy.truncated_bptt applies to one direction, model.bidirectional=false; got "
                "true"
            )

    def change(self, model: SequenceModel, problem: Problem) -> None:
        """Tell the model where to cut."""
        model.segment = self.config.segment
