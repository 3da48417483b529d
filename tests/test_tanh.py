"""The float32 tanh of the CPU kernel: its polynomial is the one that `benchmarks.tanh` computes."""

import re
from pathlib import Path

import pytest
import torch

import rnn_cuda
from benchmarks import tanh
from rnn_cuda import backend

VECTOR = Path(__file__).parents[1] / "csrc" / "cpu" / "vector.h"


def test_the_kernel_has_the_polynomial_of_least_error():
    body = re.search(r"inline Vec<float> tanh_of<float>.*?\n}", VECTOR.read_text(), re.DOTALL)
    assert body is not None
    constants = {torch.tensor(float(text)).item() for text in re.findall(r"([\d.]+)f\b", body[0])}
    coefficients, error = tanh.minimax()
    assert error < 2.0**-25
    assert {torch.tensor(float(c)).item() for c in coefficients} <= constants


def test_tanh_errs_by_less_than_three_units_in_the_last_place_and_never_exceeds_one():
    if not backend.use_native("cpu", torch.float32):
        pytest.skip("no native kernels here")
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(1 << 20).uniform_(-14, 4, generator=generator).exp2().view(1, -1, 1)
    one = torch.ones(1, 1)
    found = rnn_cuda.functional.elman_rnn(x, None, one, one)[0]
    exact = x.double().tanh()
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
    assert ((found.double() - exact).abs() / unit).max() < 3
    assert found.max() <= 1
    torch.testing.assert_close(
        rnn_cuda.functional.elman_rnn(-x, None, one, one)[0], -found, rtol=0, atol=0
    )
