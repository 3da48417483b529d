"""Complex numbers: FusedRNN runs the reference on them, and gives what torch.nn.RNN gives."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from rnn_cuda import FusedRNN, backend
from rnn_cuda.residual import AntisymmetricRNN, LeakyRNN
from tests.layers import normal

pytestmark = pytest.mark.filterwarnings("ignore::rnn_cuda.backend.BackendWarning")


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("asked", ["auto", "reference"])
def test_results_and_gradients_are_torchs(options, asked):
    fused = FusedRNN(3, 5, **options).to(torch.complex128)
    oracle = fused.to_torch()
    hx = normal(len(fused.all_weights), 2, 5, dtype=torch.complex128)
    results = []
    for module in (fused, oracle):
        x = normal(4, 2, 3, dtype=torch.complex128).requires_grad_()
        packed = pack_padded_sequence(x.detach(), [2, 4], enforce_sorted=False)
        with backend.use(asked):
            output, h_n = module(x, hx)
            data = module(packed)[0].data
        (output.abs().square().sum() + h_n.real.sum() + data.real.sum()).backward()
        results.append((output, h_n, data, x.grad, [p.grad for p in module.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cls", [LeakyRNN, AntisymmetricRNN])
def test_residual_layers_take_them(cls):
    rnn = cls(3, 5, dtype=torch.complex128)
    x = normal(3, 2, 3, dtype=torch.complex128).requires_grad_()
    with backend.use("auto"):
        assert torch.autograd.gradcheck(rnn, (x,))


def test_relu_after_conversion_is_refused_as_in_torch():
    fused, x = FusedRNN(3, 5, nonlinearity="relu"), normal(4, 2, 3, dtype=torch.complex64)
    with pytest.raises(NotImplementedError):
        fused.to_torch().to(torch.complex64)(x)
    with backend.use("auto"), pytest.raises((ValueError, RuntimeError), match="complex"):
        fused.to(torch.complex64)(x)
