"""The training loop: one run, from nothing or from its checkpoint, to its record.

Nothing in the loop waits for the device: losses and gradient norms are written into tensors and
read every ``CHECK_EVERY`` steps, when they are logged, progress is reported and divergence is
noticed. Whatever training depends on is in `Training`, which is what a checkpoint holds: a run that
was killed goes on and ends with the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from experiments import checkpoint, distributed
from experiments.batches import Batches
from experiments.config import RunConfig
from experiments.evaluation import SOLVED_BELOW, HeldOut
from experiments.looks import save_looks
from experiments.models import SequenceModel
from experiments.numerics import (
    autocast,
    own_random_state,
    random_state,
    set_random_state,
    use_threads,
)
from experiments.optimizers import build_optimizer, set_rate
from experiments.probes import Probe
from experiments.provenance import provenance
from experiments.record import CONFIG, METRICS, MetricsLog, Record, Rows, owned, write_json
from experiments.remedies import Problem
from rnn_cuda import backend

CHECK_EVERY = 50

Progress = Callable[[int, float], None]
"""Called with the number of steps done and the last loss."""


class Interrupted(KeyboardInterrupt):
    """A run that was asked to end; its checkpoint is on disk."""


class Training:
    """All that training depends on, which is what a checkpoint holds.

    Args:
        run: what is trained.

    Attributes:
        model, optimizer: as built from ``run``.
        parameters: of the model, those that are trained.
        batches: the training data.
        step: updates done.
        pending: loss and gradient norm, on the device, of the last steps, not in the log yet.
        is_prepared: whether remedies and probes have done what comes before the first step.
        diverged_at: first step, counted from 1, whose loss or gradient was not finite.
        solved_at: first step at which an evaluation found the task solved.
        probes: by name, the first measurement.
        seconds: wall-clock time spent, in all processes that worked on the run.
        processor_seconds: processor time of these, of all threads.
        log_size: bytes of the log that go with this state.
    """

    _PLAIN = (
        "step",
        "is_prepared",
        "diverged_at",
        "solved_at",
        "probes",
        "seconds",
        "processor_seconds",
        "log_size",
    )

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.model = run.build_model()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(run.optimizer, run.optimizer_config, self.model)
        self.batches = Batches(run)
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.step = 0
        self.is_prepared = False
        self.diverged_at: int | None = None
        self.solved_at: int | None = None
        self.probes: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0
        self.processor_seconds = 0.0
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

    @property
    def is_finite(self) -> bool:
        """Whether all trained weights are."""
        return all(bool(p.isfinite().all()) for p in self.parameters)

    def update(self, predict: Callable[[Tensor], Tensor]) -> None:
        """Do one step. Nothing here waits for the device.

        Args:
            predict: the model, or what `distributed.parallel` made of it.
        """
        run, accumulation = self.run, self.run.training.accumulation
        set_rate(self.optimizer, run.optimizer_config, self.step, run.training.steps)
        for parameter in self.parameters:
            parameter.grad = None
        losses = []
        for index in range(accumulation):
            is_last = index == accumulation - 1
            with nullcontext() if is_last else distributed.unsynchronised(predict):
                objective, loss = self._objective(predict)
                (objective if accumulation == 1 else objective / accumulation).backward()
            losses.append(loss)
        loss = losses[0] if accumulation == 1 else torch.stack(losses).mean()
        # In one call on all gradients; torch's get_total_norm takes three times as long.
        gradients = [p.grad.flatten() for p in self.parameters if p.grad is not None]
        norm = vector_norm(torch.cat(gradients))
        for remedy in run.remedies:
            remedy.clip(self.parameters, norm)
        self.optimizer.step()
        self.pending.append((loss, norm))
        self.step += 1

    def _objective(self, predict: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return what is minimised on the next batch, and the task's loss on it, detached."""
        run = self.run
        (x_TBI, target), weight = distributed.share(self.batches.next(), run.task)
        with autocast(run):
            prediction = predict(x_TBI)
            if weight == 0:  # the mean over no scored entry is nan
                objective = loss = prediction.sum() * 0
            else:
                objective = loss = run.task.loss(prediction, target)
            for remedy in run.remedies:
                penalty = remedy.penalty(self.model, x_TBI, loss)
                objective = objective if penalty is None else objective + penalty
        if distributed.count() == 1:
            return objective, loss.detach()
        # The gradients' mean over the processes is taken, and their weighted sum is wanted.
        return (
            objective * (weight * distributed.count()),
            distributed.sum_of(loss.detach() * weight),
        )

    def take_pending(self) -> list[tuple[int, float, float]]:
        """Return step, loss and gradient norm of the steps that wait to be logged."""
        first = self.step - len(self.pending) + 1
        rows = _as_tensor(self.pending).tolist()
        self.pending = []
        return [(first + index, loss, norm) for index, (loss, norm) in enumerate(rows)]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {
            "identity": self.run.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.batches.state(),
            "random": random_state(self.run),
            "pending": _as_tensor(self.pending),
            **{name: getattr(self, name) for name in self._PLAIN},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go back to where a checkpoint was made.

        Raises:
            experiments.checkpoint.CheckpointError: another program wrote it.
        """
        with _fitting():
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.batches.load(state["data"])
            self.pending = [(loss, norm) for loss, norm in state["pending"].to(self.run.device)]
            for name in self._PLAIN:
                setattr(self, name, state[name])
            set_random_state(self.run, state["random"])


@contextmanager
def _fitting() -> Iterator[None]:
    """Have an error say that the state which is loaded does not fit this program."""
    try:
        yield
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise checkpoint.CheckpointError(
            f"the checkpoint does not fit this program ({reason}); go on with the program "
            "that wrote it, or delete the run's folder to make the run from its first step"
        ) from error


def train(
    run: RunConfig,
    folder: Path,
    on_progress: Progress = lambda step, loss: None,
    is_asked_to_end: Callable[[], bool] = lambda: False,
    checkpoint_seconds: float = 30.0,
    on_rows: Callable[[Rows], None] | None = None,
) -> Record:
    """Make a run, or the rest of it, and leave its record in ``folder``.

    Within `experiments.distributed.initialised` all processes call this together, each gets the
    record, and the main one alone uses ``folder`` and ``on_progress``.

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
        ValueError: the folder has another run's name.
        experiments.fields.ConfigError: several processes cannot make this run as one does.
        experiments.record.RunTakenError: another process works on it.
        experiments.record.RecordError, experiments.checkpoint.CheckpointError: what an earlier
            process left cannot be read; nothing was changed.
        Interrupted: ``is_asked_to_end`` said so; a checkpoint is saved.
        OSError: something cannot be written; the last checkpoint stands.
    """
    if not folder.resolve().name.endswith(run.identity):
        raise ValueError(f"folder must end with the run's identity, {run.identity}; got {folder}")
    distributed.check(run)
    with ExitStack() as stack:
        stack.enter_context(use_threads(run.threads))
        stack.enter_context(own_random_state(run))
        record, state = distributed.from_main(lambda: _claim(stack, run, folder))
        if record is not None:
            return record
        training, held_out = Training(run), HeldOut(run)
        if state is not None:
            training.load(state)
        log = None
        if distributed.is_main():
            log = stack.enter_context(MetricsLog(folder / METRICS, training.log_size, on_rows))
            write_json(folder / CONFIG, run.plain())
        _loop(training, held_out, folder, log, on_progress, is_asked_to_end, checkpoint_seconds)
        return distributed.from_main(lambda: _finish(training, held_out, folder, log))


def load_run(folder: Path, device: str = "cpu") -> tuple[RunConfig, SequenceModel]:
    """Return the run of a folder, and its model with the weights of the newest checkpoint.

    Of a run that has ended, the newest checkpoint holds the trained weights.

    Args:
        folder: of a run that has ended, or of one that has a checkpoint.
        device: where the model is to be; the run may have been made on another one.

    Raises:
        FileNotFoundError: there is no configuration or no checkpoint.
        experiments.fields.ConfigError: no run can be made of the configuration here.
        experiments.checkpoint.CheckpointError: no checkpoint can be read, it is another run's, or
            the data of its task has changed.
    """
    state = checkpoint.load(folder)
    if state is None:
        raise FileNotFoundError(f"there is no checkpoint in {folder}")
    _check_identity(state, folder, folder.resolve().name[-len(state["identity"]) :])
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    run = RunConfig.parse({**config, "device": device})
    # A run's device counts, but here it need not be the one that is there.
    if replace(run, device=config["device"]).identity != state["identity"]:
        raise checkpoint.CheckpointError(
            f"{folder} cannot be used: the data of task {run.task.name} has changed since its "
            f"model was trained, or {CONFIG} was edited ({CONFIG}: task is {config['task']}); put "
            "the data back, or train again"
        )
    model = run.build_model()
    with _fitting():
        model.load_state_dict(state["model"])
    return run, model


def _claim(
    stack: ExitStack, run: RunConfig, folder: Path
) -> tuple[Record | None, dict[str, Any] | None]:
    """Return the record of a run that has ended; else own its folder, return its checkpoint."""
    with suppress(FileNotFoundError):
        return Record.load(folder), None
    stack.enter_context(owned(folder))
    with suppress(FileNotFoundError):  # its owner may have ended just now
        return Record.load(folder), None
    state = checkpoint.load(folder)
    if state is not None:
        _check_identity(state, folder, run.identity)
    return None, state


def _check_identity(state: dict[str, Any], folder: Path, identity: str) -> None:
    if state["identity"] != identity:
        raise checkpoint.CheckpointError(
            f"the checkpoint in {folder} is that of another run, {state['identity']}; delete the "
            "folder to make the run from its first step"
        )


def _loop(
    training: Training,
    held_out: HeldOut,
    folder: Path,
    log: MetricsLog | None,
    on_progress: Progress,
    is_asked_to_end: Callable[[], bool],
    checkpoint_seconds: float,
) -> None:
    """Train to the end, and leave a checkpoint there; ``log`` is the main process's."""
    run, model = training.run, training.model
    start, seconds_before = time.perf_counter(), training.seconds
    processor_start, processor_before = time.process_time(), training.processor_seconds

    def save() -> None:
        if log is not None:
            training.seconds = seconds_before + time.perf_counter() - start
            spent = time.process_time() - processor_start
            training.processor_seconds = processor_before + spent
            training.log_size = log.commit()
            checkpoint.save(folder, training.state())

    if not training.is_prepared:
        for remedy in run.remedies:
            remedy.prepare(model, Problem(run.task, run.horizon), training.batches.generator)
        if log is not None:
            training.probes = _measure(training, held_out, log, run.probes)
            save_looks(held_out.looks(model), folder, 0)
        training.is_prepared = True
    predict = distributed.parallel(model)
    saved = time.perf_counter()
    while True:
        is_over, is_asked = distributed.any_of(training.is_over, is_asked_to_end())
        if is_over or is_asked:
            distributed.from_main(save)
            if is_over:
                return
            raise Interrupted
        step(training, predict, held_out, log, folder, on_progress)
        if time.perf_counter() - saved > checkpoint_seconds:
            save()
            saved = time.perf_counter()


def step(
    training: Training,
    predict: Callable[[Tensor], Tensor],
    held_out: HeldOut,
    log: MetricsLog | None,
    folder: Path,
    on_progress: Progress,
) -> None:
    """Do one step, and what is due after it."""
    training.update(predict)
    if log is None:
        training.pending.clear()
        return
    if training.step % CHECK_EVERY == 0 or training.step == training.run.training.steps:
        on_progress(training.step, _log_steps(training, log))
    _examine(training, held_out, log, folder)


def _log_steps(training: Training, log: MetricsLog) -> float:
    """Log the steps that wait for it; notice divergence. Return the last loss."""
    rows = training.take_pending()
    for index, (step, loss, norm) in enumerate(rows):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            training.diverged_at = step
            rows = rows[: index + 1]
            break
    log.write([{"step": step, "loss": loss, "gradient_norm": norm} for step, loss, norm in rows])
    return rows[-1][1]


def _examine(training: Training, held_out: HeldOut, log: MetricsLog, folder: Path) -> None:
    """Evaluate, probe and look, where this step is one for that; the end is not."""
    run, step = training.run, training.step
    is_evaluation = run.evaluation.every is not None and step % run.evaluation.every == 0
    due = [p for p in run.probes if p.config.every is not None and step % p.config.every == 0]
    if training.is_over or not (is_evaluation or due):
        return
    if training.pending:
        _log_steps(training, log)
    if is_evaluation and training.diverged_at is None:
        error = held_out.error(training.model)
        is_solved = error < SOLVED_BELOW * run.task.know_nothing_error(run.horizon)
        if is_solved and training.solved_at is None:
            training.solved_at = step
        if not training.is_over:  # at the end everything is measured again
            log.write([{"step": step, "test_error": error}])
            if training.is_finite:
                save_looks(held_out.looks(training.model), folder, step)
    if not training.is_over:
        _measure(training, held_out, log, due)


def _measure(
    training: Training, held_out: HeldOut, log: MetricsLog, probes: Iterable[Probe]
) -> dict[str, dict[str, Any]]:
    """Take probes; log and return what each measured, by name."""
    results = {}
    for probe in probes:
        results[probe.name] = values = held_out.measure(training.model, probe)
        log.write([{"step": training.step, "probe": probe.name, **values}])
    return results


def _finish(training: Training, held_out: HeldOut, folder: Path, log: MetricsLog | None) -> Record:
    assert log is not None
    record = _outcome(training, held_out, log)
    if record.status == "finished":
        save_looks(held_out.looks(training.model), folder, training.step)
    log.commit()
    record.save(folder)
    return record


def _outcome(training: Training, held_out: HeldOut, log: MetricsLog) -> Record:
    """Test and probe the trained model; return the run's record."""
    run, model = training.run, training.model
    trained, reason, error = {}, None, None
    done = {"steps": training.step, "solved_at": training.solved_at}
    if training.diverged_at is not None:
        reason = f"the loss or the gradient of step {training.diverged_at} is not finite"
    else:
        error = held_out.error(model)
        if not (math.isfinite(error) and training.is_finite):
            reason = f"after step {training.step} the weights or the test error are not finite"
    if reason is not None:
        result = held_out.result(model, None, **done)
    else:
        log.write([{"step": training.step, "test_error": error}])
        trained = _measure(training, held_out, log, run.probes)
        result = held_out.result(model, error, seen=training.batches.same, **done)
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
            "processor_seconds": training.processor_seconds,
        },
    )


def _as_tensor(pending: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return losses and norms ``[N, 2]`` in float64, so that every precision is kept."""
    if not pending:
        return torch.empty(0, 2, dtype=torch.float64)
    return torch.stack(
        [torch.stack(values).double() for values in zip(*pending, strict=True)], dim=1
    )
