"""The training loop: one run, from nothing or from its checkpoint, to its record.

Nothing in the loop waits for the device: losses and gradient norms are written into tensors and
read every ``CHECK_EVERY`` steps, when they are logged, progress is reported and divergence is
noticed. Whatever training depends on is in `Training`, which is what a checkpoint holds: a run that
was killed goes on and ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils import get_total_norm

from experiments import checkpoint
from experiments.config import DATA_STREAM, RunConfig
from experiments.models import SequenceModel
from experiments.optimizers import build_optimizer
from experiments.probes import Probe
from experiments.provenance import provenance
from experiments.record import CONFIG, METRICS, MetricsLog, Record, Rows, owned, write_json
from experiments.remedies import Problem
from experiments.tasks import Batch, shown_metric
from rnn_cuda import backend

CHECK_EVERY = 50

SOLVED_BELOW = 0.10
LEARNED_BELOW = 0.25
"""Bounds on test error over know-nothing error; ``solved`` runs count as ``learned`` too."""

EVALUATION_NUMBERS = 2**24
"""Input numbers of a piece of test data that is evaluated at once."""

Progress = Callable[[int, float], None]
"""Called with the number of steps done and the last loss."""


class Interrupted(KeyboardInterrupt):
    """A run that was asked to end; its checkpoint is on disk."""


class Training:
    """All that training depends on, which is what a checkpoint holds.

    Args:
        run: what is trained.

    Attributes:
        model, optimizer, schedule: as built from ``run``.
        generator: where training data is drawn from.
        is_prepared: whether what comes before the first step is done.
        step: updates done.
        logged: steps whose loss and gradient norm are in the log; those since are in ``buffer``.
        diverged_at: first step, counted from 1, whose loss or gradient was not finite.
        solved_at: first step at which an evaluation found the task solved.
        test_error: of the last evaluation, and the step it was made at.
        probes: by name, the first measurement.
        seconds: wall-clock time spent, in all processes that worked on the run.
        log_size: bytes of the log that go with this state.
    """

    _PLAIN = (
        "is_prepared",
        "step",
        "logged",
        "diverged_at",
        "solved_at",
        "probes",
        "seconds",
        "log_size",
    )

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.model = run.build_model()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer, self.schedule = build_optimizer(
            run.optimizer, run.optimizer_config, self.model, run.training.steps
        )
        self.generator = torch.Generator().manual_seed(DATA_STREAM + run.seed)
        self.buffer = torch.zeros(CHECK_EVERY, 2, device=run.device)
        self.is_prepared = False
        self.step = 0
        self.logged = 0
        self.diverged_at: int | None = None
        self.solved_at: int | None = None
        self.probes: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0
        self.log_size = 0

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to train."""
        settings = self.run.training
        return (
            self.step == settings.steps
            or self.diverged_at is not None
            or (settings.stop_when_solved and self.solved_at is not None)
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {
            "identity": self.run.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "data": self.generator.get_state(),
            "random": _random_state(),
            "buffer": self.buffer,
            **{name: getattr(self, name) for name in self._PLAIN},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go back to where a checkpoint was made.

        Raises:
            experiments.checkpoint.CheckpointError: it belongs to another run.
        """
        if state.get("identity") != self.run.identity:
            raise checkpoint.CheckpointError(
                f"the checkpoint is that of run {state.get('identity')}, not {self.run.identity}"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["data"])
        self.buffer.copy_(state["buffer"])
        _set_random_state(state["random"])
        for name in self._PLAIN:
            setattr(self, name, state[name])


class HeldOut:
    """The data that a model is judged and measured on; the same for every model and seed.

    Attributes:
        test: the test set.
        probe: the batch for probes.
        model: the model that probes measure; its weights are those of the last measurement.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        generator = torch.Generator().manual_seed(run.evaluation.seed)
        test = run.task.test_set(run.horizon, generator)
        self.test = on_device(run, test)
        self.probe = on_device(
            run, run.task.sample(run.evaluation.probe_size, run.horizon, generator)
        )
        self.model = run.build_model()

    def error(self, model: SequenceModel) -> float:
        """Return the test error of a model."""
        return evaluate(model, self._run, self.test)


def train(
    run: RunConfig,
    folder: Path,
    on_progress: Progress = lambda step, loss: None,
    is_asked_to_end: Callable[[], bool] = lambda: False,
    checkpoint_seconds: float = 30.0,
    on_rows: Callable[[Rows], None] | None = None,
) -> Record:
    """Make a run, or the rest of it, and leave its record in ``folder``.

    Args:
        run: what to do.
        folder: the run's own, made if it is missing; its name ends with ``run.identity``.
        on_progress: called every ``CHECK_EVERY`` steps and at the end.
        is_asked_to_end: looked at before every step.
        checkpoint_seconds: the least time between two checkpoints; changes no number.
        on_rows: called with all rows of the log, those of earlier processes first.

    Returns:
        The record; that of an earlier process if the run has ended already.

    Raises:
        experiments.record.RunTakenError: another process works on it.
        experiments.record.RecordError, experiments.checkpoint.CheckpointError: what an earlier
            process left cannot be read; nothing was changed.
        Interrupted: ``is_asked_to_end`` said so; a checkpoint is saved.
        OSError: something cannot be written; the last checkpoint stands.
    """
    with owned(folder), use_threads(run.threads), _own_random_state(run):
        with suppress(FileNotFoundError):
            return Record.load(folder)
        state = checkpoint.load(folder)
        training = Training(run)
        if state is not None:
            training.load(state)
        write_json(folder / CONFIG, run.plain())
        log = MetricsLog(folder / METRICS, training.log_size, on_rows)
        try:
            held_out = HeldOut(run)
            _loop(training, held_out, folder, log, on_progress, is_asked_to_end, checkpoint_seconds)
            record = _outcome(training, held_out, log)
            log.commit()
        finally:
            log.close()
        record.save(folder)
        return record


def _loop(
    training: Training,
    held_out: HeldOut,
    folder: Path,
    log: MetricsLog,
    on_progress: Progress,
    is_asked_to_end: Callable[[], bool],
    checkpoint_seconds: float,
) -> None:
    run, task, model = training.run, training.run.task, training.model
    settings, remedies = run.training, run.remedies
    start, seconds_before = time.perf_counter(), training.seconds

    def save() -> None:
        training.seconds = seconds_before + time.perf_counter() - start
        training.log_size = log.commit()
        checkpoint.save(folder, training.state())

    if not training.is_prepared:
        for remedy in remedies:
            remedy.prepare(model, Problem(task, run.horizon), training.generator)
        training.probes = _measure(training, held_out, log, run.probes)
        training.is_prepared = True
    same_batch = _same_batch(run)
    saved = time.perf_counter()
    while not training.is_over:
        if is_asked_to_end():
            save()
            raise Interrupted
        training.optimizer.zero_grad(set_to_none=True)
        loss = None
        for _ in range(settings.accumulation):
            x_TBI, target = same_batch or on_device(
                run, task.sample(settings.batch_size, run.horizon, training.generator)
            )
            with _autocast(run):
                part = task.loss(model(x_TBI), target)
                objective = part
                for remedy in remedies:
                    penalty = remedy.penalty(model, x_TBI, part)
                    objective = objective if penalty is None else objective + penalty
            (objective / settings.accumulation).backward()
            loss = part.detach() if loss is None else loss + part.detach()
        norm = get_total_norm([p.grad for p in training.parameters], foreach=True)
        for remedy in remedies:
            remedy.clip(training.parameters, norm)
        training.optimizer.step()
        training.schedule.step()
        row = training.buffer[training.step % CHECK_EVERY]
        row[0], row[1] = loss / settings.accumulation, norm
        training.step += 1

        if training.step % CHECK_EVERY == 0 or training.step == settings.steps:
            on_progress(training.step, _log_steps(training, log))
        _look(training, held_out, log)
        if training.step % CHECK_EVERY == 0 and time.perf_counter() - saved > checkpoint_seconds:
            save()
            saved = time.perf_counter()
    save()


def _log_steps(training: Training, log: MetricsLog) -> float:
    """Log the steps since the last look; notice divergence. Return the last loss."""
    steps = range(training.logged, training.step)
    rows = training.buffer[[step % CHECK_EVERY for step in steps]].tolist()
    for step, (loss, norm) in zip(steps, rows, strict=True):
        log.write([{"step": step + 1, "loss": loss, "gradient_norm": norm}])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            training.diverged_at = step + 1
            break
    training.logged = training.step
    return rows[-1][0]


def _look(training: Training, held_out: HeldOut, log: MetricsLog) -> None:
    """Evaluate and probe, where this step is one for that; the end is not."""
    run, step = training.run, training.step
    if step == run.training.steps:
        return
    is_evaluation = run.evaluation.every is not None and step % run.evaluation.every == 0
    due = [p for p in run.probes if p.config.every is not None and step % p.config.every == 0]
    if not (is_evaluation or due):
        return
    if training.logged < step:
        _log_steps(training, log)
    if training.diverged_at is not None:
        return
    if is_evaluation:
        error = held_out.error(training.model)
        log.write([{"step": step, "test_error": error}])
        is_solved = error < SOLVED_BELOW * run.task.know_nothing_error(run.horizon)
        if is_solved and training.solved_at is None:
            training.solved_at = step
    _measure(training, held_out, log, due)


def _measure(
    training: Training, held_out: HeldOut, log: MetricsLog, probes: Iterable[Probe]
) -> dict[str, dict[str, Any]]:
    """Take probes; log and return what each measured, by name.

    They measure another model with the same weights, so that nothing they do changes the run.
    """
    results = {}
    for probe in probes:
        model = held_out.model
        model.load_state_dict(training.model.state_dict())
        model.eval()
        model.core.training = True  # cuDNN's layers have no gradients otherwise
        with torch.random.fork_rng(devices=_cuda_devices(training.run)):
            torch.manual_seed(training.run.evaluation.seed)
            values = probe.measure(model, training.run.task, *held_out.probe)
        log.write([{"step": training.step, "probe": probe.name, **values}])
        results[probe.name] = values
    return results


def _outcome(training: Training, held_out: HeldOut, log: MetricsLog) -> Record:
    """Test and probe the trained model; return the run's record."""
    run, task, horizon = training.run, training.run.task, training.run.horizon
    result: dict[str, Any] = {
        "hidden_size": training.model.core.hidden_size,
        "parameters": training.model.num_parameters,
        "steps": training.step,
        "solved_at": training.solved_at,
        "task": task.name,
        "metric": task.metric,
        "know_nothing_loss": task.know_nothing_loss(horizon),
        "know_nothing_error": task.know_nothing_error(horizon),
        "dependency": task.dependency(horizon),
    }
    reason, trained = None, {}
    if training.diverged_at is not None:
        reason = f"the loss or the gradient of step {training.diverged_at} is not finite"
        result["verdict"] = "diverged"
    else:
        error = held_out.error(training.model)
        log.write([{"step": training.step, "test_error": error}])
        trained = _measure(training, held_out, log, run.probes)
        generator = torch.Generator().manual_seed(run.evaluation.seed)
        result |= {
            "test_error": error,
            "test_metric": shown_metric(task, error),
            "error_over_know_nothing": error / task.know_nothing_error(horizon),
            "train_error": evaluate(training.model, run, _training_data(run, generator)),
            "test_error_at": {
                str(other): evaluate(
                    training.model, run, on_device(run, task.test_set(other, generator))
                )
                for other in run.evaluation.horizons
            },
        }
        result["verdict"] = verdict(result["error_over_know_nothing"])
    return Record(
        identity=run.identity,
        label=run.label,
        status="finished" if reason is None else "diverged",
        reason=reason,
        config=run.plain(),
        result=result,
        probes={
            name: {"initial": initial, "trained": trained.get(name)}
            for name, initial in training.probes.items()
        },
        provenance={
            **provenance(run.device),
            "backend": backend.describe()["decisions"],
            "seconds": training.seconds,
        },
    )


def verdict(share: float) -> str:
    """Judge a run by its test error over that of knowing nothing."""
    if share < SOLVED_BELOW:
        return "solved"
    return "learned" if share < LEARNED_BELOW else "failed"


@torch.no_grad()
def evaluate(model: SequenceModel, run: RunConfig, batch: Batch) -> float:
    """Return the task's error on a batch, evaluated a piece at a time."""
    x_TBI, target = batch
    task, sample_dim = run.task, 1 if run.task.reads != "last" else 0
    numbers = len(x_TBI) * max(model.core.hidden_size, x_TBI.shape[2])
    size = max(1, EVALUATION_NUMBERS // numbers)
    total, scored = 0.0, 0
    model.eval()
    for x, y in zip(x_TBI.split(size, 1), target.split(size, sample_dim), strict=True):
        with _autocast(run):
            error = task.error(model(x).float() if run.precision == "bfloat16" else model(x), y)
        count = task.scored(y)
        if count:
            total, scored = total + error.item() * count, scored + count
    model.train()
    return total / scored


def _training_data(run: RunConfig, generator: torch.Generator) -> Batch:
    """Return training data to compare the test error with: as many sequences as a test has."""
    same = _same_batch(run)
    if same is not None:
        return same
    return on_device(run, run.task.sample(run.evaluation.train_size, run.horizon, generator))


def _same_batch(run: RunConfig) -> Batch | None:
    """Return the batch of full-batch gradient descent, the same in every step."""
    samples = getattr(run.optimizer_config, "samples", None)
    if samples is None:
        return None
    generator = torch.Generator().manual_seed(DATA_STREAM + run.seed)
    return on_device(run, run.task.sample(samples, run.horizon, generator))


def on_device(run: RunConfig, batch: Batch) -> Batch:
    """Return a batch on the run's device, floats in its precision."""
    dtype = torch.float64 if run.precision == "float64" else torch.float32
    x_TBI, target = (
        tensor.to(run.device, dtype if tensor.is_floating_point() else tensor.dtype)
        for tensor in batch
    )
    return x_TBI, target


def _autocast(run: RunConfig) -> AbstractContextManager[Any]:
    if run.precision != "bfloat16":
        return nullcontext()
    return torch.autocast(torch.device(run.device).type, torch.bfloat16)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads: their number can change the rounding of a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _own_random_state(run: RunConfig) -> Iterator[None]:
    """Seed every generator for a run (dropout draws from torch's), and put them back after it."""
    before = _random_state()
    seed = 2 * DATA_STREAM + run.seed
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        _set_random_state(before)


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def _cuda_devices(run: RunConfig) -> list[int]:
    device = torch.device(run.device)
    return [device.index or 0] if device.type == "cuda" else []
