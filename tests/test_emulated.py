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
from rnn_cuda._toolchain import CompilerNotFoundError, find_cxx

if backend.requested() != "native" and backend.requested() != "auto":
    pytest.skip("run once, from the session with native kernels", allow_module_level=True)


@pytest.mark.slow
def test_the_cuda_operators_pass_their_tests_on_emulated_kernels():
    try:
        find_cxx()
    except CompilerNotFoundError as error:
        pytest.skip(str(error))
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_cuda_operators.py"],
        cwd=root,
        env=os.environ | {"RNN_CUDA_BACKEND": "emulated", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    assert " passed" in summary
    assert "skipped" not in summary
