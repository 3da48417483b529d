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

pytestmark = pytest.mark.slow

if backend.requested() not in ("native", "auto"):
    pytest.skip("run once, from the session with native kernels", allow_module_level=True)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        find_cxx()
    except CompilerNotFoundError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"RNN_CUDA_BACKEND": "emulated", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done


OLD_KERNELS = """
import os, torch, rnn_cuda
rnn_cuda.backend.use_native("cpu", torch.float32)  # loads the library
rnn, x = rnn_cuda.FusedRNN(16, 512), torch.randn(3, 4, 16)
exact = torch.nn.RNN(16, 512).double()
exact.load_state_dict(rnn.state_dict())
for device, residency in {
    "capability=9.0,kernels=8.0": "grid",  # 8.0+PTX on a card of 9.0
    "capability=12.0,kernels=8.9,max_cluster_size=8": "grid",
    "capability=12.0,kernels=10.0,max_cluster_size=8": "cluster",
    "capability=9.0": "cluster",
}.items():
    child = os.fork()  # a process asks the device for its figures once
    if child == 0:
        os.environ["RNN_CUDA_EMULATOR_DEVICE"] = device
        chosen = rnn_cuda.plan(8, 4, 16, 512, device="cuda").residency
        assert chosen == residency, (device, chosen)
        assert (rnn(x)[0] - exact(x.double())[0]).abs().max() < 1e-6, device
        print(residency, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, device
"""


def test_clusters_run_only_where_the_kernels_have_them():
    done = run("-c", OLD_KERNELS)
    assert done.stdout.split() == ["grid", "grid", "cluster", "cluster"]


def test_the_cuda_operators_pass_their_tests_on_emulated_kernels():
    done = run("-m", "pytest", "-q", "-x", "tests/test_cuda_operators.py")
    summary = done.stdout.splitlines()[-1]
    assert " passed" in summary
    assert "skipped" not in summary
