"""Characters a second of a model that writes them one by one, beside ``torch.nn.RNN``'s.

    python -m benchmarks.streaming

Each character is a call of `SequenceModel.stream` and the choice of the likeliest one, which the
next call reads. Both models have the same weights. On one thread; medians in turn, of ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.timing import Contestant, interleave, summarise
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
    print("   H    B   fused_rnn, characters a second   rnn    ratio (quartiles)")
    for hidden_size in (128, 512):
        for batch_size in (1, 64):
            fused, plain, ratio = compared(hidden_size, batch_size, seconds)
            low, middle, high = ratio.values()
            print(
                f"{hidden_size:4} {batch_size:4}   {fused:29.0f} {plain:9.0f}"
                f"   {middle:6.2f} ({low:.2f} to {high:.2f})",
                flush=True,
            )


def compared(
    hidden_size: int, batch_size: int, seconds: float
) -> tuple[float, float, dict[str, float]]:
    """Return characters a second of both, and the quartiles of our speed over torch's."""
    models = {core: _model(core, hidden_size) for core in ("fused_rnn", "rnn")}
    models["rnn"].load_state_dict(models["fused_rnn"].state_dict())
    contestants = {core: Contestant(_writing(each, batch_size)) for core, each in models.items()}
    summary = summarise(interleave(contestants, seconds)[0], baseline="rnn")
    fused, plain = (
        batch_size * WRITTEN / summary[core]["seconds"]["median"] for core in contestants
    )
    return fused, plain, summary["fused_rnn"]["ratio"]


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
