"""Characters a second of a model that writes them one by one, beside ``torch.nn.RNN``'s.

    python -m benchmarks.streaming

Each character is a call of `SequenceModel.stream` and the choice of the likeliest one, which the
next call reads. Both models have the same weights. On one thread; medians in turn, of ratios.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.tables import Table, spread_of
from benchmarks.timing import Work, interleave, summarise
from experiments.models import SequenceModel, build_core
from experiments.tasks._task import one_hot

CHARACTERS = 97
"""Of the alphabet, as many as those of the language reference of Python, about."""
WRITTEN = 50
"""In a call that is timed."""


def row_of(hidden_size: int, batch_size: int, seconds: float) -> tuple[str, ...]:
    """Return sizes, characters a second of both, and our speed over torch's, as text."""
    models = {}
    for core in ("fused_rnn", "rnn"):
        choice = build_core({"core": core, "hidden_size": hidden_size})
        layer = choice.build(CHARACTERS, hidden_size)
        models[core] = SequenceModel(layer, CHARACTERS, "every").eval()
    models["rnn"].load_state_dict(models["fused_rnn"].state_dict())
    works = {core: Work(_writing(model, batch_size)) for core, model in models.items()}
    summary = summarise(interleave(works, seconds), baseline="rnn")
    rates = [batch_size * WRITTEN / summary[core]["seconds"]["median"] for core in works]
    ratio = spread_of(summary["fused_rnn"]["ratio"])
    return str(hidden_size), str(batch_size), *(f"{rate:.0f}" for rate in rates), ratio


def _writing(model: SequenceModel, batch_size: int) -> Callable[[], torch.Tensor]:
    """Return what writes ``WRITTEN`` characters of each text, and returns them."""
    rows = one_hot(torch.arange(CHARACTERS), CHARACTERS)

    def work() -> torch.Tensor:
        chosen, state, written = torch.arange(batch_size), None, []
        for _ in range(WRITTEN):
            prediction, state = model.stream(rows[chosen].unsqueeze(0), state)
            chosen = prediction[0].argmax(-1)
            written.append(chosen)
        return torch.stack(written)

    return work


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = [row_of(H, B, seconds=5.0) for H in (128, 512) for B in (1, 64)]
    print(Table("Characters a second", ("H", "B", "fused_rnn", "rnn", "ratio"), lines))
