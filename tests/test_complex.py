"""Complex numbers: FusedRNN runs the reference on them, and gives what torch.nn.RNN gives."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from rnn_cuda import FusedRNN, backend
from rnn_cuda.functional import linear_recurrence
from rnn_cuda.residual import AntisymmetricRNN, LeakyRNN

pytestmark = pytest.mark.filterwarnings("ignore::rnn_cuda.backend.BackendWarning")


def _normal(*shape: int, dtype: torch.dtype = torch.complex128) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("asked", ["auto", "reference"])
def test_results_and_gradients_are_torchs(options, asked):
    fused = FusedRNN(3, 5, **options, dtype=torch.complex128)
    oracle = fused.to_torch()
    hx = _normal(len(fused.all_weights), 2, 5)
    results = []
    for module in (fused, oracle):
        x = _normal(4, 2, 3).requires_grad_()
        with backend.use(asked):
            output, h_n = module(x, hx)
        (output.abs().square().sum() + h_n.real.sum()).backward()
        results.append((output, h_n, x.grad, [p.grad for p in module.parameters()]))

    torch.testing.assert_close(*results)


def test_packed_results_are_torchs():
    fused = FusedRNN(3, 5, dtype=torch.complex64)
    packed = pack_sequence([_normal(2, 3), _normal(4, 3)], enforce_sorted=False)
    packed = packed.to(torch.complex64)

    with backend.use("auto"):
        (output, *_), h_n = fused(packed)

    (expected, *_), expected_h_n = fused.to_torch()(packed)
    torch.testing.assert_close((output, h_n), (expected, expected_h_n))


def test_a_layer_can_be_converted_to_complex_numbers():
    fused = FusedRNN(3, 5).to(torch.complex64)

    with backend.use("auto"):
        output, _ = fused(_normal(4, 2, 3, dtype=torch.complex64))

    assert output.dtype == torch.complex64


@pytest.mark.parametrize("cls", [LeakyRNN, AntisymmetricRNN])
def test_residual_layers_take_them(cls):
    rnn = cls(3, 5, dtype=torch.complex128)

    assert torch.autograd.gradcheck(rnn, (_normal(3, 2, 3).requires_grad_(),))


def test_the_linear_recurrence_of_the_instruments_does_not():
    # They read f'(z) off h, and take transposes for adjoints.
    with pytest.raises(ValueError, match=r"a dtype among .*float16; got torch\.complex128"):
        linear_recurrence(_normal(4, 2, 5), _normal(4, 2, 5), _normal(5, 5))


def test_relu_after_conversion_is_refused_as_in_torch():
    with pytest.raises(NotImplementedError):
        nn.RNN(3, 5, nonlinearity="relu").to(torch.complex64)(_normal(4, 2, 3).to(torch.complex64))
    with backend.use("auto"), pytest.raises((ValueError, RuntimeError), match="complex"):
        FusedRNN(3, 5, nonlinearity="relu").to(torch.complex64)(
            _normal(4, 2, 3).to(torch.complex64)
        )
