"""Characters a second of a model that writes them one by one, beside ``torch.nn.RNN``'s.

    python -m benchmarks.streaming

Each character is a call of `SequenceModel.stream` and the choice of the likeliest one, which the
next call reads. Both models have the same weights. On one thread; medians in turn, of ratios.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each line (%(default)s)")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    rows = [row_of(H, B, seconds) for H in (128, 512) for B in (1, 64)]
    columns = ("H", "B", "fused_rnn", "rnn", "ratio")
    print(Table("Characters a second", columns, rows).text())


def row_of(hidden_size: int, batch_size: int, seconds: float) -> tuple[str, ...]:
    """Return sizes, characters a second of both, and our speed over torch's, as text."""
    models = {core: _model(core, hidden_size) for core in ("fused_rnn", "rnn")}
    models["rnn"].load_state_dict(models["fused_rnn"].state_dict())
    works = {core: Work(_writing(model, batch_size)) for core, model in models.items()}
    summary = summarise(interleave(works, seconds)[0], baseline="rnn")
    rates = [batch_size * WRITTEN / summary[core]["seconds"]["median"] for core in works]
    ratio = spread_of(summary["fused_rnn"]["ratio"])
    return str(hidden_size), str(batch_size), *(f"{rate:.0f}" for rate in rates), ratio


def _model(core: str, hidden_size: int) -> SequenceModel:
    layer = build_core({"core": core, "hidden_size": hidden_size}).build(CHARACTERS, hidden_size)
    return SequenceModel(layer, CHARACTERS, "every").eval()


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
    main()
