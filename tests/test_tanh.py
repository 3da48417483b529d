"""The float32 tanh of the CPU kernel: its polynomial is the one that `benchmarks.tanh` computes."""

import re
from pathlib import Path

import torch

from benchmarks import tanh
from rnn_cuda.functional import elman_rnn

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
