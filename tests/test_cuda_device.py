"""What only a GPU can show: streams, graphs, several devices, no waiting for the device.

None of these has run yet: no machine of this project has had a GPU.
"""

from __future__ import annotations

import pytest
import torch

import rnn_cuda
from rnn_cuda import backend
from rnn_cuda.functional import elman_rnn
from tests.test_functional import batch_sizes_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = [20, 20, 17, 9, 3]


@pytest.fixture(autouse=True)
def native_kernels():
    with backend.use("native"):
        yield


def layer(device: str = "cuda", packed: bool = False) -> tuple[list[torch.Tensor], dict]:
    torch.manual_seed(0)
    x = torch.randn(sum(LENGTHS), 16) if packed else torch.randn(20, 5, 16)
    tensors = [x, torch.randn(5, 96), torch.randn(96, 16) / 4, torch.randn(96, 96) / 10]
    options = {"batch_sizes": batch_sizes_of(LENGTHS) if packed else None}
    return [t.to(device).requires_grad_() for t in tensors], options


def step(tensors: list[torch.Tensor], options: dict) -> list[torch.Tensor]:
    output, h_n = elman_rnn(*tensors, **options)
    return [output, h_n, *torch.autograd.grad(output.square().sum() + h_n.sum(), tensors)]


PLANS = ["residency=one_sm", "residency=grid,blocks=3", "residency=streamed"]
layouts = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


@layouts
@pytest.mark.parametrize("plan", PLANS)
def test_nothing_waits_for_the_device(plan, packed):
    tensors, options = layer(packed=packed)
    with rnn_cuda.plan_override(plan):
        step(tensors, options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(tensors, options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@layouts
@pytest.mark.parametrize("plan", PLANS)
def test_the_callers_stream_is_respected(plan, packed):
    tensors, options = layer(packed=packed)
    with rnn_cuda.plan_override(plan):
        expected = step(tensors, options)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # what follows is wrong if it does not wait for this
            late = [(t.detach() * 1).requires_grad_() for t in tensors]
            actual = step(late, options)
        stream.synchronize()
        for got, want in zip(actual, expected, strict=True):
            assert torch.equal(got, want)


@layouts
@pytest.mark.parametrize("plan", PLANS)
def test_a_captured_graph_repeats_the_step_on_new_data(plan, packed):
    tensors, options = layer(packed=packed)
    with rnn_cuda.plan_override(plan):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step(tensors, options)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(tensors, options)
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.no_grad():
                tensors[0].normal_()
            graph.replay()
            for got, want in zip(captured, step(tensors, options), strict=True):
                assert torch.equal(got, want)


def test_tensors_decide_the_device_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    expected = step(*layer("cuda:0"))
    with torch.cuda.device(0):
        actual = step(*layer("cuda:1"))
        assert torch.cuda.current_device() == 0
    for got, want in zip(actual, expected, strict=True):
        assert got.device.index == 1
        torch.testing.assert_close(got.cpu(), want.cpu())


def test_the_figures_of_this_device_are_those_of_torch():
    properties = torch.cuda.get_device_properties(0)
    figures = torch.ops.rnn_cuda.cuda_device_figures(0)
    assert figures[:2] == [properties.major, properties.minor]
    assert figures[2] == properties.multi_processor_count
    assert figures[3] == properties.shared_memory_per_block_optin
