"""Training as users do it: mixed precision, determinism, several processes, and little memory."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader, Dataset

from rnn_cuda import FusedLSTM
from rnn_cuda.functional import elman_rnn
from tests.layers import halves, needs_native, pair

T, B, I, H = 7, 4, 6, 16


# ---- mixed precision -----------------------------------------------------------------------------


def train(rnn, dtype, scaler, steps=3):
    """Train on fixed data under autocast; return the losses and the dtypes seen on the way."""
    torch.manual_seed(1)
    x, target = torch.randn(T, B, I), torch.randn(T, B, H) / 2
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.5)
    losses, dtypes = [], set()
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            output, h_n = rnn(x)
            loss = (output.float() - target).pow(2).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        dtypes |= {output.dtype, h_n.dtype, *(p.grad.dtype for p in rnn.parameters())}
        losses.append(loss.item())
    return losses, dtypes


@halves
@pytest.mark.parametrize("scaled", [False, True])
def test_a_training_step_under_autocast_follows_that_of_nn_rnn(dtype, scaled):
    fused, reference = pair(I, H, num_layers=2)
    scalers = [torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**8) for _ in range(2)]
    losses, dtypes = train(fused, dtype, scalers[0])
    expected, expected_dtypes = train(reference, dtype, scalers[1])
    assert dtypes == expected_dtypes == {dtype, torch.float32}
    # The two round at different places; both follow the same training.
    assert losses == pytest.approx(expected, rel=4 * torch.finfo(dtype).eps)
    assert losses[-1] < losses[0]
    assert scalers[0].get_scale() == scalers[1].get_scale()


# ---- determinism ---------------------------------------------------------------------------------


def test_ten_repeats_are_bitwise_equal_under_deterministic_algorithms():
    rnn, _ = pair(I, H, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 5, 5, 1]))

    def once():
        results = []
        for input in (x, packed):
            output, h_n = rnn(input)
            output = output if input is x else output.data
            loss = output.pow(2).sum() + h_n.sum()
            gradients = torch.autograd.grad(loss, list(rnn.parameters()), create_graph=True)
            second = torch.autograd.grad(gradients[1].pow(2).sum(), list(rnn.parameters()))
            results += [output, h_n, *gradients, *second]
        return [r.detach() for r in results]

    torch.use_deterministic_algorithms(True)
    try:
        first = once()
        for _ in range(9):
            assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# ---- several processes ---------------------------------------------------------------------------


def run_python(code, *arguments, processes=1, **environment):
    """Run ``code`` in ``processes`` fresh interpreters at once; the last argument is the rank."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), *arguments, str(rank)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        for process in running:
            output = process.communicate(timeout=120)[0]
            assert process.returncode == 0, output
    finally:
        for process in running:
            process.kill()  # nothing, to one that has ended


