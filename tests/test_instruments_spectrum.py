"""The spectrum of the recurrent matrix."""

import math

import pytest
import torch
from torch import nn

from rnn_cuda import FusedGRU, FusedRNN
from rnn_cuda.instruments import recurrent_spectrum


def test_the_spectrum_of_known_matrices():
    turn = torch.tensor([[0.0, -3.0], [3.0, 0.0]])
    found = recurrent_spectrum(torch.block_diag(turn, torch.tensor([[0.5]])))
    assert found.spectral_radius.item() == pytest.approx(3)
    assert found.largest_singular_value.item() == pytest.approx(3)
    assert found.smallest_singular_value.item() == pytest.approx(0.5)
    assert found.orthogonality_error.item() == pytest.approx(math.sqrt(8**2 * 2 + 0.75**2))

    shear = recurrent_spectrum(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    assert shear.spectral_radius.item() == pytest.approx(1, abs=1e-7)
    assert shear.largest_singular_value.item() == pytest.approx(1 + math.sqrt(2))

    q = nn.init.orthogonal_(torch.empty(6, 6, dtype=torch.float64))
    found = recurrent_spectrum(q)
    assert found.orthogonality_error.item() < 1e-13
    assert found.spectral_radius.item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("kind", "gates"), [(FusedRNN, 1), (nn.RNN, 1), (FusedGRU, 3), (nn.GRU, 3), (nn.LSTM, 4)]
)
def test_the_spectrum_of_a_module_has_an_entry_per_gate(kind, gates):
    weight = kind(3, 6).weight_hh_l0
    found = recurrent_spectrum(weight)
    for name, values in found._asdict().items():
        assert values.shape == (gates,), name
        assert values.dtype == torch.float64
    for gate, block in enumerate(weight.detach().double().split(6)):
        alone = recurrent_spectrum(block)
        for all_gates, one in zip(found, alone, strict=True):
            torch.testing.assert_close(all_gates[gate], one[0])
    history = recurrent_spectrum(torch.stack([weight, 2 * weight]))
    assert history.spectral_radius.shape == (2, gates)
    torch.testing.assert_close(history.spectral_radius[1], 2 * found.spectral_radius)


@pytest.mark.parametrize(
    ("weight_hh", "error", "message"),
    [
        ([1], TypeError, "weight_hh should be a Tensor, got: list"),
        (torch.zeros(10, 5), ValueError, r"weight_hh.* got \(10, 5\)"),
        (nn.LSTM(3, 6, proj_size=2).weight_hh_l0, ValueError, r"square blocks, got \(24, 2\)"),
        (torch.full((2, 2), math.nan), ValueError, "finite"),
    ],
)
def test_bad_arguments_are_named(weight_hh, error, message):
    with pytest.raises(error, match=message):
        recurrent_spectrum(weight_hh)
