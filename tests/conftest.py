"""Fixtures for every test."""

from collections.abc import Iterator

import pytest
import torch

from rnn_cuda._toolchain import CompilerNotFoundError, find_cxx
from tests.emulated_programs import Workshop


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run on one thread: small tensors gain nothing from more, and waiting for them costs most."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emulator_workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Compile programs that run CUDA kernels on the CPU; the emulator itself only once."""
    try:
        find_cxx()
    except CompilerNotFoundError as error:
        pytest.skip(str(error))
    workshop = Workshop(tmp_path_factory.mktemp("emulated"))
    yield workshop
    workshop.pool.shutdown(cancel_futures=True)
