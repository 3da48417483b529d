"""Outputs of the CPU operators come from a small pool, which must not show."""

import os
import subprocess
import sys

import pytest
import torch

import rnn_cuda
from rnn_cuda import backend

LARGE = (64, 32, 8, 64)  # T, B, I, H: an output of 512 KiB, which malloc would not keep


@pytest.fixture(autouse=True)
def _native():
    if not backend.use_native("cpu", torch.float32):
        pytest.skip("no native kernels here")


def run(seed=0):
    torch.manual_seed(seed)
    time_steps, batch, inputs, hidden = LARGE
    rnn = rnn_cuda.FusedRNN(inputs, hidden)
    with torch.no_grad():
        return rnn(torch.randn(time_steps, batch, inputs))[0]


def test_an_output_in_use_is_left_alone():
    first = run(0)
    kept = first.clone()
    second = run(1)
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_an_output_is_a_tensor_like_any_other():
    output = run()
    view = output[3:, :, ::2]
    expected = view.clone()
    del output
    run(1)
    torch.testing.assert_close(view, expected, rtol=0, atol=0)
    grown = run().resize_(128, 32, 64)
    assert grown.shape == (128, 32, 64)
    shared = run().share_memory_()
    assert shared.is_shared()
    torch.testing.assert_close(shared, run(), rtol=0, atol=0)
    assert run().numpy().flags.writeable


SCRIPT = """
import sys, torch, rnn_cuda
rnn, x = rnn_cuda.FusedRNN(8, 64), torch.randn(int(sys.argv[1]), 32, 8)
output = rnn(x)[0]
freed = output.data_ptr()
del output
print("ran", rnn(x)[0].data_ptr() == freed)
"""


def run_with_pool(megabytes, time_steps=64):
    """Run in a process of its own, where no other test has left anything in the pool."""
    environment = os.environ | {"RNN_CUDA_CPU_POOL_MB": megabytes, "RNN_CUDA_BACKEND": "native"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(time_steps)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


# 512 KiB, and a little more than a huge page of 2 MiB.
@pytest.mark.parametrize("time_steps", [64, 260])
def test_a_freed_output_is_used_again(time_steps):
    done = run_with_pool("128", time_steps)
    assert done.stdout == "ran True\n", done.stderr


def test_the_pool_can_be_switched_off():
    done = run_with_pool("0")
    assert done.stdout.startswith("ran "), done.stderr  # where malloc puts it is its own affair


@pytest.mark.parametrize("text", ["plenty", "-1", "1.5", ""])
def test_a_size_that_is_no_number_is_refused(text):
    done = run_with_pool(text)
    assert done.returncode != 0
    assert (
        f"RNN_CUDA_CPU_POOL_MB: expected a whole number of mebibytes, got '{text}'" in done.stderr
    )
