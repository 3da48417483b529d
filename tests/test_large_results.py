"""Results of several mebibytes are written past the caches where vectors are whole cache lines.

What is written has to be what half of the samples give, which is too small for that.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnn_cuda
from rnn_cuda import backend

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


def run(rnn: rnn_cuda.FusedRNN, x: Tensor, dy: Tensor, lengths: Tensor | None) -> list[Tensor]:
    x = x.detach().requires_grad_()
    if lengths is None:
        output, h_n = rnn(x)
    else:
        output, h_n = rnn(pack_padded_sequence(x, lengths))
        output, _ = pad_packed_sequence(output, total_length=len(x))
    return [output, *torch.autograd.grad(output, x, dy), h_n]


@pytest.mark.parametrize("name", CASES)
def test_large_results_are_those_of_half_of_the_samples_each(name, restored_threads):
    case = CASES[name]
    if not backend.use_native("cpu", case.dtype):
        pytest.skip("no native kernels here")
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    rnn = rnn_cuda.FusedRNN(case.features, case.features, dtype=case.dtype)
    x, dy = torch.randn(2, case.time_steps, case.batch, case.features).to(case.dtype)
    half = case.batch // 2
    lengths = None
    if case.packed:
        lengths = torch.linspace(case.time_steps, 1, case.batch).long()
    rows = case.batch * case.time_steps if lengths is None else int(lengths.sum())
    size = rows * case.features * x.element_size()
    assert STREAMED_BYTES < size < 2 * STREAMED_BYTES

    whole = run(rnn, x, dy, lengths)
    for its in (slice(half), slice(half, None)):
        part = run(rnn, x[:, its], dy[:, its], None if lengths is None else lengths[its])
        for large, small in zip(whole, part, strict=True):
            torch.testing.assert_close(large[:, its], small, rtol=0, atol=0)
