"""Gradients per sample by ExpandedWeights, as Opacus' grad_sample_mode="ew" computes them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from rnn_cuda import FusedGRUCell, FusedLSTMCell, FusedRNN, FusedRNNCell, backend
from tests.layers import every_kind, flat_results

pytestmark = pytest.mark.filterwarnings("ignore::rnn_cuda.backend.BackendWarning")


@pytest.fixture(autouse=True)
def _may_run_on_the_reference():
    with backend.use("auto"):
        yield


def _loss(output: Tensor | PackedSequence) -> Tensor:
    data = output.data if isinstance(output, PackedSequence) else output
    return data.square().sum()


def _expected(module: nn.Module, samples: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Return the gradients of one backward pass per sample, stacked."""
    results = [module(*sample) for sample in samples]
    losses = [_loss(r[0] if isinstance(r, tuple) else r) for r in results]
    gradients = [torch.autograd.grad(loss, list(module.parameters())) for loss in losses]
    return [torch.stack(each) for each in zip(*gradients, strict=True)]


def _assert_samples_are(module: nn.Module, expected: list[Tensor], scale: int = 1) -> None:
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad_sample, scale * gradient)
        assert parameter.grad is None


@pytest.mark.parametrize("asked", ["auto", "reference"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"num_layers": 2, "bidirectional": True, "nonlinearity": "sigmoid"},
        {"bias": False, "nonlinearity": "relu"},
    ],
    ids=str,
)
def test_dense_batches_leave_the_gradients_of_every_sample(options, reduction, asked):
    torch.manual_seed(0)
    rnn = FusedRNN(3, 5, **options, dtype=torch.float64)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(len(rnn.all_weights), 2, 5, dtype=torch.float64)
    expected = _expected(rnn, [(x[b].detach(), hx[:, b]) for b in range(2)])
    sequence = x if rnn.batch_first else x.transpose(0, 1)
    (wanted,) = torch.autograd.grad(_loss(rnn(sequence, hx)[0]), x)

    with backend.use(asked):
        call = call_for_per_sample_grads(rnn, batch_size=2, loss_reduction=reduction)
        output, h_n = call(sequence, hx)

    torch.testing.assert_close((output, h_n), rnn(sequence, hx))
    _loss(output).backward()
    _assert_samples_are(rnn, expected, scale=2 if reduction == "mean" else 1)
    torch.testing.assert_close(x.grad, wanted)


@every_kind
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_batches_leave_them_in_the_order_of_length_as_torchs_layer_does(bidirectional, kind):
    torch.manual_seed(0)
    rnn = kind(3, 5, bidirectional=bidirectional, dtype=torch.float64)
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    lengths = [2, 4, 1]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    oracle = rnn.to_torch()
    for module in (rnn, oracle):
        _loss(call_for_per_sample_grads(module, batch_size=3)(packed)[0]).backward()

    expected = _expected(rnn, [(x[: lengths[b], b],) for b in (1, 0, 2)])
    _assert_samples_are(rnn, expected)
    _assert_samples_are(oracle, expected)


def test_a_frozen_weight_gets_none():
    rnn = FusedRNN(3, 5, batch_first=True)
    rnn.weight_hh_l0.requires_grad_(False)

    call_for_per_sample_grads(rnn)(torch.randn(2, 4, 3))[0].sum().backward()

    assert rnn.weight_ih_l0.grad_sample.shape == (2, 5, 3)
    assert not hasattr(rnn.weight_hh_l0, "grad_sample")


def test_the_backend_asked_for_is_kept_to():
    rnn = FusedRNN(3, 5, batch_first=True)
    with (
        backend.use("native"),
        pytest.raises(backend.NativeBackendError, match="no kernels for ExpandedWeights"),
    ):
        call_for_per_sample_grads(rnn)(torch.randn(2, 4, 3))


@pytest.mark.parametrize("kind", [FusedRNNCell, FusedGRUCell, FusedLSTMCell])
def test_cells_leave_them_too(kind):
    # torch.nn.RNNCell raises: "cannot handle function rnn_tanh_cell".
    torch.manual_seed(0)
    cell = kind(3, 5, dtype=torch.float64)
    x, hx = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    states = (lambda h: (h, 2 * h)) if kind is FusedLSTMCell else (lambda h: h)
    expected = _expected(cell, [(x[b], states(hx[b])) for b in range(2)])

    _loss(flat_results(call_for_per_sample_grads(cell)(x, states(hx)))[0]).backward()

    _assert_samples_are(cell, expected)
