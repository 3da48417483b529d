"""What the laboratory's training loop costs beside the arithmetic, and what a fused layer saves.

    python -m benchmarks.laboratory

On the small models of the horizon ladder, on one thread. The loop's own share of a step is all but
forward, backward and optimizer: data, the gradient's norm, logging. Clipping is counted apart.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Work, interleave, summarise
from experiments.config import RunConfig
from experiments.evaluation import HeldOut
from experiments.record import MetricsLog
from experiments.train import CHECK_EVERY, Training, step, train

LENGTHS = (10, 20, 50)
END_TO_END = {"horizon": 100, "training": {"steps": 200}}
AIM_SHARE, AIM_SPEED = 0.15, 1.5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each line (%(default)s)")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    print(f"The loop's own share of a step (aim: under {AIM_SHARE:.0%}); medians in turn")
    print("   T   us a step    own share   clipping by norm")
    with tempfile.TemporaryDirectory() as folder:
        for length in LENGTHS:
            microseconds, share, clipping = loop_share(length, seconds, Path(folder))
            print(
                f"{length:4}   {microseconds:9.0f}   {share:10.1%}   {clipping:10.1%}", flush=True
            )
    ratio = end_to_end(seconds)
    print(f"A run at T = {END_TO_END['horizon']} with model.core=fused_rnn takes")
    print(f"1/{ratio:.2f} of the time that it takes with rnn (aim: 1/{AIM_SPEED})")


def loop_share(length: int, seconds: float, folder: Path) -> tuple[float, float, float]:
    """Return a step's microseconds, the loop's share of it, and the share that clipping adds."""
    contestants = {
        "arithmetic": _arithmetic(Training(_run(horizon=length))),
        "loop": _loop(Training(_run(horizon=length)), folder / f"{length}"),
        "clipping": _loop(
            Training(_run(horizon=length, remedy={"clipping": {"norm": 1.0}})),
            folder / f"{length}.clipped",
        ),
    }
    summary = summarise(
        interleave({name: Work(run) for name, run in contestants.items()}, seconds)[0],
        baseline="arithmetic",
    )
    loop = summary["loop"]["ratio"]["median"]
    clipped = summary["clipping"]["ratio"]["median"]
    microseconds = summary["loop"]["seconds"]["median"] / CHECK_EVERY * 1e6
    return microseconds, 1 - loop, 1 - clipped / loop


def end_to_end(seconds: float) -> float:
    """Return how many times as long a whole run takes with torch's layer, checkpoints included."""

    def whole(core: str) -> Callable[[], Any]:
        run = _run(core, **END_TO_END)

        def work() -> None:
            with tempfile.TemporaryDirectory() as folder:
                train(run, Path(folder) / run.folder_name)

        return work

    contestants = {core: Work(whole(core)) for core in ("rnn", "fused_rnn")}
    samples, _ = interleave(contestants, seconds)
    return summarise(samples, baseline="rnn")["fused_rnn"]["ratio"]["median"]


def _run(core: str = "fused_rnn", **values: Any) -> RunConfig:
    """Return a run of the ladder's: adding, H 64, B 64, Adam."""
    return RunConfig.parse({"model": {"core": core}, "task": {"name": "adding"}, **values})


def _arithmetic(training: Training) -> Callable[[], None]:
    """Return forward, backward and optimizer alone, on one batch."""
    run = training.run
    x_TBI, target = (part.contiguous() for part in training.batches.next())

    def work() -> None:
        for _ in range(CHECK_EVERY):
            for parameter in training.parameters:
                parameter.grad = None
            run.task.loss(training.model(x_TBI), target).backward()
            training.optimizer.step()

    return work


def _loop(training: Training, path: Path) -> Callable[[], None]:
    """Return the loop as it is, logging to a file."""
    held_out, log = HeldOut(training.run), MetricsLog(path)

    def work() -> None:
        training.step = 0  # never at its end
        for _ in range(CHECK_EVERY):
            step(training, training.model, held_out, log, path.parent, lambda step, loss: None)

    return work


if __name__ == "__main__":
    main()
