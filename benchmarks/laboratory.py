"""What the laboratory's training loop costs beside the arithmetic, and what a fused layer saves.

    python -m benchmarks.laboratory

On the small models of the horizon ladder, on one thread. The loop's own share of a step is all but
forward, backward and optimizer: data, the gradient's norm, logging. Clipping is counted apart.
"""

from __future__ import annotations

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

SECONDS = 10.0
"""For each line."""


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    print("The loop's own share of a step (aim: under 15 %); medians in turn")
    print("   T   us a step    own share   clipping by norm")
    with tempfile.TemporaryDirectory() as folder:
        for length in (10, 20, 50):
            microseconds, share, clipping = loop_share(length, Path(folder))
            print(f"{length:4} {microseconds:11.0f} {share:12.1%} {clipping:12.1%}", flush=True)
    works = {core: Work(_whole_run(core)) for core in ("rnn", "fused_rnn")}
    ratio = summarise(interleave(works, SECONDS), "rnn")["fused_rnn"]["ratio"]["median"]
    print("A run of 200 steps at T = 100 with model.core=fused_rnn, checkpoints included, takes")
    print(f"1/{ratio:.2f} of the time that it takes with rnn (aim: 1/1.5)")


def loop_share(length: int, folder: Path) -> tuple[float, float, float]:
    """Return a step's microseconds, the loop's share of it, and the share that clipping adds."""
    runs = {"loop": _run(horizon=length)}
    runs["clipping"] = _run(horizon=length, remedy={"clipping": {"norm": 1.0}})
    works = {name: Work(_loop(Training(run), folder / name)) for name, run in runs.items()}
    works["arithmetic"] = Work(_arithmetic(Training(runs["loop"])))
    summary = summarise(interleave(works, SECONDS), baseline="arithmetic")
    loop, clipped = (summary[name]["ratio"]["median"] for name in ("loop", "clipping"))
    microseconds = summary["loop"]["seconds"]["median"] / CHECK_EVERY * 1e6
    return microseconds, 1 - loop, 1 - clipped / loop


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


def _whole_run(core: str) -> Callable[[], None]:
    run = _run(core, horizon=100, training={"steps": 200})

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            train(run, Path(folder) / run.folder_name)

    return work


if __name__ == "__main__":
    main()