DDP = """
    import os
    import pathlib
    import sys
    import time
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel
    from rnn_cuda import FusedLSTM

    folder, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    problem = torch.load(f"{folder}/problem.pt")
    rnn = FusedLSTM(6, 16, num_layers=2, bidirectional=True)
    if rank == 0:  # the other process gets its parameters from this one
        rnn.load_state_dict(problem["parameters"])
    model = DistributedDataParallel(rnn)
    mine = slice(2 * rank, 2 * rank + 2)  # half of the batch
    output, (h_n, _) = model(problem["x"][:, mine])
    (output.pow(2).mean() + h_n.pow(2).mean()).backward()
    torch.save([p.grad for p in rnn.parameters()], f"{folder}/{rank}.pt")
    # Gloo's teardown aborts the process now and then, with nn.RNN as well: leave without it, as
    # soon as the other process needs nothing more of this one.
    pathlib.Path(f"{folder}/{rank}.done").touch()
    while not pathlib.Path(f"{folder}/{1 - rank}.done").exists():
        time.sleep(0.01)
    os._exit(0)
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is built without gloo")
def test_two_data_parallel_processes_have_the_gradients_of_one(tmp_path):
    rnn, _ = pair(I, H, num_layers=2, bidirectional=True, kind=FusedLSTM)
    x = torch.randn(T, B, I)
    torch.save({"parameters": rnn.state_dict(), "x": x}, tmp_path / "problem.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    run_python(DDP, str(tmp_path), port, processes=2)
    output, (h_n, _) = rnn(x)
    expected = torch.autograd.grad(output.pow(2).mean() + h_n.pow(2).mean(), list(rnn.parameters()))
    for rank in range(2):
        actual = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(actual, list(expected))


FORK = """
    import os
    import torch
    from rnn_cuda import FusedRNN

    torch.manual_seed(0)
    rnn = FusedRNN(16, 128)
    x = torch.randn(20, 16, 16)

    def step(threads):
        torch.set_num_threads(threads)
        rnn.zero_grad()
        rnn(x)[0].sum().backward()
        return rnn.weight_hh_l0.grad.clone()

    on_one, on_two = step(1), step(2)
    for _ in range(3):
        child = os.fork()
        if child == 0:  # exits with 0 only if it gets through and finds the same
            os._exit(0 if torch.equal(step(1), on_one) else 1)  # one, as in a DataLoader's workers
        assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(step(2), on_two)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_forked_after_two_threads_have_worked_trains_on_one():
    # On more threads a forked child hangs in any parallel operation of PyTorch, a matrix product
    # say: GNU OpenMP does not survive a fork.
    run_python(FORK, OMP_NUM_THREADS="2")


class Features(Dataset):
    """A data set whose samples are an RNN's output, computed in the worker that serves them."""

    def __init__(self, rnn):
        self.rnn = rnn
        self.x = torch.randn(8, T, I)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.rnn(self.x[index])[0]


def test_data_workers_run_forward_passes_after_the_parent_has():
    rnn, _ = pair(I, H)
    data = Features(rnn)
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = DataLoader(data, batch_size=4, num_workers=2, timeout=60)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


# ---- memory --------------------------------------------------------------------------------------


def saved_by(run):
    """Return ``run()`` and the tensors that it keeps for the backward pass."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        return run(), saved


def storages(tensors):
    """Bytes of each storage behind ``tensors``, by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@needs_native
def test_the_saved_tensors_of_a_packed_sequence_are_the_inputs_and_the_output():
    sizes, shapes = torch.tensor([4, 3, 2]), [(9, I), (B, H), (H, I), (H, H), (H,)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    (output, _), saved = saved_by(lambda: elman_rnn(*inputs, batch_sizes=sizes))
    assert len(saved) == 6
    assert storages(saved) == storages([*inputs, output])


@needs_native
def test_a_forward_pass_keeps_five_tensors_where_nn_rnn_keeps_some_per_step_and_a_second_output():
    steps, (fused, reference) = 100, pair(I, H, bias=False)
    x, hx = torch.randn(steps, B, I), torch.zeros(1, B, H)
    (output, h_n), saved = saved_by(lambda: fused(x, hx))
    (expected, expected_h_n), saved_by_torch = saved_by(lambda: reference(x, hx))
    assert len(saved) == 5
    assert len(saved_by_torch) > 2 * steps
    parameters = (fused.weight_ih_l0, fused.weight_hh_l0)
    kept = sum(storages([*saved, output, h_n]).values())
    assert kept == sum(t.nbytes for t in (x, hx, *parameters, output, h_n))
    kept_by_torch = sum(storages([*saved_by_torch, expected, expected_h_n]).values())
    assert kept_by_torch > kept + 0.95 * output.nbytes


@pytest.mark.parametrize(("steps", "bidirectional"), [(1, False), (1, True), (3, True)])
def test_the_final_state_can_be_modified_in_place_before_the_backward_pass(steps, bidirectional):
    fused, reference = pair(I, H, bidirectional=bidirectional)
    x, results = torch.randn(steps, B, I), []
    for rnn in (fused, reference):
        output, h_n = rnn(x)
        h_n.mul_(2)
        loss = output.sum() + h_n.square().sum()
        results.append(torch.autograd.grad(loss, list(rnn.parameters())))
    torch.testing.assert_close(*results)
