"""One run on several processes, as ``torchrun`` starts them.

    torchrun --nproc-per-node 2 -m experiments.run ...

Every process draws the same batch and trains on its share of the samples;
``DistributedDataParallel`` adds the gradients up. A share's loss counts by how many entries of its
target are scored, so the result is that of one process, up to rounding. The main process, of rank
0, alone has the run's folder: log, checkpoint, record, evaluation and probes.

Without torchrun there is one process, the main one, and nothing here does anything. An error in
one process ends all of them: torchrun sees to that, so do not catch it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.config import RunConfig
from experiments.fields import ConfigError
from experiments.remedies import Remedy
from experiments.tasks import Batch, Task

_Value = TypeVar("_Value")

_PATIENCE = timedelta(days=1)
"""How long the others wait while the main process evaluates. One that died is noticed at once."""


@contextmanager
def initialised() -> Iterator[None]:
    """Join the processes that torchrun started; without torchrun, do nothing.

    Processes talk by gloo about what is on the CPU, by NCCL about what is on GPUs; each takes the
    GPU of its local rank.
    """
    if not distributed.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def count() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process is the one that has the folder and the display."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def check(run: RunConfig) -> None:
    """Refuse a run that several processes would make otherwise than one.

    Raises:
        ConfigError: names the remedy or the device.
    """
    if count() == 1:
        return
    for remedy in run.remedies:
        if type(remedy).penalty is not Remedy.penalty:
            raise ConfigError(
                f"remedy.{remedy.name} adds a penalty on a whole batch, which cannot be had from "
                f"shares of it; make this run in one process, not {count()}"
            )
    if torch.device(run.device).index is not None:
        raise ConfigError(
            f"device must be cpu or cuda for {count()} processes, each of which takes the GPU of "
            f"its rank; got {run.device!r}"
        )


def from_main(make: Callable[[], _Value]) -> _Value:
    """Call ``make`` in the main process; return, or raise, the same in all of them."""
    if count() == 1:
        return make()
    outcome: list = [None, None]
    if is_main():
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Return, for each flag, whether it is set in any process."""
    if count() == 1:
        return flags
    shared = torch.tensor(flags, dtype=torch.int32)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return tuple(map(bool, shared.tolist()))


def sum_of(value: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes; waits for nothing on a GPU."""
    if count() > 1:
        distributed.all_reduce(value)
    return value


def parallel(model: nn.Module) -> nn.Module:
    """Return what to call for a model's output, so that all processes get the same gradient."""
    return model if count() == 1 else DistributedDataParallel(model)


def unsynchronised(model: nn.Module) -> AbstractContextManager:
    """Keep the gradients of a backward pass here; those of a later one are added up with them."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def share(batch: Batch, task: Task) -> tuple[Batch, float]:
    """Return this process's samples of a batch, and the weight of their loss in that of the batch.

    The weights of all processes add up to 1; 0 is that of a share of which nothing is scored. A
    process for which there is no sample gets the first one, with the weight 0.
    """
    if count() == 1:
        return batch, 1.0
    x_TBI, target = batch
    rank = distributed.get_rank()
    x = x_TBI.tensor_split(count(), 1)[rank]
    y = target.tensor_split(count(), task.sample_dim)[rank]
    if x.shape[1] == 0:
        return (x_TBI[:, :1], target.narrow(task.sample_dim, 0, 1)), 0.0
    return (x, y), weight(task, y, target)


def weight(task: Task, share: Tensor, target: Tensor) -> float:
    """Return how much the loss on a share of a target counts in that on all of it."""
    return task.scored(share) / max(1, task.scored(target))
