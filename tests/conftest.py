"""Fixtures for every test."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from rnn_cuda.build import CompilerNotFoundError, find_cxx
from tests.native_programs import Workshop

# What compiles most comes first, so that of several processes none is left with it at the end.
LONGEST = (
    "test_cuda_kernels",
    "test_cpu_kernels",
    "test_cuda_operators_emulated",
    "test_compile",
    "test_emulator",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONGEST)))


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """Give torch back its number of threads after a test that sets it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(restored_threads: None) -> None:
    """Run on one thread: small tensors gain nothing from more, and waiting for them costs most."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _settable_backend_flags() -> Iterator[None]:
    """Let no test freeze the flags of torch.backends for those after it.

    Importing torch.testing's utilities does, whoever imports them. The flag is a variable of a
    module that torch hides behind another one, where only its own functions reach it.
    """
    frozen = torch.backends.flags_frozen()
    yield
    flags = torch.backends.flags_frozen.__globals__
    flags["__allow_nonbracketed_mutation_flag"] = not frozen


@pytest.fixture
def any_half_precision() -> Iterator[None]:
    """Let every layer of torch's run in half precision, on any processor.

    oneDNN raises for an LSTM in bfloat16 or float16 where the processor has no instructions for
    them; torch's own implementation, slower, does not.
    """
    mkldnn = torch.ops.mkldnn
    fast = mkldnn._is_mkldnn_bf16_supported() and mkldnn._is_mkldnn_fp16_supported()
    with contextlib.nullcontext() if fast else torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Compile programs that run kernels outside PyTorch; what several need only once."""
    try:
        find_cxx()
    except CompilerNotFoundError as error:
        pytest.skip(str(error))
    workshop = Workshop(tmp_path_factory.mktemp("native"))
    yield workshop
    workshop.pool.shutdown(cancel_futures=True)
