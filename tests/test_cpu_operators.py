"""What the CPU kernels do besides sums: their tanh, stores past the caches, reuse of memory."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks import tanh
from rnn_cuda import FusedRNN
from rnn_cuda.functional import elman_rnn
from tests.layers import needs_native

pytestmark = needs_native

# ---- the float32 tanh: its polynomial is the one that `benchmarks.tanh` computes -----------------

VECTOR = Path(__file__).parents[1] / "csrc" / "cpu" / "vector.h"


def test_the_kernel_has_the_polynomial_of_least_error():
    body = re.search(r"inline Vec<float> tanh_of<float>.*?\n}", VECTOR.read_text(), re.DOTALL)
    assert body is not None
    constants = {torch.tensor(float(text)).item() for text in re.findall(r"([\d.]+)f\b", body[0])}
    coefficients, error = tanh.minimax()
    assert error < 2.0**-25
    assert {torch.tensor(float(c)).item() for c in coefficients} <= constants


def test_tanh_errs_by_less_than_three_units_in_the_last_place_and_never_exceeds_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(1 << 20).uniform_(-14, 4, generator=generator).exp2()
    assert tanh.errors_in_ulp(x).max() < 3
    one, x = torch.ones(1, 1), x.view(1, -1, 1)
    found = elman_rnn(x, None, one, one)[0]
    assert found.max() <= 1
    torch.testing.assert_close(elman_rnn(-x, None, one, one)[0], -found, rtol=0, atol=0)


# ---- results of several mebibytes, written past the caches where vectors are whole cache lines ---

STREAMED_BYTES = 4 << 20  # kStreamedBytes in csrc/cpu/cache.h


class Case(NamedTuple):
    time_steps: int
    batch: int
    features: int
    threads: int
    dtype: torch.dtype = torch.float32
    packed: bool = False


CASES = {
    "one thread": Case(130, 64, 128, 1),
    "threads that share the batch": Case(130, 64, 128, 2),
    "threads that share the hidden dimension": Case(5000, 2, 112, 2),
    "rows that are no whole lines": Case(130, 64, 130, 2),
    "float64": Case(70, 64, 128, 2, torch.float64),
    "bfloat16": Case(260, 64, 128, 2, torch.bfloat16),
    "packed": Case(320, 64, 128, 2, packed=True),
}


def results(rnn: FusedRNN, x: Tensor, dy: Tensor, lengths: Tensor | None) -> list[Tensor]:
    x = x.detach().requires_grad_()
    if lengths is None:
        output, h_n = rnn(x)
    else:
        output, h_n = rnn(pack_padded_sequence(x, lengths))
        output, _ = pad_packed_sequence(output, total_length=len(x))
    return [output, *torch.autograd.grad(output, x, dy), h_n]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_large_results_are_those_of_half_of_the_samples_each(case, restored_threads):
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    rnn = FusedRNN(case.features, case.features, dtype=case.dtype)
    x, dy = torch.randn(2, case.time_steps, case.batch, case.features).to(case.dtype)
    half, lengths = case.batch // 2, None
    if case.packed:
        lengths = torch.linspace(case.time_steps, 1, case.batch).long()
    rows = case.batch * case.time_steps if lengths is None else int(lengths.sum())
    size = rows * case.features * x.element_size()
    assert STREAMED_BYTES < size < 2 * STREAMED_BYTES  # half of them is too small for that

    whole = results(rnn, x, dy, lengths)
    for its in (slice(half), slice(half, None)):
        part = results(rnn, x[:, its], dy[:, its], None if lengths is None else lengths[its])
        for large, small in zip(whole, part, strict=True):
            assert torch.equal(large[:, its], small)


# ---- outputs come from a small pool, which must not show -----------------------------------------


def large_output(seed=0):
    """Return one of 512 KiB, which malloc would not keep."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return FusedRNN(8, 64)(torch.randn(64, 32, 8))[0]


def test_an_output_in_use_is_left_alone_and_is_a_tensor_like_any_other():
    first = large_output()
    kept, view = first.clone(), first[3:, :, ::2]
    assert first.data_ptr() != large_output(1).data_ptr()
    assert torch.equal(first, kept)
    del first
    large_output(1)
    assert torch.equal(view, kept[3:, :, ::2])
    assert large_output().resize_(128, 32, 64).shape == (128, 32, 64)
    shared = large_output().share_memory_()
    assert shared.is_shared()
    assert torch.equal(shared, kept)
    assert large_output().numpy().flags.writeable


SCRIPT = """
import os, sys, torch, rnn_cuda
rnn = rnn_cuda.FusedRNN(8, 64)
for megabytes in sys.argv[1:]:
    os.environ["RNN_CUDA_CPU_POOL_MB"] = megabytes  # read until it is a number
    for time_steps in (64, 260):  # 512 KiB, and a little more than a huge page of 2 MiB
        try:
            x = torch.randn(time_steps, 32, 8)
            output = rnn(x)[0]
            freed = output.data_ptr()
            del output
            print(rnn(x)[0].data_ptr() == freed)
        except ValueError as error:
            print(error)
"""


def run_with_pools(*megabytes):
    """Run in a process of its own, where no other test has left anything in the pool."""
    command, environment = [sys.executable, "-c", SCRIPT], {"RNN_CUDA_BACKEND": "native"}
    done = subprocess.run(
        [*command, *megabytes], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_freed_output_is_used_again_and_a_size_that_is_no_number_is_refused():
    wrong = ["plenty", "-1", "1.5", ""]
    *refusals, small, large = run_with_pools(*wrong, "128")
    assert [small, large] == ["True", "True"]
    expected = "RNN_CUDA_CPU_POOL_MB: expected a whole number of mebibytes, got '{}'"
    assert [line for line in refusals if "POOL" in line] == [
        expected.format(text) for text in wrong for _ in range(2)
    ]


def test_the_pool_can_be_switched_off():
    assert len(run_with_pools("0")) == 2  # where malloc puts them is its own affair
