"""The tests of the CUDA operators, on emulated kernels, from a session with other kernels.

A process loads one library of operators, so that they need one of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rnn_cuda import backend
from rnn_cuda.build import CompilerNotFoundError, find_cxx

if backend.requested() != "native" and backend.requested() != "auto":
    pytest.skip("run once, from the session with native kernels", allow_module_level=True)


EMULATED = {"RNN_CUDA_BACKEND": "emulated", "OMP_NUM_THREADS": "1"}


def _need_a_compiler() -> None:
    try:
        find_cxx()
    except CompilerNotFoundError as error:
        pytest.skip(str(error))


OLD_KERNELS = """
import torch, rnn_cuda
assert rnn_cuda.plan(8, 4, 16, 512, device="cuda").residency == RESIDENCY
rnn, x = rnn_cuda.FusedRNN(16, 512), torch.randn(3, 4, 16)
exact = torch.nn.RNN(16, 512).double()
exact.load_state_dict(rnn.state_dict())
assert (rnn(x)[0] - exact(x.double())[0]).abs().max() < 1e-6
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "residency"),
    [
        ("capability=9.0,kernels=8.0", "grid"),  # 8.0+PTX on a card of 9.0
        ("capability=12.0,kernels=8.9,max_cluster_size=8", "grid"),
        ("capability=12.0,kernels=10.0,max_cluster_size=8", "cluster"),
        ("capability=9.0", "cluster"),
    ],
)
def test_clusters_run_only_where_the_kernels_have_them(device, residency):
    _need_a_compiler()
    done = subprocess.run(
        [sys.executable, "-c", OLD_KERNELS.replace("RESIDENCY", repr(residency))],
        env=os.environ | EMULATED | {"RNN_CUDA_EMULATOR_DEVICE": device},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_cuda_operators_pass_their_tests_on_emulated_kernels():
    _need_a_compiler()
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_cuda_operators.py"],
        cwd=root,
        env=os.environ | EMULATED,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    assert " passed" in summary
    assert "skipped" not in summary
